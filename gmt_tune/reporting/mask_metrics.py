"""What a mask did, in all the detail that is logged: over the model, by module and by layer, and by parameter."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gmt_tune.reporting.parameter_names import split_name

if TYPE_CHECKING:
    from gmt_tune.masking import GradientMask
    from gmt_tune.masking.tracker import SelectionTracker

_GROUPED = ("density", "threshold", "overlap", "coverage")


class MaskMetrics:
    """Numbers of a mask's last step, and of the tracker that is registered behind it, if there is one."""

    def __init__(self, mask: GradientMask, tracker: SelectionTracker | None = None) -> None:
        self._mask = mask
        self._tracker = tracker

    def totals(self) -> dict[str, float]:
        """Over the whole model, such as ``mask/density``; waits for the device."""
        return self._mask.metrics() | (self._tracker.metrics() if self._tracker is not None else {})

    def detail(self) -> dict[str, dict[str, float]]:
        """By parameter: kind (of ``_GROUPED``) to ``{parameter: number}``; waits for the device."""
        numel, numbers = self._mask.statistics.numel, self._mask.statistics.read()
        density = {name: count / numel[name] for name, count in numbers.selected.items() if numel[name]}
        of_mask = {"density": density, "threshold": numbers.thresholds}
        return of_mask | (self._tracker.detail() if self._tracker is not None else {})

    def by_group(self, detail: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """By module and by layer, for a metric logger, what :meth:`detail` gave; empty where nothing was due."""
        return group_metrics(detail, self._mask.statistics.numel) if detail else {}


def group_metrics(detail: Mapping[str, Mapping[str, float]], numel: Mapping[str, int]) -> dict[str, float]:
    """Numbers by parameter, summed up by module (over the layers) and by layer (over its modules).

    What comes before the slash is what TensorBoard, W&B and Comet make a section of: a section holds one kind of
    number, and its charts sort by module or by layer.

    Returns ``mask_density_by_module/attn.q_proj``, ``mask_density_by_layer/layer_03`` and so on: for fractions the mean
    over the group's entries, for thresholds the median over its tensors. A parameter outside the layers is a module of
    its own. Thresholds that are all equal (scope "global") are left out: ``mask/threshold_*`` says as much.
    """
    metrics: dict[str, float] = {}
    for kind in _GROUPED:
        numbers = detail.get(kind, {})
        if kind == "threshold" and len(set(numbers.values())) == 1 and len(numbers) > 1:
            continue
        modules: dict[str, list[str]] = {}
        layers: dict[int, list[str]] = {}
        for name in numbers:
            layer, module = split_name(name)
            modules.setdefault(module, []).append(name)
            if layer is not None:
                layers.setdefault(layer, []).append(name)
        digits = max(2, len(str(max(layers, default=0))))
        groups = {f"mask_{kind}_by_module/{module}": names for module, names in modules.items()}
        groups |= {f"mask_{kind}_by_layer/layer_{i:0{digits}d}": names for i, names in sorted(layers.items())}
        for group, names in groups.items():
            if kind == "threshold":
                metrics[group] = statistics.median(numbers[name] for name in names)
            else:
                entries = sum(numel[name] for name in names)
                metrics[group] = sum(numbers[name] * numel[name] for name in names) / entries if entries else 0.0
    return metrics


def for_a_line(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without the numbers that only a chart has room for: those of groups, the smallest and the largest threshold."""
    return {
        name: value
        for name, value in metrics.items()
        if name not in ("mask/threshold_min", "mask/threshold_max") and not is_group_metric(name)
    }


def is_group_metric(name: str) -> bool:
    """Whether a metric is one of :func:`group_metrics`, which a report draws by parameter instead."""
    section = name.partition("/")[0].removeprefix("train_")
    return any(section in (f"mask_{kind}_by_module", f"mask_{kind}_by_layer") for kind in _GROUPED)
