"""On which optimizers a mask acts, on which of their parameters, and what it does with a step's arguments."""

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from gmt_tune import GradientMask
from gmt_tune.masking.tracker import SelectionTracker


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))


def backward(model: nn.Module) -> torch.Tensor:
    loss = model(torch.randn(8, 20, generator=torch.Generator().manual_seed(1))).square().mean()
    loss.backward()
    return loss.detach()


def kept(p: torch.Tensor) -> float:
    return (p.grad != 0).float().mean().item()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


# ------------------------------------------------------------------ once


def test_a_mask_is_registered_once_on_an_optimizer():
    model = make_model()
    optimizer = sgd(model)
    mask = GradientMask(model.named_parameters(), density=0.2)
    handle = mask.register(optimizer)
    with pytest.raises(ValueError, match="this mask is registered on the SGD already.*remove"):
        mask.register(optimizer)
    handle.remove()  # as the message says
    mask.register(optimizer)
    backward(model)
    optimizer.step()
    assert mask.step == 1


def test_a_second_mask_on_an_optimizer_is_refused():
    model = make_model()
    optimizer = sgd(model)
    GradientMask(model.named_parameters(), density=0.2, score="random").register(optimizer)
    with pytest.raises(
        ValueError, match="another gradient mask of the same parameters is registered on the SGD already"
    ):
        GradientMask(model.named_parameters(), density=0.5).register(optimizer)


def test_two_masks_of_different_parameters_share_an_optimizer():
    model = make_model()
    optimizer = sgd(model)
    GradientMask(model.named_parameters(), density=0.1, dense=["2.*"]).register(optimizer)
    GradientMask(model.named_parameters(), density=0.5, dense=["0.*"]).register(optimizer)
    backward(model)
    optimizer.step()
    assert kept(model[0].weight) == pytest.approx(0.1) and kept(model[2].weight) == pytest.approx(0.5)


def test_a_mask_and_its_handle_can_be_copied_and_pickled():
    model = make_model()
    optimizer = sgd(model)
    mask = GradientMask(model.named_parameters(), density=0.2, refresh_every=None)
    handle = mask.register(optimizer)
    backward(model)
    optimizer.step()
    assert isinstance(handle.id, int)
    copy.deepcopy(handle)
    pickle.loads(pickle.dumps(mask))
    other, copied = copy.deepcopy((model, mask))
    for p, own in zip(other.parameters(), model.parameters(), strict=True):
        p.grad = torch.ones_like(p)
        own.grad = torch.ones_like(own)
    copied.mask_grads_()  # it is registered nowhere
    optimizer.step()
    for p, own in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, own.grad)


def test_masking_by_hand_beside_the_hook_is_refused():
    model = make_model()
    mask = GradientMask(model.named_parameters(), density=0.2, score="random")
    handle = mask.register(sgd_ := sgd(model))
    backward(model)
    with pytest.raises(RuntimeError, match=r"do not call mask_grads_\(\) as well"):
        mask.mask_grads_()
    handle.remove()
    mask.mask_grads_()
    assert mask.step == 1 and sgd_ is not None


def test_a_tracker_watches_an_optimizer_once():
    model = make_model()
    optimizer = sgd(model)
    mask = GradientMask(model.named_parameters(), density=0.2)
    mask.register(optimizer)
    tracker = SelectionTracker(mask)
    tracker.register(optimizer)
    with pytest.raises(ValueError, match="watches the SGD already"):
        tracker.register(optimizer)


# ------------------------------------------------------------------ parameters


def test_an_embedding_resized_after_the_mask_was_made_is_refused_at_register():
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 5))
    mask = GradientMask(model.named_parameters(), density=0.1)
    model[0] = nn.Embedding(14, 6)
    with pytest.raises(ValueError, match=r"does not know \(parameter 0 of group 0, shape \(14, 6\)\): make the mask"):
        mask.register(sgd(model))


def test_an_unknown_parameter_is_named_where_the_optimizer_knows_its_name():
    model = make_model()
    mask = GradientMask(model.named_parameters(), density=0.1)
    model[2] = nn.Linear(30, 3)
    with pytest.raises(ValueError, match=r"parameter '2\.weight'; '2\.bias'\)"):
        mask.register(torch.optim.SGD(model.named_parameters(), lr=0.1))


