"""Names, numbers and files that no recipe writes, but users, other loggers and damaged disks do."""

import json
import os
import re
from pathlib import Path

import pytest
from reporting.fabricated import write_run

from gmt_tune.errors import UserError
from gmt_tune.reporting.report import write_report
from gmt_tune.reporting.run_reader import read_run

HEADER = {"format": "gmt-tune run log", "version": 1}


def write_lines(folder: Path, *lines: dict | str, file: str = "run_log.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in (HEADER, *lines))
    (folder / file).write_text(text)
    return folder


def fact(page: Path, label: str) -> str:
    """A cell of the summary."""
    return re.search(rf'<th scope="row">{label}</th><td>(.*?)</td>', page.read_text())[1]


def test_any_name_of_a_metric_a_parameter_or_a_run_can_be_drawn(tmp_path):
    names = ["$loss$", "$\\frac{$", "_hidden", "<script>", "\ud800", "a\x00b", "", "n" * 3000]
    folders = [tmp_path / kind / "$\\frac{$<b>" / "_run" for kind in "ab"]
    for folder in folders:
        write_lines(folder, *({"step": step, "loss": 1.0} | dict.fromkeys(names, step) for step in (1, 2)))
        detail = {f"layers.{layer}.{name or 'w'}.weight": 0.1 * layer for layer in range(1, 3) for name in names}
        write_lines(folder, {"step": 1, "density": detail, "threshold": detail}, file="mask_detail.jsonl")
    page, pngs = write_report(folders, png_dir=tmp_path / "png")
    assert len(set(pngs)) == 1 + len(names) + 4  # loss, the metrics, and thresholds and densities of each run
    assert "<script>" not in page.read_text()


def test_runs_whose_names_begin_with_an_underscore_are_in_the_legend(tmp_path):
    folders = [write_lines(tmp_path / name, {"step": 1, "loss": 1.0}) for name in ("_first", "$second$")]
    svg = re.search(r"<svg.*?</svg>", write_report(folders)[0].read_text(), re.DOTALL)[0]
    labels = re.findall(r"<text[^>]*>(.*?)</text>", svg)
    assert {"_first, training", "$second$, training"} <= {label.strip() for label in labels}


def test_metrics_that_differ_in_signs_alone_have_figures_and_files_of_their_own(tmp_path):
    run = write_lines(tmp_path / "run", *({"step": step, "a/b": 1.0, "a-b": 2.0, "$": 3.0} for step in (1, 2)))
    page, pngs = write_report([run], png_dir=tmp_path / "png")
    ids = re.findall(r'<figure class="card" id="([^"]*)"', page.read_text())
    assert len(ids) == len(set(ids)) == len(set(pngs)) == 3
    assert all(path.is_file() for path in pngs) and all(ids)


@pytest.mark.parametrize(
    "value, read",
    [
        (10**400, float("inf")),
        (-(10**400), -float("inf")),
        ("1e999", float("inf")),
        (1.7e308, float("inf")),  # it leaves no room for an axis
        ("0.5", 0.5),
        (True, 1.0),
    ],
)
def test_numbers_beyond_what_can_be_drawn_count_as_infinite(value, read, tmp_path):
    lines = [{"step": step, "loss": value if step == 3 else 1.0 / step, "time": step} for step in range(1, 31)]
    run = write_lines(tmp_path / "run", *lines)
    assert read_run(run).series["loss"].values[2] == read
    if value == 10**400:
        write_report([run])


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"step": 2, "loss": ' + '{"a":' * 100_000,
        '{"step": 2, "loss": ' + "9" * 5000 + "}",  # more digits than Python reads
        '{"step": 2, "loss": {"a": 1}}',
        '{"step": 2, "loss": [1]}',
        '{"step": 2, "loss": null}',
        '{"step": 2.5, "loss": 7}',
        '{"step": "2", "loss": 7}',
        '{"step": true, "loss": 7}',
        '{"step": -1, "loss": 7}',
        '{"step": 1' + "0" * 400 + ', "loss": 7}',
        '{"step": 2, "loss": 7',
    ],
)
def test_a_line_that_is_no_step_of_the_log_costs_that_line_alone(line, tmp_path):
    run = write_lines(tmp_path / "run", {"step": 1, "loss": 3.0}, line, {"step": 4, "loss": 1.0})
    assert read_run(run).series["loss"].values == [3.0, 1.0]


