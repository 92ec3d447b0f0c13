"""The mask as an object: what it selects, on which optimizers, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from gmt_tune import GradientMask


def full_sort_selection(score: torch.Tensor, density: float) -> torch.Tensor:
    """The independent answer: sort all magnitudes, take the k-th, keep what is not below it."""
    magnitude = score.detach().double().abs()
    k = max(1, int(density * magnitude.numel()))
    threshold = magnitude.flatten().sort(descending=True).values[k - 1]
    return (magnitude >= threshold) & (magnitude > 0)


def make_model(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(50, 24), nn.Linear(24, 31), nn.LayerNorm(31), nn.ReLU(), nn.Linear(31, 7, bias=False)
    ).to(dtype)


def backward(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 30, (6, 5), generator=generator)
    model(tokens).float().square().mean().backward()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", ["magnitude", "saliency"])
def test_sgd_changes_exactly_the_entries_that_a_full_sort_selects(dtype, score):
    model = make_model(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e3)
    GradientMask(model.named_parameters(), density=0.2, score=score).register(optimizer)
    before = copy.deepcopy(model)
    backward(model)
    grads = gradients(model)
    optimizer.step()
    for (name, p), old in zip(model.named_parameters(), before.parameters(), strict=True):
        ranked = grads[name] if score == "magnitude" else grads[name] * old.detach()
        assert torch.equal(p != old, full_sort_selection(ranked, 0.2)), name


def test_scope_global_takes_one_threshold_for_all_tensors():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    mask = GradientMask(model.named_parameters(), density=0.1, scope="global")
    mask.register(optimizer)
    backward(model)
    grads = gradients(model)
    optimizer.step()
    wanted = full_sort_selection(torch.cat([g.flatten() for g in grads.values()]), 0.1)
    kept = torch.cat([p.grad.flatten() != 0 for p in model.parameters()])
    assert torch.equal(kept, wanted)
    assert len({t.item() for t in mask.statistics.thresholds.values()}) == 1


def test_dense_parameters_are_updated_in_full_and_frozen_ones_not_at_all():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    GradientMask(model.named_parameters(), density=0.2, dense=["2.*"], frozen=["1.*"]).register(optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(model)
    norm_grad = model[2].weight.grad.clone()
    optimizer.step()
    assert torch.equal(model[2].weight.grad, norm_grad)
    assert torch.equal(model[1].weight, before["1.weight"]) and torch.equal(model[1].bias, before["1.bias"])
    assert not model[1].weight.requires_grad


def test_density_one_changes_no_bit_of_any_gradient():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    mask = GradientMask(model.named_parameters(), density=1.0)
    mask.register(optimizer)
    backward(model)
    model[4].weight.grad[0, :3] = torch.tensor([0.0, -0.0, 1e-45])
    grads = gradients(model)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad.view(torch.int32), grads[name].view(torch.int32)), name
    assert mask.metrics()["mask/density"] == 1.0


@pytest.mark.parametrize("score", ["magnitude", "random"])
@pytest.mark.parametrize("refresh_every, new_at", [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3]), (None, [0])])
def test_selection_is_renewed_every_n_steps_and_kept_in_between(score, refresh_every, new_at):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    mask = GradientMask(model.named_parameters(), density=0.3, refresh_every=refresh_every, score=score)
    mask.register(optimizer)
    selections = []
    for _ in range(4):
        # Noise without zeros: what stays non-zero is the selection itself
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        selections.append(torch.cat([p.grad.flatten() != 0 for p in model.parameters()]))
    for step in range(1, 4):
        assert torch.equal(selections[step], selections[step - 1]) == (step not in new_at), step
    assert mask.step == 4


def test_kept_selection_costs_one_bit_per_entry():
    model = make_model()
    mask = GradientMask(model.named_parameters(), density=0.3, refresh_every=10)
    backward(model)
    mask.mask_grads_()
    stored = sum(bits.numel() * bits.element_size() for bits in mask.state_dict()["selections"].values())
    assert stored == sum((p.numel() + 7) // 8 for p in model.parameters())


def test_nothing_is_kept_between_steps_when_every_step_selects_anew():
    model = make_model()
    mask = GradientMask(model.named_parameters(), density=0.3)
    backward(model)
    mask.mask_grads_()
    assert mask.state_dict()["selections"] == {}


@pytest.mark.parametrize("score", ["magnitude", "random"])
@pytest.mark.parametrize("refresh_every", [1, 4, None])
def test_a_mask_restored_from_its_state_selects_as_if_never_interrupted(score, refresh_every):
    def make(model):
        mask = GradientMask(model.named_parameters(), density=0.2, score=score, refresh_every=refresh_every, seed=7)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        mask.register(optimizer)
        return mask, optimizer

    def steps(model, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            backward(model, seed)
            optimizer.step()

    straight = make_model()
    _, optimizer = make(straight)
    steps(straight, optimizer, range(6))

    first = make_model()
    mask, optimizer = make(first)
    steps(first, optimizer, range(3))
    resumed = copy.deepcopy(first)
    new_mask, new_optimizer = make(resumed)
    new_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    new_mask.load_state_dict(copy.deepcopy(mask.state_dict()))
    steps(resumed, new_optimizer, range(3, 6))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_policy_is_refused_and_says_what_differs():
    model = make_model()
    state = GradientMask(model.named_parameters(), density=0.2).state_dict()
    with pytest.raises(ValueError, match=r"density is 0\.5, was 0\.2"):
        GradientMask(model.named_parameters(), density=0.5).load_state_dict(state)


def test_state_of_another_model_is_refused():
    state = GradientMask(make_model().named_parameters(), density=0.2).state_dict()
    with pytest.raises(ValueError, match="saved for other parameters"):
        GradientMask(nn.Linear(3, 3).named_parameters(), density=0.2).load_state_dict(state)


def test_one_optimizer_per_parameter_masks_as_one_for_all():
    together, apart = make_model(), make_model()
    mask = GradientMask(together.named_parameters(), density=0.2)
    optimizer = torch.optim.SGD(together.parameters(), lr=1.0)
    mask.register(optimizer)
    apart_mask = GradientMask(apart.named_parameters(), density=0.2)
    optimizers = {p: torch.optim.SGD([p], lr=1.0) for p in apart.parameters()}

    def step_in_backward(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p, single in optimizers.items():
        apart_mask.register(single)
        p.register_post_accumulate_grad_hook(step_in_backward)
    for seed in range(3):
        backward(together, seed)
        optimizer.step()
        optimizer.zero_grad()
        backward(apart, seed)
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.equal(a, b)
    assert mask.step == apart_mask.step == 3
    assert mask.metrics()["mask/density"] == apart_mask.metrics()["mask/density"]


def test_closure_is_masked_behind_its_backward():
    with_closure, plain = make_model(), make_model()
    optimizers = []
    for model in (with_closure, plain):
        optimizers.append(torch.optim.Adam(model.parameters(), lr=0.1))
        GradientMask(model.named_parameters(), density=0.2).register(optimizers[-1])

    def closure():
        optimizers[0].zero_grad()
        backward(with_closure)
        return torch.tensor(1.0)

    optimizers[0].step(closure)
    backward(plain)
    optimizers[1].step()
    for a, b in zip(with_closure.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_removing_the_handle_ends_the_masking():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    GradientMask(model.named_parameters(), density=0.1).register(optimizer).remove()
    backward(model)
    grads = gradients(model)
    optimizer.step()
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())


class GradientToWeight(GradientMask):
    """A user's own score: one overridden method."""

    def compute_score(self, name, parameter, grad):
        return grad / (parameter.detach().abs() + 1e-3)