def test_a_parameter_added_to_the_optimizer_later_is_refused_before_any_weight_changes():
    model = make_model()
    optimizer = sgd(model)
    GradientMask(model.named_parameters(), density=0.1).register(optimizer)
    added = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [added]})
    before = copy.deepcopy(model.state_dict())
    backward(model)
    added.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"parameter 0 of group 1, shape \(3,\)"):
        optimizer.step()
    assert len(before) == 4 and all(torch.equal(before[name], w) for name, w in model.state_dict().items())


def test_parameters_beside_the_model_are_updated_in_full_where_their_group_says_so():
    model, temperature = make_model(), nn.Parameter(torch.ones(2))
    groups = [{"params": model.parameters()}, {"params": [temperature], "gradient_mask": False}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    GradientMask(model.named_parameters(), density=0.1).register(optimizer)
    backward(model)
    temperature.grad = torch.ones(2)
    optimizer.step()
    assert temperature.tolist() == pytest.approx([0.9, 0.9]) and kept(model[0].weight) == pytest.approx(0.1)


def test_a_state_from_before_a_layer_was_unfrozen_loads_after_it():
    model = make_model()
    model[0].requires_grad_(False)
    mask = GradientMask(model.named_parameters(), density=0.1)
    backward(model)
    mask.mask_grads_()
    other = GradientMask(make_model().named_parameters(), density=0.1)
    other.load_state_dict(mask.state_dict())
    assert other.state_dict()["steps"] == {"0.weight": 0, "0.bias": 0, "2.weight": 1, "2.bias": 1}


def test_a_sparse_gradient_of_a_dense_parameter_is_looked_at():
    for dtype in (torch.float32, torch.float16):
        model = nn.Sequential(nn.Embedding(10, 4, sparse=True, dtype=dtype), nn.Linear(4, 3, dtype=dtype))
        mask = GradientMask(model.named_parameters(), density=0.5, dense=["0.*"])
        model(torch.tensor([1, 2])).sum().backward()
        mask.mask_grads_()
        model[0].weight.grad._values()[0, 0] = float("nan")
        with pytest.raises(RuntimeError, match=r"'0\.weight' holds NaN"):
            mask.mask_grads_()


def test_what_the_optimizer_holds_and_does_not_train_is_no_concern():
    model = make_model()
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = torch.optim.SGD([*model.parameters(), frozen], lr=0.1)
    GradientMask(model.named_parameters(), density=0.1).register(optimizer)
    backward(model)
    optimizer.step()


@pytest.mark.parametrize("how", ["held from the beginning", "added as a group"])
def test_a_layer_that_is_unfrozen_later_is_masked_from_then_on(how):
    model = make_model()
    model[0].requires_grad_(False)
    mask = GradientMask(model.named_parameters(), density=0.1)
    held = model.parameters() if how == "held from the beginning" else model[2].parameters()
    optimizer = torch.optim.SGD(held, lr=0.1)
    mask.register(optimizer)
    backward(model)
    optimizer.step()
    assert mask.masked_parameters.keys() == {"2.weight", "2.bias"}
    model[0].requires_grad_(True)
    if how == "added as a group":
        optimizer.add_param_group({"params": list(model[0].parameters())})
    backward(model)
    optimizer.step()
    assert kept(model[0].weight) == pytest.approx(0.1) and mask.step == 2
    assert mask.statistics.numel.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}

    other = make_model()
    other[0].requires_grad_(False)
    resumed = GradientMask(other.named_parameters(), density=0.1)
    resumed.load_state_dict(mask.state_dict())  # that of a mask which the layer joined
    assert resumed.state_dict()["steps"] == {"2.weight": 2, "2.bias": 2, "0.weight": 1, "0.bias": 1}


def test_a_frozen_parameter_that_requires_gradients_again_is_refused():
    model = make_model()
    optimizer = sgd(model)
    GradientMask(model.named_parameters(), density=0.1, frozen=["0.*"]).register(optimizer)
    model[0].requires_grad_(True)
    backward(model)
    with pytest.raises(ValueError, match=r"'0\.weight' is frozen in the gradient mask and requires gradients again"):
        optimizer.step()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_a_dense_parameters_nonfinite_gradient_is_an_error_before_anything_changes(bad, score):
    model = make_model()
    optimizer = sgd(model)
    GradientMask(model.named_parameters(), density=0.2, score=score, dense=["2.*"]).register(optimizer)
    before = copy.deepcopy(model.state_dict())
    backward(model)
    model[2].bias.grad[3] = bad
    with pytest.raises(RuntimeError, match=r"'2\.bias' holds NaN or infinity at optimizer step 1"):
        optimizer.step()
    assert len(before) == 4 and all(torch.equal(before[name], w) for name, w in model.state_dict().items())


