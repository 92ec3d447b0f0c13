"""The page of all config keys is what its script writes, and has every key of the table once."""

import importlib.util

from doc_fences import ROOT

from gmt_tune.integrations.torchtune.config.keys import KEYS

SCRIPT = ROOT / "scripts" / "make_config_reference.py"


def test_the_reference_is_what_the_script_writes_and_has_every_key_of_the_table_once():
    spec = importlib.util.spec_from_file_location("make_config_reference", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.PAGE.read_text()
    assert text == script.build(), "run `python scripts/make_config_reference.py`"
    assert {name: text.count(f"\n| `{name}` |") for name in KEYS} == dict.fromkeys(KEYS, 1)
