"""CompactAdamW against dense tensors with a boolean mask: in one process, and sharded over several."""

import copy
import functools
import math
import pickle
import runpy
from pathlib import Path

import launch
import pytest
import torch
from optim.dense_oracle import DenseOracle
from torch import nn

from gmt_tune import CompactAdamW, GradientMask
from gmt_tune.masking.draws import random_key, random_ranks
from gmt_tune.optim import states

WORKER = Path(__file__).with_name("compact_worker.py")
worker = runpy.run_path(str(WORKER))
CASES, SHAPES, HOW, whole = worker["cases"](), worker["SHAPES"], worker["HOW"], worker["whole"]
EPS = {torch.float32: 1e-6, torch.bfloat16: 2**-8}  # of the largest weight


def model_of(case) -> nn.Module:
    return worker["Model"]({name: whole(name, case["dtype"], -1) for name in SHAPES})


@functools.cache
def trained(key: str) -> dict:
    return worker["train"](CASES[key], model_of(CASES[key]))


def turns_of(case) -> dict[str, int]:
    """The step of each tensor's first turn: whole layers together, the largest first, each where least is due."""
    if case["refresh_every"] in (1, None):
        return dict.fromkeys(SHAPES, 0)
    return {"layers.0.w": 2, "layers.0.odd": 2, "layers.1.w": 0, "layers.1.cube": 0, "head": 1, "norm": 0}


def oracle_of(case, **more) -> DenseOracle:
    model = model_of(case)
    every, draws = case["refresh_every"], {}

    def random(name, grad, weight):
        draws[name] = draws.get(name, -1) + 1
        first_draw = 0 if turns_of(case)[name] == 0 else 1
        return random_ranks(0, grad.numel(), random_key(0, draws[name] + first_draw, name)).view(grad.shape)

    scores = {"random": random, "saliency": lambda name, grad, weight: (grad * weight).abs()}
    if case.get("score") in scores:
        more["score"] = scores[case["score"]]
    eps = 1e-8
    return DenseOracle(
        dict(model.named_parameters()), case["density"], every, turns_of(case), **HOW, eps=eps,
        dense=worker["DENSE"], max_norm=case["max_norm"], dtype=case["dtype"], **more,
    )  # fmt: skip


def gradients_of(case, step: int) -> dict[str, torch.Tensor]:
    first = step * case["accumulation"]
    total = {}
    for number in range(first, first + case["accumulation"]):
        for name in SHAPES:
            grad = whole(name, case["dtype"], number)
            total[name] = total[name] + grad if name in total else grad
    return total


def assert_close(found, wanted, eps, where):
    for name, weight in wanted.items():
        error = (found[name].double() - weight.double()).abs().max() / weight.double().abs().max()
        assert error <= eps, f"{where}, {name}: {error}"


@pytest.mark.parametrize("key", CASES)
def test_equals_dense_tensors_with_a_mask(key):
    case, found = CASES[key], trained(key)
    oracle = oracle_of(case)
    for step in range(worker["STEPS"]):
        oracle.step(gradients_of(case, step))
        assert_close(found["weights"][step], oracle.p, EPS[case["dtype"]], f"step {step}")
        for name, count in found["selected"][step].items():
            assert count == int(oracle.mask[name].sum()), (step, name)


def test_the_cases_move_weights_and_differ_from_each_other():
    """What shows that the comparison above can fail."""
    for key, case in CASES.items():
        before = dict(model_of(case).named_parameters())
        after = trained(key)["weights"][-1]
        moved = {name: (after[name] != p).double().mean() for name, p in before.items()}
        assert all(0 < fraction <= 1 for fraction in moved.values()), (key, moved)
        assert (moved["layers.0.w"] < 0.9) == (key != "all entries"), (key, moved)
    ends = {tuple(trained(key)["weights"][-1]["layers.0.w"].flatten().tolist()) for key in CASES}
    assert len(ends) == len(CASES)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=lambda n: f"{n} processes")
def sharded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compact")
    launch.torchrun(WORKER, folder / "results.pt", processes=request.param, log_dir=folder)
    found = torch.load(folder / "results.pt")
    assert found["all ranks found the same"]
    return found["results"]


@launch.NEEDS_FSDP2_ON_CPU
def test_gradients_of_dense_parameters_keep_no_others_in_memory(sharded):
    """FSDP2 reduces all gradients of a layer into one buffer."""
    assert {key: found["shared"] for key, found in sharded.items() if "FSDP2" in key and found["shared"]} == {}


@launch.NEEDS_FSDP2_ON_CPU
def test_the_same_selection_and_weights_sharded_over_processes(sharded):
    assert {key.split(" | ")[0] for key in sharded} == CASES.keys()
    for key, found in sharded.items():
        wanted = trained(key.split(" | ")[0])
        assert found["selected"] == wanted["selected"], key
        for step, (a, b) in enumerate(zip(found["weights"], wanted["weights"], strict=True)):
            assert_close(a, b, EPS[CASES[key.split(" | ")[0]]["dtype"]], f"{key}, step {step}")


