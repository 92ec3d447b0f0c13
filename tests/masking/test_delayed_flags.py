"""NaN on a GPU: the flag is read in the step that met it, so that nothing behind the step sees its weights."""

import pytest
import torch
from torch import nn

from gmt_tune import GradientMask
from gmt_tune.masking import nonfinite as delayed


class Flag:
    """A 0-d flag on a CUDA device that is not there: it shows its value only where a copy has arrived."""

    is_cuda = True
    _base = None
    device = torch.device("cuda", 0)

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


@pytest.fixture
def copies(monkeypatch):
    """Lets flags be on a GPU; what is copied, and when its arrival was waited for."""
    made = []

    def start_copy(flags):
        copy = {"flags": flags, "is_awaited": False}
        made.append(copy)
        return flags, lambda: copy.update(is_awaited=True)

    real = delayed.DelayedFlags.add
    stack = torch.stack
    monkeypatch.setattr(delayed, "start_copy", start_copy)
    monkeypatch.setattr(torch, "stack", lambda ts: stack([t.value if isinstance(t, Flag) else t for t in ts]))
    monkeypatch.setattr(
        delayed.DelayedFlags,
        "add",
        lambda self, names, flags, where: real(self, names, [Flag(flag) for flag in flags], where),
    )
    return made


def make():
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model, optimizer, GradientMask(model.named_parameters(), density=0.5)


def test_the_step_that_met_nan_raises_and_waits_for_its_flags_alone(copies):
    model, optimizer, mask = make()
    mask.register(optimizer)
    optimizer.step()
    assert [copy["is_awaited"] for copy in copies if copy["flags"].numel()] == [True]
    model.weight.grad[1, 2] = float("nan")
    with pytest.raises(RuntimeError, match=r"'weight' holds NaN or infinity at optimizer step 2"):
        optimizer.step()


def test_flags_are_read_behind_the_optimizers_own_work_not_before_it(copies):
    model, optimizer, mask = make()
    seen = []

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([copy["is_awaited"] for copy in copies if copy["flags"].numel()])
            return super().step(closure)

    optimizer = Recording(model.parameters(), lr=0.1)
    mask.register(optimizer)
    optimizer.step()
    assert seen == [[False]]


@pytest.mark.parametrize("policy", [{}, {"refresh_every": 2}], ids=str)
def test_with_the_optimizer_in_backward_no_parameters_step_waits_and_backward_raises(copies, policy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    mask = GradientMask(model.named_parameters(), density=0.5, **policy)
    awaited = []
    for p in model.parameters():
        optimizer = torch.optim.SGD([p], lr=0.1)
        mask.register(optimizer)

        def step(p, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()
            awaited.append(sum(copy["is_awaited"] for copy in copies if copy["flags"].numel()))

        p.register_post_accumulate_grad_hook(step)
    for n in (1, 2):
        model(torch.randn(3, 6)).sum().backward()
        assert awaited == [4 * (n - 1)] * 4 and all(copy["is_awaited"] for copy in copies)
        awaited.clear()
    model[1].bias.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(RuntimeError, match=r"'1.bias' holds NaN or infinity at optimizer step 3"):
        model(torch.randn(3, 6)).sum().backward()
    assert awaited == [8] * 4 and mask.step == 3


def test_masking_by_hand_raises_in_its_own_call(copies):
    model, _, mask = make()
    model.bias.grad[0] = float("inf")
    with pytest.raises(RuntimeError, match="'bias' holds NaN or infinity at optimizer step 1"):
        mask.mask_grads_()


@pytest.mark.parametrize("read", ["state_dict", "metrics"])
def test_a_flag_that_a_failed_step_left_unread_is_not_saved_over(copies, read):
    """An optimizer that raises never comes to the hook behind its step."""
    model, _, mask = make()

    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise KeyboardInterrupt

    optimizer = Failing(model.parameters(), lr=0.1)
    mask.register(optimizer)
    model.weight.grad[1, 2] = float("nan")
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    with pytest.raises(RuntimeError, match="'weight' holds NaN or infinity"):
        getattr(mask, read)()


def test_flags_of_cpu_and_gpu_parameters_are_read_device_by_device(monkeypatch):
    copied = []

    def start_copy(flags):
        copied.append(flags.tolist())
        return flags, lambda: None

    stack = torch.stack
    monkeypatch.setattr(delayed, "start_copy", start_copy)
    monkeypatch.setattr(torch, "stack", lambda ts: stack([t.value if isinstance(t, Flag) else t for t in ts]))
    flags = delayed.DelayedFlags()
    no, yes = torch.tensor(False), torch.tensor(True)
    flags.add(["on the CPU", "on the GPU"], [no, Flag(yes)], "")
    assert copied == [[True]]
    with pytest.raises(RuntimeError, match="'on the GPU' holds NaN"):
        flags.raise_if_set()
    with pytest.raises(RuntimeError, match="'on the CPU' holds NaN"):
        flags.add(["on the CPU", "on the GPU"], [yes, Flag(no)], "")
