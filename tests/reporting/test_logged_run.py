"""A recipe's run hands the mask's numbers to torchtune's metric loggers, and to its own files."""

import json
import re
import shutil

import pytest

from gmt_tune.reporting.mask_metrics import is_group_metric
from gmt_tune.reporting.run_reader import read_run

MODULES = {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "mlp.w1", "mlp.w2", "mlp.w3"}
MASK = {"_component_": "gmt_tune.GradientMask", "density": 0.2, "dense": ["*norm*", "*.scale"]}


def expected_groups(kinds, layers) -> set[str]:
    names = {f"mask_{kind}_by_module/{module}" for kind in kinds for module in MODULES}
    return names | {f"mask_{kind}_by_layer/layer_{i:02d}" for kind in kinds for i in range(layers)}


def test_disk_logger_gets_totals_and_groups_of_every_layer_and_module(smollm2_run, logged_metrics):
    steps = [step for step in logged_metrics(smollm2_run) if "loss" in step]
    assert len(steps) == 6
    for step in steps:
        assert step["mask/density"] == pytest.approx(0.2, abs=0.002)
    densities = [step[name] for step in steps for name in expected_groups(["density"], 30) if name in step]
    assert len(densities) >= 2 * (30 + len(MODULES)) and densities == pytest.approx([0.2] * len(densities), abs=0.01)
    # The selection is made once: thresholds are those of the first step
    kinds = ("density", "threshold", "coverage")
    assert {name for name in steps[0] if is_group_metric(name)} == expected_groups(kinds, 30)
    assert expected_groups(("density", "coverage", "overlap"), 30) <= steps[-1].keys()
    assert steps[-1]["mask/overlap"] == pytest.approx(1.0, abs=1e-6)
    assert steps[-1]["mask/coverage"] == pytest.approx(0.2, abs=0.002)


def test_tensorboard_gets_the_same_names(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    component = "torchtune.training.metric_logging.TensorBoardLogger"
    logger = {"_component_": component, "log_dir": str(tmp_path / "events"), "organize_logs": False}
    train(tmp_path / "out", gradient_mask=MASK, metric_logger=logger, max_steps_per_epoch=2)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    names = set(events.Tags()["tensors"])  # where the logger's scalars "of the new style" are
    assert {"loss", "mask/density", *expected_groups(("density", "threshold"), 2)} <= names
    assert [event.step for event in events.Tensors("mask_density_by_module/mlp.w1")] == [1, 2]


def test_the_files_beside_the_checkpoint_hold_every_tensor(smollm2_run):
    run = read_run(smollm2_run)
    assert {"loss", "val_loss", "lr", "grad_norm", "mask/density", "mask/overlap", "mask/coverage"} <= run.series.keys()
    assert not any(map(is_group_metric, run.series))
    assert run.series["val_loss"].steps == [3, 6]
    step, densities = run.details["density"][-1]
    assert step == 6 and len(densities) == 30 * len(MODULES)
    assert run.details["coverage"][-1][1].keys() == densities.keys()
    assert not any("tok_embeddings" in name for name in densities)  # frozen
    size = sum((smollm2_run / name).stat().st_size for name in ("run_log.jsonl", "mask_detail.jsonl"))
    assert size < 6 * 60_000


def test_a_resumed_run_tracks_and_logs_as_an_uninterrupted_one(train, tmp_path):
    how = {"gradient_mask": MASK, "track_selection_every_n_steps": 1, "save_every_n_steps": 2}
    whole = read_run(train(tmp_path / "whole", **how))
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", resumed)
    shutil.rmtree(resumed / "epoch_0")
    assert (resumed / "step_2").is_dir() and not (resumed / "step_4").exists()
    run = read_run(train(resumed, resume_from_checkpoint=True, **how))
    for name in ("loss", "mask/overlap", "mask/coverage", "mask/density"):
        assert run.series[name] == whole.series[name], name
    assert run.details == whole.details


@pytest.mark.slow
def test_several_ranks_speak_with_one_voice_and_count_as_one(train, tiny_config, run_tune, tmp_path):
    """Sharded over two processes: the same coverage and overlap, up to the order of sums, and each line once."""
    from omegaconf import OmegaConf

    how = {"gradient_mask": MASK, "track_selection_every_n_steps": 1, "max_steps_per_epoch": 4}
    whole = read_run(train(tmp_path / "one", **how))
    OmegaConf.save(OmegaConf.create(tiny_config(tmp_path / "two", **how, batch_size=2)), tmp_path / "two.yaml")
    process = run_tune(
        "run", "--nproc_per_node", 2, "gmt_full_finetune", "--config", tmp_path / "two.yaml", cwd=tmp_path, timeout=600
    )
    steps = re.findall(r"^epoch=1 step=(\d)/4 loss=", process.stdout, re.MULTILINE)
    assert steps == ["1", "2", "3", "4"]
    sharded = read_run(tmp_path / "two")
    for name in ("mask/coverage", "mask/overlap"):
        assert sharded.series[name].steps == whole.series[name].steps
        assert sharded.series[name].values == pytest.approx(whole.series[name].values, abs=0.02), name
    assert sharded.details["coverage"][-1][1] == pytest.approx(whole.details["coverage"][-1][1], abs=0.05)


def test_the_quickstart_ends_by_saying_where_its_report_is(quickstart_run):
    output = (quickstart_run / "stdout.txt").read_text()
    page = re.search(r"its report is (\S+report\.html)", output)[1]
    assert page == str(quickstart_run / "report.html")
    assert "<h1>Fine-tuning report: quickstart</h1>" in (quickstart_run / "report.html").read_text()


def test_a_report_that_fails_does_not_end_the_run(train, tmp_path, monkeypatch, caplog):
    import gmt_tune.reporting.report as report

    def broken(*_):
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(report, "build_figures", broken)
    train(tmp_path / "out", gradient_mask=MASK, max_steps_per_epoch=1, write_report=True)
    assert (tmp_path / "out" / "epoch_0").is_dir()
    assert "of all things" in caplog.text


def test_a_run_without_a_mask_has_a_report_too(train, tmp_path):
    train(tmp_path / "out", max_steps_per_epoch=1, write_report=True)
    assert "none: every entry is updated" in (tmp_path / "out" / "report.html").read_text()


def test_tracking_without_a_mask_is_refused_before_anything_is_loaded(tiny_config, tmp_path):
    from omegaconf import OmegaConf

    from gmt_tune.errors import UserError
    from gmt_tune.integrations.torchtune.config.check import check_config

    cfg = OmegaConf.create(tiny_config(tmp_path / "out", track_selection_every_n_steps=1))
    with pytest.raises(UserError, match="track_selection_every_n_steps is 1, but there is no gradient_mask"):
        check_config(cfg)
    cfg = OmegaConf.create(tiny_config(tmp_path / "out", gradient_mask=MASK, track_selection_every_n_steps=0))
    with pytest.raises(UserError, match="track_selection_every_n_steps must be a whole number from 1 on or null"):
        check_config(cfg)


def test_headers_name_their_format(smollm2_run):
    for name in ("run_log.jsonl", "mask_detail.jsonl"):
        header = json.loads((smollm2_run / name).read_text().splitlines()[0])
        assert header["format"] == "gmt-tune run log" and header["version"] == 1
