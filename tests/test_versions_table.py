"""README's table of versions, the rows that `nox` runs, and the workflow that runs them on GitHub are the same."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def rows():
    """What `nox --list --json` prints."""
    command = [sys.executable, "-m", "nox", "--list", "--json", "--noxfile", ROOT / "noxfile.py"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


def test_every_row_of_the_table_is_a_session_and_every_session_a_row(rows):
    section = (ROOT / "README.md").read_text().partition("## Versions that work, and why")[2].partition("\n## ")[0]
    named = re.findall(r'^\| `nox -s "?([^"`]+)"?` \|', section, re.MULTILINE)
    assert sorted(named) == sorted(row["session"] for row in rows) and len(named) == len(set(named)) > 10


def test_each_host_with_requirements_of_its_own_is_a_session(rows):
    hosts = {file.parent.name for file in (ROOT / "tests" / "integrations").glob("*/requirements.txt")}
    assert "axolotl" in hosts and hosts == {row["call_spec"]["name"] for row in rows if row["name"] == "host"}


def test_the_tests_that_sessions_run_are_there():
    files = re.findall(r'"(tests/[^"{*]+)"', (ROOT / "noxfile.py").read_text())
    assert len(files) > 10 and [file for file in files if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_may_read_alone_and_ends(file):
    workflow = yaml.safe_load(file.read_text())
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]
    assert workflow["jobs"] and all(job["timeout-minutes"] <= 60 for job in workflow["jobs"].values())


def test_the_workflow_of_versions_asks_nox_for_its_rows(rows):
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "versions.yml").read_text())["jobs"]
    (ask,) = [step for step in jobs["rows"]["steps"] if step.get("id") == "list"]
    assert "$(nox --list --json)" in ask["run"]
    assert jobs["row"]["strategy"]["matrix"]["include"] == "${{ fromJSON(needs.rows.outputs.rows) }}"
    assert jobs["row"]["steps"][-1]["run"] == 'nox -s "${{ matrix.session }}"'
    assert all({"session", "name", "python"} <= row.keys() and row["python"] for row in rows)
