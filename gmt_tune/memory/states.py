"""Bytes of what lives through the whole run: weights, gradients, optimizer states, the mask's stored bits."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import nn

from gmt_tune.errors import UserError, one_line

# Optimizers of torchao: bits of a quantized state's entry, and entries in the lookup table that each quantized
# state holds (fp32). Source: torchao/optim/subclass_8bit.py, subclass_4bit.py, subclass_fp8.py.
_TORCHAO = {"8bit": (8, 256), "4bit": (4, 16), "fp8": (8, 0)}
# Source: torchao/optim/adam.py. Smaller or uneven tensors keep states of the parameter's dtype.
_TORCHAO_QUANTIZES_FROM = 4096

# Keywords that choose a CUDA implementation and do not change what is stored, but refuse the meta device.
_IMPLEMENTATION = ("fused", "foreach", "capturable")


def optimizer_state_bytes(component: Callable, options: dict, shapes: Iterable[torch.Size], dtype: torch.dtype) -> int:
    """Bytes of the states that an optimizer holds after its first step.

    Torchao's low-bit optimizers are counted by formula: two states (three with ``amsgrad``), each with one code an
    entry, one fp32 scale a block, and a lookup table. Any other optimizer takes one step on the meta device,
    where tensors have shapes and no memory, and its states are counted: of one tensor for each shape.

    ``options`` is what the config passes besides the parameters; ``shapes`` are theirs, as this device holds them.
    Raises UserError if the optimizer refuses the options, or cannot step on the meta device.
    """
    bits_and_table = _torchao_format(component)
    times = Counter(shapes)
    parameters = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in times]
    options = {key: value for key, value in options.items() if key not in _IMPLEMENTATION}
    try:
        optimizer = component(parameters, **options)
        if bits_and_table is not None:
            copies = 3 if optimizer.param_groups[0]["amsgrad"] else 2
            return sum(
                times[p.shape] * (4 + copies * _low_bit_state_bytes(p, optimizer.block_size, *bits_and_table))
                for p in parameters
            )
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
        raise UserError(
            f"the states of optimizer._component_ {component.__module__}.{component.__qualname__} cannot be counted "
            f"({one_line(error)}): check the section optimizer, or try torch.optim.AdamW for a comparison"
        ) from None
    return sum(
        times[parameter.shape] * sum(_bytes(value) for value in optimizer.state[parameter].values())
        for parameter in parameters
    )


def mask_bits_bytes(numels: Iterable[int]) -> int:
    """Bytes of a stored selection: one bit an entry, each tensor rounded up to whole bytes."""
    return sum((numel + 7) // 8 for numel in numels)


def step_scratch_bytes(component: Callable, options: dict, largest: int, dtype: torch.dtype, total: int) -> int:
    """Bytes that an optimizer's step needs for a moment, estimated from the entries of the largest tensor and of all.

    For torchao's compiled updates see :func:`compiled_scratch_bytes`; ``fused=True`` works in place; torch's default on
    an accelerator (``foreach``) holds the square root of all second moments at once.
    """
    if (form := _torchao_format(component)) is not None:
        return compiled_scratch_bytes(form[0]) * largest
    if options.get("fused", False) or "foreach" not in inspect.signature(component).parameters:
        return 0
    return dtype.itemsize * (largest if options.get("foreach", None) is False else total)


def compiled_scratch_bytes(state_bits: int) -> int:
    """Bytes for each entry of a tensor that torchao's compiled update of it needs for a moment.

    Seen in the code that inductor generates: quantizing to 4 bits takes several kernels, with float32 between them;
    all else is one kernel.
    """
    return 24 if state_bits == 4 else 0


def _torchao_format(component: Callable) -> tuple[int, int] | None:
    if not getattr(component, "__module__", "").startswith("torchao.optim"):
        return None
    name = component.__name__.lower()
    return next((form for suffix, form in _TORCHAO.items() if name.endswith(suffix)), None)


def _low_bit_state_bytes(parameter: torch.Tensor, block_size: int, bits: int, table: int) -> int:
    n = parameter.numel()
    if n < _TORCHAO_QUANTIZES_FROM or n % block_size:
        return n * parameter.element_size()
    return n * bits // 8 + n // block_size * 4 + table * 4


def _bytes(value: object) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
