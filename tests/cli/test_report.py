"""``gmt-tune report``: where it writes, and one sentence for what it cannot draw."""

import json
import re
import sys

import pytest
from reporting.fabricated import write_run

from gmt_tune.cli.main import main
from gmt_tune.reporting.run_log import RunLog
from gmt_tune.reporting.run_reader import read_runs
from gmt_tune.reporting.summary import summary_tables


def complaint(capsys) -> str:
    """What the command printed when it failed: one line, without a traceback."""
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("gmt-tune: ") and captured.err.count("\n") == 1
    return captured.err


def test_it_says_where_the_page_and_the_pictures_are(tmp_path, capsys):
    run = write_run(tmp_path / "run", steps=4, layers=2)
    assert main(["report", str(run), "--png", str(tmp_path / "png")]) == 0
    out = capsys.readouterr().out
    count = int(re.search(r"Wrote (\d+) PNG files", out)[1])
    assert f"Wrote {run / 'report.html'}\n" in out
    assert len(list((tmp_path / "png").glob("*.png"))) == count > 8


def test_several_runs_go_on_one_page(tmp_path, capsys):
    runs = [write_run(tmp_path / name, steps=4, density=None, seed=seed) for seed, name in enumerate("ab")]
    page = tmp_path / "both.html"
    assert main(["report", *map(str, runs), "-o", str(page)]) == 0
    assert "<h1>Fine-tuning report: a and b</h1>" in page.read_text()
    assert not (runs[0] / "report.html").exists()


def test_tilde_is_the_home_folder_in_every_path(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", steps=2, density=None)
    assert main(["report", "~/run", "--output=~/page.html", "--png=~/png"]) == 0
    assert (tmp_path / "page.html").is_file() and list((tmp_path / "png").glob("*.png"))
    assert not (tmp_path / "~").exists()


def test_what_is_no_run_is_reported_in_one_sentence(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    begun = write_run(tmp_path / "begun", steps=1, layers=1)
    header = (begun / "run_log.jsonl").read_text().splitlines()[0]
    (begun / "run_log.jsonl").write_text(header + "\n")
    blank = tmp_path / "blank"
    blank.mkdir()
    (blank / "run_log.jsonl").write_text("")
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "run_log.jsonl").write_text(json.dumps({"format": "gmt-tune run log", "version": 2}) + "\n")
    for folder, words in (
        (tmp_path / "nowhere", "is no folder: name the output_dir of a run"),
        (begun / "run_log.jsonl", "is no folder: name the output_dir of a run"),
        (empty, "holds no logged step"),
        (begun, "holds no logged step"),
        (blank, "holds no logged step"),
        (newer, "upgrade gmt-tune"),
    ):
        assert main(["report", str(folder)]) == 1
        message = complaint(capsys)
        assert words in message and str(folder) in message


def test_a_page_that_cannot_be_written_is_reported_in_one_sentence(tmp_path, capsys):
    run = write_run(tmp_path / "run", steps=2, density=None)
    (tmp_path / "file").write_text("")
    assert main(["report", str(run), "-o", str(tmp_path / "file" / "page.html")]) == 1
    assert "name another file" in complaint(capsys)
    assert main(["report", str(run), "--png", str(tmp_path / "file" / "png")]) == 1
    assert "name another folder" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run", steps=2, density=None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(run)]) == 1
    assert "pip install matplotlib" in complaint(capsys)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_usage_is_shown(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["report", *arguments])
    assert "RUN_DIR" in "".join(capsys.readouterr())


def test_of_several_folders_those_that_cannot_be_read_are_left_out_with_a_warning(tmp_path, capsys, caplog):
    runs = [write_run(tmp_path / name, steps=4, density=None) for name in ("a", "b")]
    broken = tmp_path / "broken"
    broken.mkdir()
    page = tmp_path / "page.html"
    assert main(["report", str(runs[0]), str(broken), str(runs[1]), "-o", str(page)]) == 0
    assert "<h1>Fine-tuning report: a and b</h1>" in page.read_text()
    (warning,) = caplog.messages
    assert warning.startswith(f"Left out of the report: {broken} holds no logged step")
    assert main(["report", str(broken), str(tmp_path / "nowhere")]) == 1
    assert f"{broken} holds no logged step" in complaint_after_warnings(capsys)


def complaint_after_warnings(capsys) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_a_resumed_run_says_what_it_began_from_and_what_it_went_on_from(tmp_path, capsys):
    def begin(checkpoint_dir: str, step: int) -> RunLog:
        log = RunLog(tmp_path / "run", {"checkpointer": {"checkpoint_dir": checkpoint_dir}})
        log.truncate_after(step)
        log.log(step + 1, {"loss": 1.0})
        return log

    begin("/models/base", 0)
    assert started(tmp_path) == ("/models/base", None)
    begin("/run/epoch_0", 1)
    begin("/run/epoch_1", 2)
    assert started(tmp_path) == ("/models/base", "/run/epoch_1")
    begin("/models/other", 0)
    assert started(tmp_path) == ("/models/other", None)


def started(tmp_path) -> tuple[str | None, str | None]:
    (_, set_up), *_ = summary_tables(read_runs([tmp_path / "run"]))
    facts = {label: value for label, value in set_up.rows}
    return facts.get("started from"), facts.get("resumed from")
