"""The peers: a page that is made of the results, real short Trainer runs, and how a learning rate is found."""

import importlib.util

import pytest
import torch
from slow_cases import slow_where

from benchmarks.peers import __main__ as cli
from benchmarks.peers import checks, runs, table, training
from benchmarks.peers.methods import METHODS, LowRankMagnitude
from benchmarks.quality import results
from benchmarks.quality.evaluation import IGNORE


def _is_installed(name):
    return all(importlib.util.find_spec(package.replace("-", "_")) for package in METHODS[name].packages)


@pytest.fixture
def own_results(tmp_path, monkeypatch):
    """An empty folder of results instead of the repository's."""
    monkeypatch.setattr(results, "RUNS", tmp_path / "runs")


def test_page_is_what_the_results_give():
    assert table.page() == table.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["run", "check"])
def test_wrong_name_is_a_sentence_that_names_the_right_ones(command, capsys):
    assert cli.main([command, "adamv"]) == 1
    assert capsys.readouterr().err == f"Error: there is no method 'adamv': choose from {', '.join(METHODS)}\n"


def test_missing_package_is_a_sentence_with_the_remedy(own_results):
    with pytest.raises(runs.UserError, match="no-such-thing is not installed: run `pip install -r benchmarks/peers/"):
        runs.versions(["torch", "no-such-thing"])


TRAINED = ["adamw", "gmt_0.2", "compact_0.2", "lift_0.05", "lora_16", "shira_16", "badam"]


@pytest.mark.parametrize("name", slow_where(lambda name: name not in ("compact_0.2", "shira_16"), TRAINED))
def test_a_trainer_learns_and_accumulates(name, tmp_path):
    if not _is_installed(name):
        pytest.skip(f"needs {', '.join(METHODS[name].packages)}")
    whole = checks.train(name, tmp_path / "whole", batch_size=checks.BATCH)
    halves = checks.train(name, tmp_path / "halves", batch_size=checks.BATCH // 2, accumulate=2)
    assert halves["losses"] == pytest.approx(whole["losses"], abs=checks.LOSS_TOLERANCE)
    assert whole["losses"][-1] < whole["losses"][0] - 0.05


def test_a_rate_at_the_edge_gets_its_neighbour(own_results):
    def write(rate, loss):
        run = runs.Run("adamw", rate, 0)
        results.write(run.name, {"key": run.key(), "failed": None, "losses": {"validation": loss}})

    assert runs.missing_rates("adamw") == [3e-5, 1e-4, 3e-4]
    for rate, loss in [(3e-5, 0.3), (1e-4, 0.2), (3e-4, 0.1)]:
        write(rate, loss)
    assert runs.missing_rates("adamw") == [1e-3]
    write(1e-3, 0.4)
    assert runs.missing_rates("adamw") == [] and runs.best_rate("adamw") == 3e-4


def test_a_method_that_cannot_run_is_not_tried_at_every_rate(own_results):
    run = runs.Run("flash_adamw", 1e-4, 0)
    results.write(run.name, {"key": run.key(), "failed": "NotImplementedError: no CUDA"})
    assert runs.missing_rates("flash_adamw") == [] and runs.best_rate("flash_adamw") is None


def test_loss_and_accuracy_equal_those_of_rows_one_by_one():
    model, rows = checks.tiny_llama().eval(), checks.rows()[:5]
    rows[0] = {key: values[3:] for key, values in rows[0].items()}  # shorter, so that it is padded
    for row in rows[:2]:  # whose greedy answers are the expected ones
        for i in range(training.first_label(row["labels"]), len(row["labels"])):
            row["input_ids"][i] = row["labels"][i] = int(
                model(torch.tensor([row["input_ids"][:i]])).logits[0, -1].argmax()
            )
    losses, labels = 0.0, 0
    for row in rows:
        tokens, expected = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        counted = int((expected != IGNORE).sum())
        losses, labels = losses + counted * model(tokens, labels=expected).loss.item(), labels + counted
    loss, accuracy = training.answered(model, rows, batch_size=3)
    assert loss == pytest.approx(losses / labels, rel=1e-5) and accuracy == 0.4


def test_bytes_are_those_of_each_memory_once():
    weight = torch.zeros(10)

    class Projector:
        def __init__(self):
            self.matrix = torch.zeros(3, dtype=torch.float64)

    assert training.held_bytes({"a": {"x": weight, "view": weight[2:]}, "b": [Projector(), 7, None]}) == 40 + 24
    torchao = pytest.importorskip("torchao.optim.subclass_8bit")
    state = torchao.OptimState8bit.zeros((4096,), block_size=256)
    assert training.held_bytes([state]) == 4096 + 4 * 4096 // 256 + 4 * 256


def test_lift_selects_the_largest_entries_of_the_low_rank_weight():
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 16, bias=False)
    left, values, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    approximated = ((left[:, :16] * values[:16]) @ right[:16]).abs()
    mask = LowRankMagnitude(layer.named_parameters(), 0.25, rank=16)
    layer.weight.grad = torch.ones_like(layer.weight)
    mask.mask_grads_()
    assert torch.equal(layer.weight.grad != 0, approximated >= approximated.flatten().sort().values[-96])