def test_a_new_score_is_one_overridden_method():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    GradientToWeight(model.named_parameters(), density=0.2).register(optimizer)
    backward(model)
    grads = gradients(model)
    optimizer.step()
    for name, p in model.named_parameters():
        wanted = full_sort_selection(grads[name] / (p.detach().abs() + 1e-3), 0.2)
        assert torch.equal(p.grad != 0, wanted), name


def test_a_score_may_lie_in_the_gradients_memory_in_another_order():
    class Transposed(GradientMask):
        def compute_score(self, name, parameter, grad):
            return grad.T

    p = torch.nn.Parameter(torch.zeros(600, 600))
    grad = p.grad = torch.randn(600, 600, generator=torch.Generator().manual_seed(0))
    wanted = full_sort_selection(grad.T.clone(), 0.2)
    Transposed([("weight", p)], 0.2).mask_grads_()
    assert torch.equal(p.grad != 0, wanted)


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_gradients_of_another_dtype_are_refused_in_words(score):
    p = torch.nn.Parameter(torch.zeros(10, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match="must be float32, bfloat16 or float16, got torch.float64"):
        GradientMask([("weight", p)], 0.2, score=score).mask_grads_()


def test_a_score_of_the_wrong_shape_is_refused_by_name():
    class Wrong(GradientMask):
        def compute_score(self, name, parameter, grad):
            return grad.sum()

    model = make_model()
    backward(model)
    with pytest.raises(ValueError, match=r"compute_score of '0\.weight' .* shape \(50, 24\)"):
        Wrong(model.named_parameters(), density=0.2).mask_grads_()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_gradients_name_the_parameter_and_the_step_before_anything_changes(bad):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    GradientMask(model.named_parameters(), density=0.2).register(optimizer)
    backward(model)
    optimizer.step()
    backward(model)
    model[4].weight.grad[1, 2] = bad
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"'4\.weight'.* step 2"):
        optimizer.step()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_wrapped_names_select_like_bare_ones():
    model = make_model()
    backward(model)
    renamed = [("_orig_mod." + n.replace(".", "._checkpoint_wrapped_module."), p) for n, p in model.named_parameters()]
    bare = GradientMask(model.named_parameters(), density=0.5, score="random", dense=["2.*"]).mask_grads_()
    wrapped = GradientMask(renamed, density=0.5, score="random", dense=["2.*"]).mask_grads_()
    assert {n: int(c) for n, c in bare.selected.items()} == {n: int(c) for n, c in wrapped.selected.items()}


