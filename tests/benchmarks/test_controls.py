"""Each control trains as a few lines of plain torch do."""

import pytest
import torch

from benchmarks.quality import reasons, results
from benchmarks.quality.after_step_masks import ScaledUpdateMask, SparseAdamMask, UpdateMask
from benchmarks.quality.experiment import Run, load_method, load_suite
from benchmarks.quality.one_age import OneAgeAdamW
from gmt_tune import CompactAdamW, GradientMask
from gmt_tune.reporting.drawing import to_png

_LR, _BETA1, _BETA2, _EPS = 0.01, 0.9, 0.999, 1e-8
_STEPS, _DENSITY = 7, 0.25


def _gradient(step: int) -> torch.Tensor:
    return torch.randn(12, 10, generator=torch.Generator().manual_seed(step))


def _start() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(10, 12, bias=False)


def _train(mask_class, optimizer_class, every: int, steps=range(_STEPS), resumed=None):
    """Train; returns the model, and the states of it, the mask and the optimizer."""
    model = _start()
    optimizer = optimizer_class(model.parameters(), lr=_LR, weight_decay=0.0)
    mask = mask_class(model.named_parameters(), density=_DENSITY, refresh_every=every)
    if resumed is not None:
        for part, state in zip((model, mask, optimizer), resumed, strict=True):
            part.load_state_dict(state)
    mask.register(optimizer)
    for step in steps:
        (model.weight * _gradient(step)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, [part.state_dict() for part in (model, mask, optimizer)]


def _selections(every: int):
    """By step, which entries are selected: the largest of the gradient, at every so many steps."""
    for step in range(_STEPS):
        gradient = _gradient(step)
        if step % every == 0:
            selected = gradient.abs() >= gradient.abs().flatten().topk(30).values[-1]
        yield step, gradient, selected


def _update(m, v, step):
    corrected = m / (1 - _BETA1**step), v / (1 - _BETA2**step)
    return -_LR * corrected[0] / (corrected[1].sqrt() + _EPS)


@pytest.mark.parametrize("every", [1, 3])
def test_sparse_adam_mask_leaves_weights_and_moments_of_unselected_entries_alone(every):
    weight = _start().weight.detach().clone()
    m, v = torch.zeros(2, 12, 10)
    for step, g, selected in _selections(every):
        m = torch.where(selected, _BETA1 * m + (1 - _BETA1) * g, m)
        v = torch.where(selected, _BETA2 * v + (1 - _BETA2) * g**2, v)
        weight = torch.where(selected, weight + _update(m, v, step + 1), weight)
    model, _ = _train(SparseAdamMask, torch.optim.AdamW, every)
    torch.testing.assert_close(model.weight, weight)


def test_sparse_adam_mask_refreshed_at_every_step_is_torchs_sparse_adam():
    model = _start()
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=_LR)
    for _, g, selected in _selections(1):
        model.weight.grad = (g * selected).to_sparse()
        optimizer.step()
    masked, _ = _train(SparseAdamMask, torch.optim.AdamW, 1)
    torch.testing.assert_close(masked.weight, model.weight)


@pytest.mark.parametrize(("mask_class", "scale"), [(UpdateMask, 1.0), (ScaledUpdateMask, 4.0)])
@pytest.mark.parametrize("every", [1, 3])
def test_update_mask_applies_selected_entries_of_adams_update(mask_class, scale, every):
    weight = _start().weight.detach().clone()
    m, v = torch.zeros(2, 12, 10)
    for step, g, selected in _selections(every):
        m, v = _BETA1 * m + (1 - _BETA1) * g, _BETA2 * v + (1 - _BETA2) * g**2
        weight += scale * selected * _update(m, v, step + 1)
    model, _ = _train(mask_class, torch.optim.AdamW, every)
    torch.testing.assert_close(model.weight, weight)


