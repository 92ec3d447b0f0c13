"""Training with the mask gives the losses of training with a full sort in its place, bit for bit."""

from pathlib import Path

import pytest
import torch
from word_problems import write_problems

TESTS = Path(__file__).parents[1]
FULL_SORT = "gradient_mask._component_=full_sort_mask.FullSortMask"


def losses_of_both(run_tune, logged_metrics, folder, *arguments, timeout):
    losses = []
    for name, more in (("mask", []), ("full_sort", [FULL_SORT])):
        run_tune(
            "run",
            "gmt_full_finetune",
            *arguments,
            f"output_dir={folder / name}",
            "metric_logger.filename=log.txt",
            *more,
            cwd=folder,
            timeout=timeout,
            HF_HUB_OFFLINE="1",
            PYTHONPATH=str(TESTS),
        )
        losses.append([step["loss"] for step in logged_metrics(folder / name) if "loss" in step])
    return losses


def test_losses_and_weights_equal_those_of_a_full_sort(
    tmp_path, tiny_config, run_recipe, logged_metrics, final_weights
):
    for name, mask in (("mask", "gmt_tune.GradientMask"), ("full_sort", "full_sort_mask.FullSortMask")):
        run_recipe(tiny_config(tmp_path / name, gradient_mask={"_component_": mask, "density": 0.2}))
    losses, weights = (
        [read(tmp_path / name) for name in ("mask", "full_sort")] for read in (logged_metrics, final_weights)
    )
    assert [step["loss"] for step in losses[0]] == [step["loss"] for step in losses[1]]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])


@pytest.mark.slow
def test_quickstart_losses_equal_those_of_a_full_sort(run_tune, logged_metrics, tmp_path):
    optimizer = ("optimizer=torchao.optim.AdamW8bit", "optimizer.eps=1e-6")
    by_mask, by_full_sort = losses_of_both(
        run_tune, logged_metrics, tmp_path, "--config", "quickstart", *optimizer, timeout=1800
    )
    assert len(set(by_mask)) > 50 and by_mask == by_full_sort


@pytest.mark.slow
def test_smollm2_losses_equal_those_of_a_full_sort(run_tune, logged_metrics, tmp_path):
    from gmt_tune.cli.main import main

    model = tmp_path / "SmolLM2-135M-Instruct"
    assert main(["fetch", "smollm2-135m", str(model)]) == 0
    write_problems(tmp_path / "train.jsonl", 64, seed=0)
    by_mask, by_full_sort = losses_of_both(
        run_tune,
        logged_metrics,
        tmp_path,
        "--config",
        "smollm2/135M_gmt_cpu",
        f"checkpointer.checkpoint_dir={model}",
        "dataset.source=json",
        f"dataset.data_files={tmp_path / 'train.jsonl'}",
        "max_steps_per_epoch=4",
        timeout=3600,
    )
    assert len(set(by_mask)) == 4 and by_mask == by_full_sort