def test_parameters_without_a_gradient_are_skipped():
    model = make_model()
    backward(model)
    model[1].weight.grad = None
    statistics = GradientMask(model.named_parameters(), density=0.2).mask_grads_()
    assert "1.weight" not in statistics.numel and model[1].weight.grad is None


WRONG_ARGUMENTS = [
    ({"density": 0}, ValueError, r"density .* got 0"),
    ({"density": 20}, ValueError, r"density .* got 20; for 20 percent write 0\.2"),
    ({"density": "0,2"}, ValueError, r"density .* got '0,2'"),
    ({"density": -0.1}, ValueError, r"density .* got -0\.1"),
    ({"density": float("nan")}, ValueError, r"density .* got nan"),
    ({"density": True}, ValueError, r"density .* got True"),
    ({"density": None}, ValueError, r"density .* got None"),
    ({"scope": "layer"}, ValueError, r"scope must be one of tensor, global, got 'layer'"),
    ({"score": "abs"}, ValueError, r"score must be one of magnitude, saliency, random, got 'abs'"),
    ({"refresh_every": 0}, ValueError, r"refresh_every .* got 0"),
    ({"refresh_every": 2.5}, ValueError, r"refresh_every .* got 2\.5"),
    ({"refresh_every": "once"}, ValueError, r"refresh_every .* null to select once, got 'once'"),
    ({"dense": ["*nrom*"]}, ValueError, r"dense: the pattern '\*nrom\*' matches no parameter; names look like 0\.w"),
    ({"frozen": ["5.*"]}, ValueError, r"frozen: the pattern '5\.\*' matches no parameter"),
    ({"dense": "2.*"}, TypeError, r"dense must be a list .* got '2\.\*'"),
    ({"dense": ["2.*"], "frozen": ["2.bias"]}, ValueError, r"'2\.bias' matches both dense and frozen"),
    ({"dense": ["*"]}, ValueError, r"no parameter is left to mask"),
    ({"seed": "a"}, TypeError, r"seed must be a whole number, got 'a'"),
    ({"error_if_nonfinite": "no"}, TypeError, r"error_if_nonfinite must be true or false, got 'no'"),
    ({"refresh_evry": 2}, TypeError, r"no argument 'refresh_evry' \(given 2\): did you mean 'refresh_every'\?"),
    ({"mask_ratio": 0.8}, TypeError, r"no argument 'mask_ratio' \(given 0\.8\)"),
]


