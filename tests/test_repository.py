"""What people expect of a repository: a citation of this version, and forms that ask for what a report needs."""

import importlib.metadata
import re
from pathlib import Path

import pytest
import yaml

import gmt_tune
from gmt_tune.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))  # config.yml is none


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["version"] == gmt_tune.__version__
    assert {"message", "title", "authors"} <= citation.keys()
    (paper,) = citation["references"]
    assert "2406.15330" in paper["url"] and len(paper["authors"]) == 8


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.name)
def test_an_issue_form_is_one_and_asks_for_the_versions(file):
    form = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys() and len(FORMS) == 2
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert len({field["id"] for field in fields}) == len(fields) and all(f["attributes"]["label"] for f in fields)
    assert "`gmt-tune env`" in str(form)


def test_links_of_the_forms_lead_somewhere():
    for file in [*FORMS, ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md"]:
        for path in re.findall(r"blob/main/([\w/.]+)|([A-Z]+\.md)", file.read_text(encoding="utf-8")):
            assert (ROOT / "".join(path)).is_file(), path


def test_env_prints_what_a_report_needs_and_no_paths(capsys):
    assert main(["env"]) == 0
    shown = dict(re.split(r" {2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    for name in ("torch", "torchao", "torchtune"):
        assert shown[name] == importlib.metadata.version(name)
    assert {"Python", "system", "gmt-tune", "torch is built for"} <= shown.keys()
    assert "/" not in "".join(shown.values())