# ------------------------------------------------------------------ wrapped optimizers


def test_an_optimizer_that_accelerate_prepared_is_masked():
    model = make_model()
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, sgd(model))
    mask = GradientMask(model.named_parameters(), density=0.1)
    mask.register(optimizer)
    with pytest.raises(ValueError, match="registered on the SGD already"):
        mask.register(optimizer.optimizer)
    backward(model)
    optimizer.step()
    assert kept(model[0].weight) == pytest.approx(0.1) and mask.step == 1


class HoldsAnother(torch.optim.Optimizer):
    """An optimizer around another one that neither calls Optimizer's constructor nor says ``optimizer``."""

    def __init__(self, base):
        self.base = base


class HasNoHooks(torch.optim.Optimizer):
    def __init__(self, parameters):
        self.param_groups = [{"params": list(parameters)}]


def test_an_optimizer_without_hooks_is_refused_with_the_way_out():
    model = make_model()
    mask = GradientMask(model.named_parameters(), density=0.1)
    with pytest.raises(TypeError, match=r"HoldsAnother runs no step hooks: .*register\(optimizer\.base\)"):
        mask.register(HoldsAnother(sgd(model)))
    holder = type("Wrapper", (), {})()
    holder.base = sgd(model)
    with pytest.raises(TypeError, match=r"Wrapper runs no step hooks: .*register\(optimizer\.base\)"):
        mask.register(holder)
    with pytest.raises(TypeError, match=r"HasNoHooks runs no step hooks, .*call mask_grads_\(\) before its step"):
        mask.register(HasNoHooks(model.parameters()))


def test_scope_global_names_a_masked_parameter_that_the_optimizer_lacks():
    model = make_model()
    mask = GradientMask(model.named_parameters(), density=0.2, scope="global")
    with pytest.raises(ValueError, match=r"this one lacks '0\.bias' \(3 in all\): .*use scope 'tensor'"):
        mask.register(torch.optim.SGD([model[0].weight], lr=0.1))


# ------------------------------------------------------------------ arguments of a step


class TakesMore(torch.optim.SGD):
    """An optimizer whose step has further arguments."""

    def step(self, closure=None, factor=1.0, *, offset=0.0):
        self.got = (factor, offset)
        if closure is not None:
            return super().step(lambda: closure(backward=True))
        return super().step()


def test_a_step_that_calls_its_base_classs_step_is_one_step():
    """PyTorch runs hooks for both, once an optimizer of the base class has been made."""
    model = make_model()
    sgd(model)
    optimizer = TakesMore(model.parameters(), lr=0.0)
    mask = GradientMask(model.named_parameters(), density=0.3, score="random")
    mask.register(optimizer)
    tracker = SelectionTracker(mask)
    tracker.register(optimizer)
    backward(model)
    optimizer.step()
    assert kept(model[0].weight) == pytest.approx(0.3, abs=0.05)
    assert mask.step == 1 and tracker.state_dict()["calls"]["0.weight"] == 1


class HasScale(torch.optim.Optimizer):
    """An optimizer with an attribute that is called as GradScaler calls its scale, and is none."""

    grad_scale = 1.0

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        return None


def test_an_optimizers_own_number_called_grad_scale_is_no_gradscalers():
    model = make_model()
    optimizer = HasScale(model.parameters())
    GradientMask(model.named_parameters(), density=0.1).register(optimizer)
    backward(model)
    optimizer.step()
    assert kept(model[0].weight) == pytest.approx(0.1)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_steps_further_arguments_reach_it(by_keyword):
    model = make_model()
    optimizer = TakesMore(model.parameters(), lr=0.1)
    mask = GradientMask(model.named_parameters(), density=0.1)
    mask.register(optimizer)

    def closure(backward):
        return globals()["backward"](model) if backward else None

    if by_keyword:
        loss = optimizer.step(factor=3.0, offset=1.0, closure=closure)
    else:
        loss = optimizer.step(closure, 3.0, offset=1.0)
    assert optimizer.got == (3.0, 1.0) and loss > 0
    assert kept(model[0].weight) == pytest.approx(0.1)
    optimizer.step(None, 4.0)
    assert optimizer.got == (4.0, 0.0) and mask.step == 2


def test_a_closure_that_is_called_once_costs_no_bits():
    model = make_model()
    optimizer = sgd(model)
    mask = GradientMask(model.named_parameters(), density=0.1)
    mask.register(optimizer)
    optimizer.step(lambda: backward(model))
    assert mask._selections == {} and mask.step == 1