@pytest.mark.parametrize("arguments, error, message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named_with_what_would_be_right(arguments, error, message):
    with pytest.raises(error, match=message):
        GradientMask(make_model().named_parameters(), **{"density": 0.2, **arguments})


def test_parameters_without_names_are_refused():
    with pytest.raises(TypeError, match=r"pass model\.named_parameters\(\)"):
        GradientMask(make_model().parameters(), density=0.2)


def test_registering_on_what_is_no_optimizer_is_refused():
    model = make_model()
    with pytest.raises(TypeError, match=r"takes a torch\.optim\.Optimizer, got Sequential"):
        GradientMask(model.named_parameters(), density=0.2).register(model)


def test_registering_on_another_models_optimizer_is_refused():
    with pytest.raises(ValueError, match="holds none of the mask's parameters"):
        GradientMask(make_model().named_parameters(), density=0.2).register(
            torch.optim.SGD(make_model().parameters(), lr=0.1)
        )


def test_scope_global_is_refused_with_one_optimizer_per_parameter():
    model = make_model()
    mask = GradientMask(model.named_parameters(), density=0.2, scope="global")
    with pytest.raises(ValueError, match=r"needs one optimizer that holds all masked parameters"):
        mask.register(torch.optim.SGD([model[1].weight], lr=0.1))


def normed_model() -> nn.Module:
    """Norms under the names of most models, beside one under GPT-2's."""
    return nn.ModuleDict(
        {
            "q_proj": nn.Linear(8, 8, bias=False),
            "ln_1": nn.LayerNorm(8, bias=False),
            "input_layernorm": nn.LayerNorm(8, bias=False),
        }
    )


def masked_of(model, **options):
    return list(GradientMask(model.named_parameters(), density=0.2, **options).masked_parameters)


def test_norms_are_dense_where_nobody_says_otherwise():
    model = normed_model()
    assert masked_of(model) == masked_of(model, dense=["*norm*"]) == ["q_proj.weight", "ln_1.weight"]
    every = [name for name, _ in model.named_parameters()]
    assert masked_of(model, dense=[]) == masked_of(model, dense=()) == masked_of(model, dense=None) == every
    assert GradientMask(model.named_parameters(), density=0.2).policy()["dense"] == ["*norm*"]


@pytest.mark.parametrize("default", [{}, {"dense": ["*norm*"]}, {"dense": ("*norm*",)}], ids=str)
def test_the_default_written_or_not_may_match_nothing_and_yields_to_frozen(default):
    assert masked_of(nn.Linear(3, 3), **default) == ["weight", "bias"]
    assert masked_of(normed_model(), frozen=["*norm*"], **default) == ["q_proj.weight", "ln_1.weight"]
    with pytest.raises(ValueError, match=r"no parameter is left to mask: .*; dense=\[\] masks norms as well"):
        masked_of(normed_model(), frozen=["q_proj*", "ln_1*"], **default)


@pytest.mark.parametrize("own", [["*layernorm*"], ["*norm*", "*norm*"]], ids=str)
def test_patterns_of_ones_own_must_match_and_do_not_yield_to_frozen(own):
    with pytest.raises(ValueError, match=r"dense: the pattern '\*.*norm\*' matches no parameter"):
        masked_of(nn.Linear(3, 3), dense=own)
    with pytest.raises(ValueError, match="matches both dense and frozen"):
        masked_of(normed_model(), frozen=["*norm*"], dense=own)


def test_a_mask_saved_with_another_dense_is_refused_by_name():
    model = normed_model()
    before = GradientMask(model.named_parameters(), density=0.2, dense=[]).state_dict()
    mask = GradientMask(model.named_parameters(), density=0.2)
    with pytest.raises(ValueError, match=r"dense is \['\*norm\*'\], was \[\]\. Set it as it was, or start a new run"):
        mask.load_state_dict(before)
