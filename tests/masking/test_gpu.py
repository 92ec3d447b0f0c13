"""On a GPU the mask keeps what it keeps on the CPU, which a full sort confirms. The CPU shows that the tests hold."""

import warnings

import full_sort
import pytest
import torch

from gmt_tune import GradientMask, kth_largest_magnitude, mask_grads_

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1 << 20,), (513, 257), (64, 3, 5), (1,)]


def parameters_on(device: str, dtype: torch.dtype, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    parameters = []
    for shape in SHAPES:
        grad = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.3)
        p = torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        p.grad = grad.to(device, dtype)
        parameters.append(p)
    return parameters


def odd_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What searches stumble over, by name."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    heavy = (normal(300, 1000) * 6).exp() * normal(300, 1000).sign()
    special = normal(40_000)
    special[::7], special[::11], special[5], special[6::5000] = 0.0, -0.0, torch.inf, torch.nan
    return {
        "ties": torch.randint(-3, 4, (100_003,), generator=generator).to(dtype),
        "one magnitude": torch.full((70_000,), -0.75).to(dtype),
        "zeros": torch.zeros(5000).to(dtype),
        "nearly all zero": (normal(200_000) * (torch.rand(200_000, generator=generator) < 1e-3)).to(dtype),
        "heavy tails": heavy.to(dtype),
        "subnormal": (normal(50_000) * torch.finfo(dtype).tiny / 8).to(dtype),
        "nan, infinity, zeros of both signs": special.to(dtype),
        "tiny": normal(3).to(dtype),
        "scalar": normal(1).to(dtype).squeeze(0),
        "empty": torch.empty(0, 7).to(dtype),
        "offset by an entry": normal(100_001).to(dtype)[1:],
        "transposed": normal(300, 700).to(dtype).T,
        "every third column": normal(257, 900).to(dtype)[:, ::3],
    }


def moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """With its strides, and an address that is as odd as before."""
    buffer = torch.empty(tensor.untyped_storage().size() // tensor.element_size(), dtype=tensor.dtype, device=device)
    return buffer.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("density", [0.001, 0.2])
def test_mask_equals_full_sort(device, dtype, scope, density):
    parameters = parameters_on(device, dtype)
    wanted = full_sort.mask([p.grad.cpu() for p in parameters], density, scope)
    statistics = mask_grads_(parameters, density, scope=scope)
    for i, (p, want) in enumerate(zip(parameters, wanted, strict=True)):
        assert full_sort.same_bits(p.grad.cpu(), want)
        assert int(statistics.selected[str(i)]) == int((want != 0).sum())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", ["magnitude", "saliency"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_mask_of_odd_tensors_equals_full_sort(device, dtype, score, scope):
    grads = odd_tensors(dtype)
    for density in (1e-5, 0.01, 0.5, 0.999):
        weights = {name: torch.randn_like(grad) for name, grad in grads.items()}
        scores = [grad * weights[name] if score == "saliency" else grad for name, grad in grads.items()]
        wanted = full_sort.mask(list(grads.values()), density, scope, scores)
        parameters = [torch.nn.Parameter(weights[name].to(device)) for name in grads]
        for p, grad in zip(parameters, grads.values(), strict=True):
            p.grad = moved(grad, device)
        mask_grads_(parameters, density, scope=scope, score=score, error_if_nonfinite=False)
        for name, p, want in zip(grads, parameters, wanted, strict=True):
            assert full_sort.same_bits(p.grad.cpu(), want), (name, density)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kth_largest_equals_full_sort(device, dtype):
    for name, tensor in odd_tensors(dtype).items():
        n = tensor.numel()
        for k in sorted({1, n // 1000, n // 5, n // 2, n} & set(range(1, n + 1))):
            found = kth_largest_magnitude(moved(tensor, device), k).cpu()
            want = full_sort.kth_largest([tensor], k).to(dtype)
            assert full_sort.same_bits(found, want) or (found.isnan() and want.isnan()), (name, k)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("refresh_every", [1, 3, None])
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("score", ["magnitude", "saliency", "random", "own"])
def test_every_mode_keeps_what_it_keeps_on_the_cpu(device, dtype, refresh_every, scope, score):
    class Own(GradientMask):
        def compute_score(self, name, parameter, grad):
            return grad.abs().sqrt() + parameter.detach().abs()

    masks, optimizers, all_parameters = [], [], []
    for where in ("cpu", device):
        parameters = parameters_on(where, dtype)
        arguments = dict(density=0.15, scope=scope, refresh_every=refresh_every, dense=["3"])
        named = [(str(i), p) for i, p in enumerate(parameters)]
        masks.append(Own(named, **arguments) if score == "own" else GradientMask(named, score=score, **arguments))
        optimizers.append(torch.optim.SGD(parameters, lr=0.0))
        masks[-1].register(optimizers[-1])
        all_parameters.append(parameters)
    for step in range(5):
        for where, parameters, optimizer in zip(("cpu", device), all_parameters, optimizers, strict=True):
            for p, fresh in zip(parameters, parameters_on(where, dtype, seed=step), strict=True):
                p.grad = fresh.grad
            optimizer.step()
        for on_cpu, p in zip(*all_parameters, strict=True):
            assert full_sort.same_bits(on_cpu.grad, p.grad.cpu()), step
    states = [mask.state_dict() for mask in masks]
    assert states[0]["selections"].keys() == states[1]["selections"].keys()
    for name, bits in states[0]["selections"].items():
        assert torch.equal(bits, states[1]["selections"][name].cpu()), name
    assert masks[0].metrics()["mask/density"] == masks[1].metrics()["mask/density"] < 1.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("position", [0, 3], ids=["masked", "dense"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_gradient_that_is_not_finite_raises_inside_its_step(device, fused, position, value):
    parameters = parameters_on(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(parameters, fused=fused)
    GradientMask([(f"p{i}", p) for i, p in enumerate(parameters)], density=0.2, dense=["p3"]).register(optimizer)
    optimizer.step()
    parameters[position].grad.view(-1)[-1] = value
    with pytest.raises(RuntimeError, match=f"p{position}.*optimizer step 2"):
        optimizer.step()


@pytest.mark.parametrize("device", DEVICES)
def test_a_fused_step_that_overflowed_is_left_out(device):
    """``GradScaler`` leaves it to the fused optimizer to skip the step, and to divide by the scale."""
    p = torch.nn.Parameter(torch.ones(4000, device=device))
    optimizer = torch.optim.AdamW([p], lr=0.5, weight_decay=0.0, fused=True)
    mask = GradientMask([("p", p)], density=0.25)
    mask.register(optimizer)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**126, backoff_factor=2.0**-120)
    factors = torch.arange(1.0, 4001.0, device=device)
    moved_entries = []
    for _ in range(2):
        scaler.scale((p * factors).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved_entries.append(int((p != 1).sum()))
    assert moved_entries == [0, 1000] and mask.step == 1


@pytest.mark.needs_gpu
@pytest.mark.parametrize("refresh_every", [1, 3, None])
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("score", ["magnitude", "saliency", "random"])
def test_a_step_does_not_wait_for_the_device(refresh_every, scope, score):
    """But for the flags of gradients that are not finite, which are read behind the step."""
    parameters = parameters_on("cuda", torch.bfloat16)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    named = [(str(i), p) for i, p in enumerate(parameters)]
    GradientMask(named, density=0.2, score=score, scope=scope, refresh_every=refresh_every).register(optimizer)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(4):
                optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [f"{w.filename}:{w.lineno} {w.message}" for w in caught] == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_optimizer_moves_the_entries_of_the_full_sort(device, dtype):
    parameters = parameters_on(device, dtype)
    before = [p.detach().clone() for p in parameters]
    selected = [want != 0 for want in full_sort.mask([p.grad.cpu() for p in parameters], 0.2)]
    optimizer = torch.optim.SGD(parameters, lr=100.0)
    GradientMask([(str(i), p) for i, p in enumerate(parameters)], density=0.2).register(optimizer)
    optimizer.step()
    for p, start, moves in zip(parameters, before, selected, strict=True):
        assert torch.equal((p.detach() != start).cpu(), moves)
