"""The table of all config keys is what its script writes, and has every key that the recipe takes."""

import importlib.util

import pytest
from doc_fences import ROOT

from gmt_tune.integrations.torchtune.config import check as config_check

SCRIPT = ROOT / "scripts" / "make_config_reference.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_config_reference", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_is_what_the_script_writes(script):
    assert script.PAGE.read_text() == script.build(), "run `python scripts/make_config_reference.py`"


def test_reference_has_every_key_of_the_recipe_once(script):
    text = script.PAGE.read_text()
    for key in (*config_check._REQUIRED, *config_check._OPTIONAL, "gradient_mask.density", "gradient_mask.seed"):
        assert text.count(f"\n| `{key}` |") == 1


def test_a_key_without_a_meaning_is_told(script, monkeypatch):
    monkeypatch.setattr(config_check, "_OPTIONAL", (*config_check._OPTIONAL, "brand_new_key"))
    with pytest.raises(SystemExit, match="brand_new_key has no comment in any config"):
        script.build()
