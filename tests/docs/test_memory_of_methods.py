"""docs/choosing.md: the memory of each method is what its line prints, and README.md rounds it."""

import re
import runpy
import shlex

import pytest
from doc_fences import ROOT

from gmt_tune.cli import memory

PAGE = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("<!-- memory of each method -->")[2].partition("<!-- end -->")[0]
ROWS = re.findall(r"^\| (.+?) \| ([\d.]+) \| (?:none: )?`(.+)` \|$", TABLE, re.M)


LORA, *OTHERS = sorted(ROWS, key=lambda row: not row[0].startswith("LoRA"))


@pytest.mark.parametrize("method, gib, line", OTHERS, ids=[method for method, *_ in OTHERS])
def test_line_prints_the_memory(method, gib, line):
    config, *overrides = shlex.split(line)
    report = memory.report(config, None, overrides)
    assert f"{report['device_bytes'] / 2**30:.2f}" == gib


def test_lora_takes_what_its_script_prints():
    script = runpy.run_path(str(ROOT / "benchmarks" / "lora_memory.py"))
    assert f"{script['lora_bytes']() / 2**30:.2f}" == LORA[1]


def test_readme_has_the_same_rounded():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("## Which, when, why")[2].partition('\n\n"Tiny model"')[0]
    rounded = {f"{float(gib):.1f}" for _, gib, _ in ROWS}
    in_readme = re.findall(r"\b\d\d\.\d\b", table.replace("Llama 3.1", ""))
    assert len(in_readme) == 6 and set(in_readme) <= rounded
