"""What reaches the metric loggers: groups as sums give them."""

import math

import pytest
from masking.test_tracker import Loop

from gmt_tune.reporting.mask_metrics import MaskMetrics, group_metrics, is_group_metric


def test_groups_are_what_counting_gives():
    loop = Loop(density=0.3, scope="global")
    loop.step(0)
    metrics = MaskMetrics(loop.mask, loop.tracker)
    groups = metrics.by_group(metrics.detail())
    selected = {name: sum(1 for entry in loop.selected[0] if entry[0] == name) for name in loop.mask.masked_parameters}
    numel = {name: p.numel() for name, p in loop.mask.masked_parameters.items()}
    in_layer = [name for name in numel if name.startswith("layers.2.")]
    of_module = [name for name in numel if name.endswith("attn.weight")]
    for group, names in (
        ("mask_density_by_layer/layer_02", in_layer),
        ("mask_density_by_module/attn", of_module),
        ("mask_density_by_module/tok_embeddings", ["tok_embeddings.weight"]),
    ):
        expected = sum(selected[name] for name in names) / sum(numel[name] for name in names)
        assert groups[group] == pytest.approx(expected, rel=1e-6), group
    assert groups["mask_coverage_by_module/attn"] == groups["mask_density_by_module/attn"]  # of the only step
    assert not any("threshold" in name for name in groups)  # one for all: mask/threshold_median
    assert all(is_group_metric(name) and is_group_metric(f"train_{name}") for name in groups)
    assert not any(map(is_group_metric, loop.mask.metrics()))
    assert metrics.by_group({}) == {}


def test_thresholds_of_a_group_are_their_median():
    thresholds = {f"layers.{i}.attn.weight": value for i, value in enumerate([0.1, 0.4, 0.2])}
    groups = group_metrics({"threshold": thresholds}, dict.fromkeys(thresholds, 8))
    assert groups["mask_threshold_by_module/attn"] == 0.2
    assert groups["mask_threshold_by_layer/layer_01"] == 0.4


def test_layers_sort_by_name_however_many_there_are():
    names = [f"layers.{i}.w.weight" for i in range(126)]
    groups = group_metrics({"density": dict.fromkeys(names, 0.2)}, dict.fromkeys(names, 8))
    layers = [name for name in groups if "by_layer" in name]
    assert layers == sorted(layers) and layers[-1].endswith("layer_125")


def test_density_one_and_steps_without_gradient_are_reported_as_they_are():
    loop = Loop(density=1.0)
    metrics = MaskMetrics(loop.mask, loop.tracker)
    assert metrics.totals() == {} and metrics.by_group(metrics.detail()) == {}
    loop.step(0)
    groups = metrics.by_group(metrics.detail())
    assert {value for name, value in groups.items() if "density" in name} == {1.0}
    assert not math.isnan(sum(metrics.totals().values()))