@pytest.mark.parametrize("refresh_every", [1, 2, None])
@pytest.mark.parametrize("score", ["magnitude", "saliency", "random"])
def test_a_closure_that_is_called_several_times_is_one_step_with_one_selection(score, refresh_every):
    model = make_model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")
    mask = GradientMask(model.named_parameters(), density=0.1, score=score, refresh_every=refresh_every)
    mask.register(optimizer)
    tracker = SelectionTracker(mask)
    tracker.register(optimizer)
    selections: list[list[torch.Tensor]] = []

    def closure():
        if selections and model[0].weight.grad is not None:
            selections[-1].append(model[0].weight.grad != 0)
        optimizer.zero_grad()
        return backward(model)

    for _ in range(3):
        optimizer.zero_grad()
        selections.append([])
        optimizer.step(closure)
        selections[-1].append(model[0].weight.grad != 0)
        assert len(selections[-1]) > 1, "the closure was called once: this tests nothing"
        assert not any((later & ~selections[-1][0]).any() for later in selections[-1])
    assert mask.step == 3
    assert tracker.state_dict()["calls"]["0.weight"] == 3
    moved = [not torch.equal(a[0], b[0]) for a, b in zip(selections, selections[1:], strict=False)]
    # random keeps exactly its draw; a gradient's ranking may choose the same entries again
    if score == "random":
        assert moved == {1: [True, True], 2: [False, True], None: [False, False]}[refresh_every]
    assert bool(mask.state_dict()["selections"]) == (refresh_every != 1 and score != "random")


def test_what_mask_grads_returned_is_not_changed_by_later_steps():
    model = make_model()
    mask = GradientMask(model.named_parameters(), density=0.2)
    backward(model)
    first = mask.mask_grads_()
    kept_then = {name: int(count) for name, count in first.selected.items()}
    thresholds = {name: float(t) for name, t in first.thresholds.items()}
    model.zero_grad()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model[2].bias.grad = None
    second = mask.mask_grads_()
    assert kept_then == {name: int(count) for name, count in first.selected.items()} and len(kept_then) == 4
    assert thresholds == {name: float(t) for name, t in first.thresholds.items()}
    assert second.density == 0 and "2.bias" not in second.selected


# ------------------------------------------------------------------ gradients that carry a loss scale


@pytest.mark.parametrize("score", ["magnitude", "saliency", "own"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_thresholds_are_those_of_the_unscaled_gradient_whoever_unscales_it(score, scope):
    class GradientAndWeight(GradientMask):
        """A score that a scaled gradient would change."""

        def compute_score(self, name, parameter, grad):
            return grad.abs() + 0.01 * parameter.detach().abs()

    found = []
    for fused in (False, True):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        mask_class = GradientAndWeight if score == "own" else GradientMask
        mask = mask_class(
            model.named_parameters(), density=0.2, scope=scope, score="magnitude" if score == "own" else score
        )
        mask.register(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
        loss = model(torch.randn(8, 20, generator=torch.Generator().manual_seed(1))).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append((mask.statistics.thresholds, [p.grad != 0 for p in model.parameters()]))
    assert len(found[0][0]) == 4
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=0)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(a, b)


def test_a_score_of_ones_own_is_not_rounded_to_zero_in_float16():
    class Own(GradientMask):
        def compute_score(self, name, parameter, grad):
            return grad

    torch.manual_seed(0)
    model = nn.Linear(400, 50).half()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    mask = Own(model.named_parameters(), density=0.1)
    mask.register(optimizer)
    for p in model.parameters():
        p.grad = (torch.randn(p.shape) * 1e-2).half()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(65536.0), torch.tensor(0.0)
    wanted = model.weight.grad.abs().float()
    wanted = wanted >= wanted.flatten().sort(descending=True).values[2000 - 1]
    optimizer.step()
    assert torch.equal(model.weight.grad != 0, wanted)


@pytest.mark.parametrize("refresh_every", [3, None])
def test_a_selection_that_is_kept_shows_its_threshold_at_every_step(refresh_every):
    model = make_model()
    mask = GradientMask(model.named_parameters(), density=0.2, refresh_every=refresh_every)
    found = []
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        found.append(mask.mask_grads_().thresholds)
    assert len(found[0]) == 4 and found[1] == found[2] == found[0]
    assert "mask/threshold_median" in mask.metrics()
