"""The comparison harness: configs that recipes take, a real run through ``tune run``, results that are not redone."""

import json
import math
import subprocess
import sys
import textwrap

import pytest

from benchmarks.quality import __main__ as cli
from benchmarks.quality import experiment, overview, report, results, tasks
from benchmarks.quality.experiment import Run, load_method, load_suite
from gmt_tune.errors import UserError

ALL = [(suite, method) for suite in experiment.suite_names() for method in load_suite(suite).methods]


@pytest.fixture
def own_results(tmp_path, monkeypatch):
    """An empty folder of results instead of the repository's."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results, "RUNS", tmp_path / "results" / "runs")
    monkeypatch.setattr(report, "PAGE", tmp_path / "results" / "tables.md")
    monkeypatch.setattr(report, "FIGURES", tmp_path / "results" / "figures")
    monkeypatch.setattr(overview, "PAGE", tmp_path / "results.md")
    overview.PAGE.write_text("Words.\n")
    return tmp_path / "results"


@pytest.fixture
def short_village(tmp_path, monkeypatch):
    """A suite of six steps on the village, among copies of the real methods."""
    (tmp_path / "quality" / "suites").mkdir(parents=True)
    (tmp_path / "quality" / "methods").symlink_to(experiment.HERE / "methods")
    text = (experiment.HERE / "suites" / "village_small.yaml").read_text()
    text = text.replace("epochs: 15", "epochs: 2").replace("train_rows: 48", "train_rows: 18")
    text = text.replace("run_val_every_n_steps: 20", "run_val_every_n_steps: 3")
    text = text.replace("test: null", "test: 24").replace("validation: null", "validation: 12")
    (tmp_path / "quality" / "suites" / "village_small.yaml").write_text(text)
    monkeypatch.setattr(experiment, "HERE", tmp_path / "quality")
    return load_suite("village_small")


@pytest.mark.parametrize(("suite", "method"), ALL)
def test_every_experiment_is_a_config_that_torchtune_can_instantiate(suite, method, tmp_path):
    from omegaconf import OmegaConf
    from torchtune.config import validate

    run = Run(load_suite(suite), load_method(method), 1e-3, 7, "measure")
    config = run.build_config({"train": tmp_path / "train.jsonl", "validation": tmp_path / "val.jsonl"}, tmp_path)
    validate(OmegaConf.create(config))
    assert (config["optimizer"]["lr"], config["seed"], config["dataset"]["data_files"]) == (
        1e-3,
        7,
        str(tmp_path / "train.jsonl"),
    )
    assert ("gradient_mask" in config) == (not method.startswith(("sft", "lora"))) or (
        method == "lora"  # which the base config's mask does not reach: torchtune's recipe knows no such key
    )


def test_village_splits_ask_about_different_people():
    from gmt_tune.data import village

    rows = tasks.task("village").rows(None)
    named = {split: {name for name in village.people() for row in rows[split] if name in row.prompt} for split in rows}
    assert {split: len(rows[split]) for split in tasks.SPLITS} == {"train": 720, "validation": 144, "test": 288}
    assert not (named["train"] & named["validation"] or named["train"] & named["test"])
    assert not named["validation"] & named["test"]


def test_gsm8k_validation_is_cut_from_the_training_file(tmp_path, monkeypatch):
    def problem(split, i):
        return {"question": f"{split} {i}?", "answer": f"2*{i}=<<2*{i}={2 * i}>>{2 * i}\n#### {2 * i}"}

    for split, count in (("train", 700), ("test", 20)):
        lines = [json.dumps(problem(split, i)) for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("GSM8K_DIR", str(tmp_path))
    rows = tasks.task("gsm8k").rows(tmp_path)
    assert {split: len(rows[split]) for split in rows} == {"train": 200, "validation": 500, "test": 20}
    assert len({row.prompt for row in rows["train"] + rows["validation"]}) == 700
    assert all(row.prompt.startswith("test") for row in rows["test"])
    assert rows["test"][3].answer == "2*3=6\n#### 6"
    monkeypatch.setenv("GSM8K_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="GSM8K_DIR must name a folder"):
        tasks.task("gsm8k").rows(tmp_path)


def test_seeds_reorder_and_draw_the_same_rows_for_every_method(tmp_path):
    rows = tasks.task("village").rows(None)["train"]
    files = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        tasks.write_split(file, rows, seed=seed, size=48)
    assert files[0].read_text() == files[1].read_text() != files[2].read_text()
    assert len(files[0].read_text().splitlines()) == 48
    with pytest.raises(UserError, match="721 rows are asked for"):
        tasks.write_split(files[0], rows, size=721)


def _write(suite, method, rate, seed, phase, loss, **more):
    run = Run(suite, method, rate, seed, phase)
    results.write(run.name, {"key": run.key(), "failed": None, "losses": {"validation": loss, "test": loss}, **more})


def test_lowest_mean_validation_loss_chooses_and_a_diverged_run_never_does(own_results):
    suite, sft = load_suite("village_small_gpu"), load_method("sft")
    for rate, loss in zip(suite.choose["learning_rates"], (0.4, 0.3, 0.2), strict=True):
        assert results.chosen_learning_rate(suite, sft) is None
        for seed in suite.choose["seeds"]:
            failed = {"failed": "loss holds NaN"} if rate == 0.004 else {}
            _write(suite, sft, rate, seed, "choose", loss, **failed)
    assert results.chosen_learning_rate(suite, sft) == 0.003


def test_rates_are_tried_beyond_the_first_ones_while_the_best_is_at_their_edge(own_results):
    suite, method = load_suite("reviews_cpu"), load_method("sft")
    losses = {1e-5: 0.2, 3e-5: 0.1, 1e-4: 0.3, 3e-4: 0.4, 1e-3: 0.5}
    made = []
    while runs := results.missing_choosing_runs(suite, method):
        assert results.chosen_learning_rate(suite, method) is None
        for run in runs:
            made.append(run.learning_rate)
            results.write(run.name, {"key": run.key(), "failed": None, "losses": {"validation": losses[made[-1]]}})
    assert made == [1e-4, 3e-4, 1e-3, 3e-5, 1e-5]
    assert results.chosen_learning_rate(suite, method) == 3e-5
    assert set(results.measured(suite, method)) == {0}  # the seed that chose is measured by it


@pytest.mark.slow  # reads all of SymPy
def test_functions_are_code_and_no_file_is_in_two_splits():
    rows = tasks.task("functions").rows(None)
    assert all(len(rows[split]) > 300 for split in tasks.SPLITS)
    asked = [row for split in tasks.SPLITS for row in rows[split]]
    assert len(set(asked)) == len(asked)
    for prompt, body in asked[::50]:
        head = prompt.partition("\n\n")[2]
        compile(f"{head}\n{textwrap.indent(body, '    ')}", "function", "exec")


def test_a_result_of_other_settings_does_not_count(own_results, monkeypatch):
    suite, sft = load_suite("gsm8k_cpu"), load_method("sft")
    _write(suite, sft, 3e-4, 0, "measure", 0.7)
    assert set(results.measured(suite, sft)) == {0}
    _write(suite, sft, 1e-4, 1, "measure", 0.8)
    others = results.measured_at_other_rates(suite, sft)
    assert {rate: set(runs) for rate, runs in others.items()} == {1e-4: {1}}
    changed = experiment.Suite(**{**vars(suite), "train_rows": 100})
    assert results.measured(changed, sft) == {}
    assert results.measured_at_other_rates(changed, sft) == {}


def test_a_line_cut_short_is_left_out_and_the_last_line_of_a_run_counts(own_results, capsys):
    suite, sft = load_suite("gsm8k_cpu"), load_method("sft")
    for seed, loss in ((0, 0.7), (1, 0.8), (0, 0.6)):
        _write(suite, sft, 3e-4, seed, "measure", loss)
    file = results.suite_file("gsm8k_cpu")
    file.write_bytes(file.read_bytes() + b'{"run": "gsm8k_cpu/sft/measure_lr0.0003_seed1", "key": "x", "lo')
    _write(suite, sft, 3e-4, 2, "measure", 0.9)
    losses = {seed: run["losses"]["test"] for seed, run in results.measured(suite, sft).items()}
    assert losses == {0: 0.6, 1: 0.8, 2: 0.9}
    assert "line 4 is not a whole result" in capsys.readouterr().err


def test_again_lets_the_runs_it_names_count_as_not_made(own_results, monkeypatch):
    from benchmarks.quality.runner import Runner

    suite, sft = load_suite("gsm8k_cpu"), load_method("sft")
    for seed in (0, 1):
        _write(suite, sft, 3e-4, seed, "measure", 0.7)
        _write(suite, load_method("gmt_0.2"), 3e-4, seed, "measure", 0.7)
    monkeypatch.setattr(Runner, "base", lambda self, suite: None)
    monkeypatch.setattr(Runner, "measure", lambda self, *arguments: None)  # killed before it made one
    assert cli.main(["run", "gsm8k_cpu", "sft", "--again", "--seeds", "1", "--lr", "0.0003"]) == 0
    assert set(results.measured(suite, sft)) == {0}
    assert set(results.measured(suite, load_method("gmt_0.2"))) == {0, 1}


def test_many_processes_append_whole_lines(own_results):
    script = """