def test_a_step_that_is_logged_twice_counts_once(tmp_path):
    run = write_lines(tmp_path / "run", {"step": 1, "loss": 3.0}, {"step": 1, "loss": 2.0})
    for value in (0.1, 0.3):
        with open(run / "mask_detail.jsonl", "a") as file:
            print(json.dumps({"step": 1, "density": {"layers.0.w.weight": value}}), file=file)
    read = read_run(run)
    assert read.series["loss"].values == [2.0]
    assert read.details["density"] == [(1, {"layers.0.w.weight": 0.3})]


def test_thresholds_that_are_not_all_there_at_every_step_are_drawn_where_they_are(tmp_path):
    lines = [{"step": step, **{f"mask/threshold_{end}": step for end in ("min", "median", "max")}} for step in range(5)]
    del lines[2]["mask/threshold_max"]
    page, _ = write_report([write_lines(tmp_path / "run", *lines)])
    assert "Median threshold goes from 0 at step 0 to 4 at step 4" in page.read_text()


def test_a_map_without_a_finite_number_is_left_out(tmp_path):
    run = write_lines(tmp_path / "run", {"step": 1, "loss": 1.0})
    detail = {f"layers.{layer}.w.weight": "NaN" for layer in range(3)}
    write_lines(run, {"step": 1, "density": detail, "threshold": detail}, file="mask_detail.jsonl")
    other = write_run(tmp_path / "other", steps=4, layers=2)
    page, _ = write_report([run, other])
    ids = re.findall(r'<figure class="card" id="([^"]*)"', page.read_text())
    assert {"density-map-1", "threshold-by-depth-1"} <= set(ids)
    assert {"density-map-0", "threshold-by-depth-0"}.isdisjoint(ids)


@pytest.mark.parametrize(
    "times, said",
    [
        ([1000, 4600, 4660], "1 h 1 min"),
        ([1000, 4600, 1000, 1060], "1 h 1 min"),  # the clock was set back by an hour
        ([4600, 1000], "0 s"),
        ([1000, "Infinity", "soon", None, 1060], "1 min 0 s"),
    ],
)
def test_the_time_of_a_run_is_what_passed_while_its_clock_went_forward(times, said, tmp_path):
    lines = [{"step": step, "time": time, "loss": 1.0} for step, time in enumerate(times)]
    page, _ = write_report([write_lines(tmp_path / "run", *lines)])
    assert fact(page, "time logged") == said


def test_losses_of_either_infinity_have_a_mean_that_is_no_number(tmp_path):
    lines = [{"step": step, "loss": "Infinity" if step % 2 else "-Infinity"} for step in range(40)]
    page, _ = write_report([write_lines(tmp_path / "run", *lines)])
    assert fact(page, "mean loss of the last tenth") == "NaN"


@pytest.mark.parametrize("history", [5, {"step": 1}, [5, None], [{"step": "high"}, {"step": 1, "loss": 1.0}]])
def test_a_trainers_log_of_another_shape_is_passed_over(history, tmp_path):
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        folder.mkdir()
        file = folder / "trainer_state.json"
        file.write_text(json.dumps({"log_history": history if folder.name == "run" else [{"step": 2, "loss": 2.0}]}))
    assert read_run(tmp_path / "run").series["loss"].values == [2.0]


def test_what_is_no_file_is_no_log_and_what_cannot_be_read_is_named(tmp_path):
    run = tmp_path / "run"
    (run / "mask_detail.jsonl").mkdir(parents=True)
    os.mkfifo(run / "run_log.jsonl")
    with pytest.raises(UserError, match="holds no logged step"):
        read_run(run)
    with pytest.raises(UserError, match="is no folder"):
        read_run(tmp_path / ("n" * 5000))
    (run / "run_log.jsonl").unlink()
    write_lines(run, {"step": 1, "loss": 1.0})
    (run / "run_log.jsonl").rename(run / "moved")
    (run / "run_log.jsonl").symlink_to("run_log.jsonl")  # a circle
    with pytest.raises(UserError):
        read_run(run)