@pytest.mark.parametrize("every", [1, 3])
def test_one_age_corrects_new_entries_by_the_tensors_steps(every):
    weight = _start().weight.detach().clone()
    m, v, before = *torch.zeros(2, 12, 10), torch.ones(12, 10, dtype=torch.bool)
    for step, g, selected in _selections(every):
        m, v = m * (before & selected), v * (before & selected)  # those that left begin at zero when they come back
        m = torch.where(selected, _BETA1 * m + (1 - _BETA1) * g, m)
        v = torch.where(selected, _BETA2 * v + (1 - _BETA2) * g**2, v)
        weight = torch.where(selected, weight + _update(m, v, step + 1), weight)
        before = selected
    model, _ = _train(GradientMask, OneAgeAdamW, every)
    torch.testing.assert_close(model.weight, weight)
    assert not torch.allclose(model.weight, _train(GradientMask, CompactAdamW, every)[0].weight)


@pytest.mark.parametrize(
    ("mask_class", "optimizer_class"),
    [
        (SparseAdamMask, torch.optim.AdamW),
        (UpdateMask, torch.optim.AdamW),
        (ScaledUpdateMask, torch.optim.AdamW),
        (GradientMask, OneAgeAdamW),
    ],
)
def test_resumed_training_ends_as_uninterrupted_training(mask_class, optimizer_class):
    whole, _ = _train(mask_class, optimizer_class, 3)
    _, state = _train(mask_class, optimizer_class, 3, range(4))
    resumed, _ = _train(mask_class, optimizer_class, 3, range(4, _STEPS), state)
    assert torch.equal(resumed.weight, whole.weight)


def test_another_optimizer_than_adamw_is_refused():
    model = _start()
    mask = UpdateMask(model.named_parameters(), density=_DENSITY)
    with pytest.raises(TypeError, match=r"UpdateMask needs torch\.optim\.AdamW, got SGD"):
        mask.register(torch.optim.SGD(model.parameters(), lr=_LR))


def test_removing_the_handle_ends_masking_and_restoring():
    model = _start()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=0.0)
    mask = UpdateMask(model.named_parameters(), density=_DENSITY)
    mask.register(optimizer).remove()
    before = model.weight.detach().clone()
    model.weight.grad = _gradient(0)
    optimizer.step()
    assert (model.weight != before).all()


def _write_results(suite: str, method: str, accuracies: list[float]) -> None:
    """Runs that choose 2e-3, and measured ones of seeds 0, 1, ... with these accuracies."""
    runs = [Run(load_suite(suite), load_method(method), rate, 100, "choose") for rate in (1e-3, 2e-3, 3e-3)]
    for run, loss in zip(runs, (0.3, 0.1, 0.2), strict=True):
        results.write(run.name, {"key": run.key(), "failed": None, "losses": {"validation": loss}})
    for seed, accuracy in enumerate(accuracies):
        run = Run(load_suite(suite), load_method(method), 2e-3, seed, "measure")
        numbers = {"losses": {"test": 0.5}, "texts": {"text": 2.0}, "change": {"fraction_changed": 1.0}}
        results.write(run.name, {"key": run.key(), "failed": None, "accuracy": accuracy, **numbers})


def test_page_of_reasons_has_means_and_paired_differences_with_their_intervals(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RUNS", tmp_path)
    assert reasons.build() == ("", [])
    results.write("village_ample/base/measure_lr0_seed0", {"key": "any", "texts": {"text": 1.5}})
    _write_results("village_ample", "sft", [0.5, 0.6, 0.7])
    _write_results("village_ample", "sft_beta2_0.95", [0.6, 0.7, 0.8, 0.9])
    text, (figure,) = reasons.build()
    # t of 2 degrees of freedom is 4.303, the standard deviation of 50, 60 and 70 is 10
    assert "| full fine-tuning (SFT) | 0.002 | 3 | 60.0 ± 24.8 | 0.500 ± 0.000 | 0.500 ± 0.000 | 100 ± 0 |" in text
    assert "| `sft_beta2_0.95` - `sft` | **+10.0 [+10.0, +10.0]** | +0.000" in text
    assert "There are 3 of them" in text and ": 1 leave out zero" in text
    assert "SFT 60.0% and 0.50" in figure.alt and "SFT, beta2 0.95 75.0% and 0.50" in figure.alt
    assert to_png(figure, tmp_path).stat().st_size > 10_000