def test_density_1_equals_adamw():
    case = CASES["all entries"] | {"refresh_every": 1}
    model = model_of(case)
    adamw = torch.optim.AdamW(model.parameters(), **HOW)
    for step, weights in enumerate(worker["train"](case, model_of(case))["weights"]):
        for name, p in model.named_parameters():
            p.grad = gradients_of(case, step)[name]
        adamw.step()
        assert_close(weights, dict(model.named_parameters()), 1e-6, f"step {step}")


@pytest.mark.parametrize("state_bits", [8, 4, "fp8"])
def test_quantized_moments_equal_the_oracles_through_the_same_classes(state_bits):
    """Large enough that moments are quantized: 4,915 selected entries, no whole number of blocks."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(96, 512))
    small = nn.Parameter(torch.randn(64, 64))  # dense, of whole blocks
    before = {"p": p.detach().clone(), "small": small.detach().clone()}

    def quantize(values, signed):
        size = states.padded_size(values.numel(), state_bits)
        state = states.zeros((size,), state_bits, signed=signed, device=values.device)
        state.copy_(nn.functional.pad(values, (0, size - values.numel())))
        return state.dequantize()[: values.numel()]

    mask = GradientMask({"p": p, "small": small}.items(), 0.1, refresh_every=3, dense=["small"])
    optimizer = CompactAdamW([p, small], state_bits=state_bits, **HOW)
    mask.register(optimizer)
    oracle = DenseOracle(before, 0.1, 3, {"p": 0, "small": 0}, **HOW, eps=1e-8, dense=["small"], quantize=quantize)
    for _ in range(8):
        gradients = {"p": torch.randn(p.shape), "small": torch.randn(small.shape)}
        ((p * gradients["p"]).sum() + (small * gradients["small"]).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        oracle.step(gradients)
        # Where a moment lies between two codes, the last bit of its arithmetic decides; if it is its block's largest,
        # of the whole block
        for q, name in ((p, "p"), (small, "small")):
            off = ((q.detach().double() - oracle.p[name]).abs() > 1e-5).double().mean()
            assert off < (0.02 if state_bits == "fp8" else 1e-3), (name, off)
    assert type(optimizer.state[p]["exp_avg"]) is not torch.Tensor
    assert (oracle.p["p"] != before["p"]).double().mean() > 0.2


def test_stochastic_rounding_moves_weights_by_small_updates_on_average():
    moved = {}
    for rounds in (False, True):
        torch.manual_seed(0)
        p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        mask = GradientMask([("p", p)], 0.5, refresh_every=None)
        optimizer = CompactAdamW([p], lr=1e-4, weight_decay=0.0, bf16_stochastic_round=rounds)
        mask.register(optimizer)
        for _ in range(50):
            p.float().sum().backward()
            optimizer.step()
        moved[rounds] = (1 - p.detach().float()).view(-1)[:2048].mean().item()
        assert bool((p.detach().view(-1)[2048:] == 1).all())  # ties: the lower half is selected, the upper stands still
    assert moved[False] == 0 and moved[True] == pytest.approx(50e-4, rel=0.1)


def test_float32_parameters_beside_bfloat16_ones_are_not_rounded():
    """In any order: such as norms in float32."""
    for first in (torch.float32, torch.bfloat16):
        second = torch.bfloat16 if first == torch.float32 else torch.float32
        p, q = (nn.Parameter(torch.ones(8, 8, dtype=dtype)) for dtype in (first, second))
        mask = GradientMask([("p", p), ("q", q), ("r", nn.Parameter(torch.ones(1)))], 1.0, dense=["p", "q"])
        optimizer = CompactAdamW([p, q], lr=1e-4, weight_decay=0.0, bf16_stochastic_round=True)
        mask.register(optimizer)
        (p.float() + q.float()).sum().backward()
        optimizer.step()
        exact = p if first == torch.float32 else q
        assert (1 - exact).detach().numpy() == pytest.approx(1e-4, rel=1e-3)


def test_groups_lr_schedules_and_tensor_lr():
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.ones(10, 10)) for _ in range(2))
    mask = GradientMask([("p", p), ("q", q)], 1.0)
    optimizer = CompactAdamW([{"params": [p], "lr": torch.tensor(0.1)}, {"params": [q]}], lr=0.01, weight_decay=0)
    mask.register(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(2):
        (p + q).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert (1 - p).detach().numpy() == pytest.approx(0.15, rel=1e-4)
    assert (1 - q).detach().numpy() == pytest.approx(0.015, rel=1e-4)


def test_between_two_turns_no_gradient_outlives_the_backward_pass():
    layers = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4)))
    mask = GradientMask(layers.named_parameters(), 0.1, refresh_every=4)
    optimizer = CompactAdamW(layers.parameters(), max_grad_norm=1.0)
    mask.register(optimizer)
    for step in range(8):
        for _ in range(2):
            layers(torch.randn(4, 16)).square().sum().backward()
            assert [p.grad is not None for p in layers.parameters()] == [i == step % 4 for i in range(4)]
        optimizer.step()
        assert all(p.grad is None for p in layers.parameters())
        assert len(optimizer.state) == min(step + 1, 4)
    kept = sum(state.numel() for states in optimizer.state.values() for state in states.values())
    assert kept == 3 * 4 * math.floor(0.1 * 256)


@pytest.mark.parametrize("refresh_every", [1, 4])
@pytest.mark.parametrize("is_selected", [True, False])
def test_an_entry_that_is_not_finite_stops_the_step_before_any_weight_changes(refresh_every, is_selected):
    torch.manual_seed(0)
    layers = nn.ModuleDict({str(i): nn.Linear(16, 16, bias=False) for i in range(2)})
    mask = GradientMask(layers.named_parameters(), 0.1, refresh_every=refresh_every)
    optimizer = CompactAdamW(layers.parameters())
    mask.register(optimizer)
    gradients = [torch.randn(16, 16) for _ in range(2)]

    def backward(broken: bool) -> None:
        for i, grad in enumerate(gradients):
            grad = grad.clone()
            if broken and i == 0:
                entries = grad.abs().view(-1).argsort(descending=True)
                grad.view(-1)[entries[0 if is_selected else -1]] = math.nan
            (layers[str(i)].weight * grad).sum().backward()

    for _ in range(3):
        backward(False)
        optimizer.step()
    before = [p.detach().clone() for p in layers.parameters()]
    backward(True)
    backward(False)
    with pytest.raises(RuntimeError, match=r"the gradient of '0.weight' holds NaN or infinity at optimizer step 4"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, layers.parameters(), strict=True))
    optimizer.zero_grad()
    backward(False)
    optimizer.step()
    assert all(p.isfinite().all() for p in layers.parameters())


def test_a_closure_computes_the_gradient():
    results = []
    for with_closure in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(16, 16)
        mask = GradientMask(layer.named_parameters(), 0.1, refresh_every=3)
        optimizer = CompactAdamW(layer.parameters())
        mask.register(optimizer)
        batches = torch.randn(6, 4, 16)
        for batch in batches:

            def closure(batch=batch, layer=layer, optimizer=optimizer):
                optimizer.zero_grad()
                loss = layer(batch).square().sum()
                loss.backward()
                return loss

            if with_closure:
                assert optimizer.step(closure) > 0
            else:
                closure()
                optimizer.step()
        results.append(layer.weight.detach())
    assert torch.equal(*results)


def test_wrong_arguments_and_uses_are_answered_in_a_sentence():
    p = nn.Parameter(torch.ones(4, 4))
    for keywords, message in (
        ({"lr": -1}, "lr must be a number from 0 on, got -1"),
        ({"lr": "abc"}, "lr must be a number from 0 on, got 'abc'"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be a number from 0 on and below 1, got 1.0"),
        ({"state_bits": 16}, "state_bits must be one of 32, 8, 4, fp8, got 16"),
        ({"max_grad_norm": 0}, "max_grad_norm must be a number above 0, or None, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            CompactAdamW([p], **keywords)
    with pytest.raises(TypeError, match="did you mean 'state_bits'"):
        CompactAdamW([p], state_bit=8)
    optimizer = CompactAdamW([p])
    p.sum().backward()
    with pytest.raises(RuntimeError, match=r"call mask\.register\(optimizer\) before its step"):
        optimizer.step()
    mask = GradientMask([("p", p)], 0.5)
    handle = mask.register(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match="CompactAdamW takes no GradScaler: train in bfloat16"):
        scaler.scale(p.sum()).backward()
        scaler.step(optimizer)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled, .* load the state_dict"):
            copied(optimizer)
    handle.remove()
    with pytest.raises(ValueError, match="scope 'global' does not work with CompactAdamW: use scope 'tensor'"):
        GradientMask([("p", p)], 0.5, scope="global").register(optimizer)

    class Halves(GradientMask):
        def apply_(self, parts, selections, optimizer):
            raise AssertionError

    with pytest.raises(TypeError, match="Halves overrides apply_"):
        Halves([("p", p)], 0.5).register(optimizer)


def test_the_default_device_of_a_process_is_not_that_of_its_tensors():
    """It can be a GPU while these are on the CPU. Tensors that nobody can read show where it is asked."""
    found = []
    for default in ("cpu", "meta"):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(300, 400).to(dtype)) for dtype in (torch.float32, torch.bfloat16)]
        other = nn.Parameter(torch.randn(200, 300))
        gradients = [torch.randn(300, 400) for _ in range(6)]
        with torch.device(default):
            optimizers = [
                CompactAdamW(weights, state_bits=8, bf16_stochastic_round=True, max_grad_norm=1.0),
                torch.optim.SGD([other], lr=0.1),
            ]
            for optimizer in optimizers:
                named = [(str(i), p) for i, p in enumerate(optimizer.param_groups[0]["params"])]
                GradientMask(named, 0.05, refresh_every=3).register(optimizer)
            for gradient in gradients:
                sum((p * gradient[: p.shape[0], : p.shape[1]]).sum() for p in (*weights, other)).backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        found.append([p.detach() for p in (*weights, other)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