import sys
from pathlib import Path
from benchmarks.quality import results
results.RUNS = Path(sys.argv[1])
for i in range(int(sys.argv[2]), 200, 4):
    results.write(f"village_small/sft/measure_lr{i}_seed0", {"i": [i] * 999})
"""
    command = [sys.executable, "-c", script, str(results.RUNS)]
    processes = [subprocess.Popen([*command, str(first)], cwd=results.ROOT) for first in range(4)]
    assert [process.wait(120) for process in processes] == [0] * 4
    found = results.read_all("village_small")
    assert {name: result["i"][-1] for name, result in found.items()} == {
        f"village_small/sft/measure_lr{i}_seed0": i for i in range(200)
    }


@pytest.mark.slow
def test_lora_run_trains_by_torchtunes_recipe_and_is_measured(own_results, short_village, tmp_path, capsys):
    """Real: two processes, ``tune run lora_finetune_single_device`` and the evaluation of what it saved."""
    _check_real_run("lora", tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "gmt_0.2", "rmt_0.2", "oneoff_0.2", "half", "gmt_0.2_momentum_reset"])
def test_run_trains_by_our_recipe_and_is_measured(method, own_results, short_village, tmp_path, capsys):
    result = _check_real_run(method, tmp_path, capsys)
    assert [step for step, _ in result["validation_loss"]] == [3, 6]
    assert result["validation_loss"][-1][1] == pytest.approx(result["losses"]["validation"], rel=1e-4)


def _check_real_run(method, tmp_path, capsys) -> dict:
    arguments = ["run", "village_small", method, "--seeds", "0", "--lr", "0.003", "--work", str(tmp_path / "work")]
    assert cli.main(arguments) == 0, capsys.readouterr().err
    result = results.read(f"village_small/{method}/measure_lr0.003_seed0")
    base = results.read("village_small/base/measure_lr0_seed0")
    assert result["steps"] == 6 and result["train_loss"][-1][0] == 6
    assert result["losses"]["test"] < base["losses"]["test"]
    assert 0 < result["change"]["fraction_changed"] <= 1
    assert (result["questions"], base["accuracy"]) == (24, 0)
    assert all(math.isfinite(result[key]) for key in ("seconds_per_step", "peak_memory_gib", "train_cpu_seconds"))
    assert result["command"] in f"python -m benchmarks.quality {' '.join(arguments)}"

    capsys.readouterr()
    before = results.suite_file("village_small").read_bytes()
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == ""  # all is done
    assert results.suite_file("village_small").read_bytes() == before
    return result


def test_tables_are_those_that_the_committed_results_give(monkeypatch):
    committed = {page: page.read_text(encoding="utf-8") for page in (report.PAGE, overview.PAGE)}
    monkeypatch.setattr(report, "to_png", lambda figure, folder: folder / f"{figure.key}.png")
    written = {}
    monkeypatch.setattr(type(report.PAGE), "write_text", lambda self, text, **_: written.update({self: text}))
    report.write_report()
    assert written == committed, "run `python -m benchmarks.quality table`"


def test_wrong_names_are_answered_in_a_sentence(capsys):
    assert cli.main(["run", "villag"]) == 1
    assert "benchmarks/quality/suites has no 'villag': choose from" in capsys.readouterr().err
