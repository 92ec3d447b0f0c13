"""A GPU that is not there: tensors on 'cuda' have shapes and no memory, and what they would cost is counted.

PyTorch's ``FakeTensorMode`` computes shapes, and raises where tensors on the CPU and on CUDA meet. What a driver is
asked for besides (streams, events, pinned memory, attributes of the device) is answered here, and so are Triton's
launches. A simulation knows no values: whatever is read from the device is 0 or False.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import Optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from gmt_tune.masking import packing
from gmt_tune.masking.search import digits
from gmt_tune.memory.simulation.driver import answer_without_driver

_BLOCK = 512  # bytes: the allocator rounds up to these
# Operations that launch nothing
_VIEWS = frozenset(
    "view _unsafe_view t transpose permute detach slice select expand split unbind as_strided unsqueeze squeeze alias "
    "split_with_sizes narrow reshape _reshape_alias unfold set_ resize_ lift_fresh view_as_real is_pinned _pin_memory "
    "record_stream empty empty_like empty_strided new_empty new_empty_strided".split()
)
# Operations whose result's shape the host has to wait for
_WAITS = frozenset("nonzero masked_select equal is_nonzero _unique2 unique_dim bincount".split())


class SimulatedGPU(contextlib.ExitStack):
    """While it is entered, tensors on 'cuda' are simulated, and all others have no memory either.

    Needs a build of PyTorch for CUDA, no driver and no device. Use one at a time.

    Args:
        devices: as many as ``torch.cuda.device_count()`` says; this process has the first one.

    Attributes:
        allocated, peak: bytes of tensors on the device, now and at the most since ``reset_peak``.
        reads: how often the host waited for the device or read from it, by what was done and where.
        late_reads: of these the ones, left out there, that the device did not stand still for: a copy or an event was
            waited for behind which more was launched.
        launches: how many kernels were launched, by operation or by Triton's kernel, without those of collectives.
        at_peak: called when ``allocated`` reaches ``expected_peak``, while that is not 0.

    Raises:
        UserError: when it is entered, if PyTorch is no build for CUDA.
    """

    def __init__(self, devices: int = 1) -> None:
        super().__init__()
        self.devices = devices
        self.allocated = self.peak = self.expected_peak = 0
        self.at_peak: Callable[[], None] | None = None
        self.reads: Counter[str] = Counter()
        self.late_reads: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self._launched = 0  # since it was entered
        self._sizes: Any = WeakIdKeyDictionary()  # by storage on the device: its bytes, in a list
        self._pinned: Any = WeakIdKeyDictionary()  # storages
        self._ignores = False

    def reset(self) -> None:
        """Count from here on."""
        self.peak = self.allocated
        self.reads.clear()
        self.late_reads.clear()
        self.launches.clear()

    def storages(self) -> dict[Any, int]:
        """Bytes of each storage that is allocated on the device."""
        return {storage: size[0] for storage, size in self._sizes.items()}

    def __enter__(self) -> SimulatedGPU:
        answer_without_driver()
        torch.utils._device._device_constructors()  # kept from the first call on: not those that are put in place here
        _clear_caches()
        self.callback(_clear_caches)
        super().__enter__()
        try:
            self.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            for owner, name, value in (*self._of_torch_cuda(), *self._of_torch(), *_of_triton(self)):
                self.enter_context(mock.patch.object(owner, name, value))
            self.enter_context(_Watch(self))
        except BaseException:
            self.close()
            raise
        return self

    # ------------------------------------------------------------------ what is counted

    def read(self, what: str, *, of_launch: int | None = None) -> None:
        """Count that the host waits for the device: for all that was launched, or up to a number of launches."""
        if self._ignores:
            return
        is_late = of_launch is not None and of_launch < self._launched
        (self.late_reads if is_late else self.reads)[f"{what} at {_caller()}"] += 1

    def launch(self, name: str) -> None:
        if not self._ignores:
            self.launches[name] += 1
            self._launched += 1

    def track(self, tensor: Tensor) -> None:
        """Count a tensor's memory, if it is on the device, until it is gone."""
        if self._ignores or tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        if storage not in self._sizes:
            size = self._sizes[storage] = [0]
            weakref.finalize(storage, self._resize, size, 0)
            self._resize(size, storage.nbytes())

    def _resize(self, size: list[int], n_bytes: int) -> None:
        before, size[0] = size[0], -(-n_bytes // _BLOCK) * _BLOCK
        self.allocated += size[0] - before
        if self.allocated > self.peak:
            self.peak = self.allocated
        if self.expected_peak and self.allocated >= self.expected_peak and self.at_peak is not None:
            self.expected_peak = 0
            self.at_peak()

    @contextlib.contextmanager
    def ignoring(self) -> Iterator[None]:
        """Count neither memory nor launches of what no device does in truth."""
        before, self._ignores = self._ignores, True
        try:
            yield
        finally:
            self._ignores = before

    def pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage()] = True
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage() in self._pinned

    # ------------------------------------------------------------------ what is answered in place of a driver

    def _of_torch_cuda(self) -> Iterator[tuple[Any, str, Any]]:
        cuda: Any = torch.cuda

        class Stream:
            device, cuda_stream, stream_id, device_index, device_type = torch.device("cuda", 0), 0, 0, 0, 1

            def __init__(self, *args, **kwargs) -> None: ...
            def wait_stream(self, stream) -> None: ...
            def wait_event(self, event) -> None: ...
            def __enter__(self) -> None: ...
            def __exit__(self, *args) -> None: ...

            def record_event(self, event=None):
                return event or Event()

            def synchronize(stream) -> None:
                self.read("Stream.synchronize")

            def query(self) -> bool:
                return True

        class Event:
            def __init__(self, *args, **kwargs) -> None:
                self._launched = 0

            def record(event, *args) -> None:
                event._launched = self._launched

            def wait(self, *args) -> None: ...

            def synchronize(event) -> None:
                self.read("Event.synchronize", of_launch=event._launched)

            def query(self) -> bool:
                return True

            def elapsed_time(self, other) -> float:
                return 1.0

        stream = Stream()
        no_context = contextlib.nullcontext()
        answers = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "_lazy_init": lambda: None,
            "device_count": lambda: self.devices,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "Stream": Stream,
            "Event": Event,
            "current_stream": lambda device=None: stream,
            "default_stream": lambda device=None: stream,
            "stream": lambda stream: no_context,
            "device": lambda device: no_context,
            "synchronize": lambda device=None: self.read("torch.cuda.synchronize"),
            "is_bf16_supported": lambda *args, **kwargs: True,
            "get_device_capability": lambda *args: (9, 0),
            "get_device_name": lambda *args: "a simulated GPU",
            "get_rng_state": lambda *args: torch.zeros(16, dtype=torch.uint8, device="cpu"),
            "set_rng_state": lambda *args, **kwargs: None,
            "manual_seed": lambda seed: None,
            "manual_seed_all": lambda seed: None,
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda *args: None,
            "memory_allocated": lambda *args: self.allocated,
            "memory_reserved": lambda *args: self.allocated,
            "max_memory_allocated": lambda *args: self.peak,
            "max_memory_reserved": lambda *args: self.peak,
        }
        yield from ((cuda, name, answer) for name, answer in answers.items())
        yield from ((torch, name, value) for name, value in (("Stream", Stream), ("Event", Event)))

    def _of_torch(self) -> Iterator[tuple[Any, str, Any]]:
        import torch.nn.functional as F
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor._sharding_prop import ShardingPropagator

        tensor, resize_, attention, propagate = (
            torch.tensor,
            torch.UntypedStorage.resize_,
            F.scaled_dot_product_attention,
            ShardingPropagator._propagate_tensor_meta_non_cached,
        )

        def make_tensor(data, *args, pin_memory=False, device=None, **kwargs):
            device = torch.device(device or torch.get_default_device())
            if isinstance(data, (list, tuple)):  # of tensors, too
                data = [x.item() if isinstance(x, Tensor) else x for x in data]
            made = tensor(data, *args, device="cpu", **kwargs)
            if device.type == "cpu":
                return self.pin(made) if pin_memory else made
            self.read("copy from pageable memory by torch.tensor")
            with self.ignoring():
                made = made.to(device)
            self.track(made)
            return made

        def make(function, *args, pin_memory=False, **kwargs):
            made = function(*args, **kwargs)
            return self.pin(made) if pin_memory else made

        def resize_storage(storage, n_bytes):
            result = resize_(storage, n_bytes)
            if storage in self._sizes:
                self._resize(self._sizes[storage], n_bytes)
            return result

        def flash_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
            if q.device.type != "cuda" or q.dtype == torch.float32 or attn_mask is not None:
                return attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]

        def propagate_ignored(*args, **kwargs):  # it computes with whole tensors, which no rank has
            with self.ignoring():
                return propagate(*args, **kwargs)

        def to_list(t):  # FakeTensor's own asks for each entry
            if t.device.type == "cuda":
                self.read("tolist")
            row: Any = _number(t)
            for size in reversed(t.shape):
                row = [row] * size
            return row

        yield FakeTensor, "tolist", to_list
        for owner in (sys.modules[Optimizer.__module__], _foreach_utils):  # or they loop where a GPU would not
            types = [*owner._foreach_supported_types, FakeTensor]
            yield owner, "_foreach_supported_types", types
        yield torch, "tensor", make_tensor
        yield torch, "empty", functools.partial(make, torch.empty)
        yield torch, "empty_like", functools.partial(make, torch.empty_like)
        yield torch.UntypedStorage, "resize_", resize_storage
        yield F, "scaled_dot_product_attention", flash_attention
        yield ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate_ignored
        yield Tensor, "pin_memory", lambda t, *args: self.pin(t.clone())
        yield Tensor, "is_pinned", lambda t, *args: self.is_pinned(t)
        yield Tensor, "record_stream", lambda t, stream: None
        # Ranks and their groups are numbers that must be real
        for name in "__init__ __getitem__ _flatten get_group get_local_rank get_coordinate size get_all_groups".split():
            if hasattr(DeviceMesh, name):
                yield DeviceMesh, name, without_simulation(getattr(DeviceMesh, name))


class _Watch(TorchDispatchMode):
    """Sees each operation on plain tensors: those inside of DTensors and torchao's states, too."""

    def __init__(self, gpu: SimulatedGPU) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, gpu = kwargs or {}, self._gpu
        plain = (FakeTensor, Tensor, torch.nn.Parameter)
        if any(t not in plain and hasattr(t, "__tensor_flatten__") for t in types):
            return NotImplemented  # what they do with the tensors inside is seen
        name = func._schema.name.partition("::")[2]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(x.device.type == "cuda" for x in inputs)
        if name == "_local_scalar_dense":
            (value,) = inputs
            if on_device:
                gpu.read("item")
            return _number(value)
        if name == "_fused_sdp_choice" and on_device:
            return 1  # flash attention
        if name in _WAITS and on_device:
            gpu.read(name)
        if name == "nonzero":  # none is found
            result = torch.empty(0, args[0].dim(), dtype=torch.int64, device=args[0].device)
        elif name == "bincount":
            length = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
            result = torch.empty(length, dtype=torch.int64, device=args[0].device)
        else:
            with _without_values(inputs if name == "_to_copy" else ()):
                result = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if name in ("_to_copy", "copy_"):
            self._see_copy(name, args, kwargs, result)
        if (
            name not in _VIEWS
            and func.namespace != "prim"
            and (on_device or any(x.device.type == "cuda" for x in outputs))
        ):
            gpu.launch(name)
        for output in outputs:
            gpu.track(output)
        return result

    def _see_copy(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        source = args[1] if name == "copy_" else args[0]
        pair = source.device.type, result.device.type
        if set(pair) != {"cpu", "cuda"}:
            return
        waits_not = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        on_host = source if source.is_cpu else result
        if name == "_to_copy" and result.is_cpu and waits_not:  # which PyTorch makes in pinned memory
            self._gpu.pin(result)
        if source.is_cpu and source.dim() == 0 and name == "copy_":
            return  # a number goes along with the launch
        if not waits_not:
            self._gpu.read(f"copy from {pair[0]} to {pair[1]}")
        elif not self._gpu.is_pinned(on_host):
            self._gpu.read(f"copy from {pair[0]} to {pair[1]} through pageable memory")


def _of_triton(gpu: SimulatedGPU) -> Iterator[tuple[Any, str, Any]]:
    """Launches that do nothing but check that all tensors are on the device."""
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        return

    def run(kernel, *args, grid, warmup, **kwargs) -> None:
        elsewhere = [x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.device.type != "cuda"]
        if elsewhere:
            raise RuntimeError(f"{kernel.fn.__name__} was given a tensor on {elsewhere[0]}")
        gpu.launch(kernel.fn.__name__)

    yield JITFunction, "run", run


def without_simulation(function: Callable) -> Callable:
    """The same function, whose tensors are real ones."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def _without_values(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let FakeTensorMode forget what numbers are in tensors: it would copy them to the device in truth."""
    known: list[Any] = [t for t in tensors if getattr(t, "constant", None) is not None]
    values = [(t, t.constant) for t in known]
    for t, _ in values:
        t.constant = None
    try:
        yield
    finally:
        for t, value in values:
            t.constant = value


def _number(value: Tensor) -> bool | int | float:
    """A 0-d tensor's value where it is known, as that of a number which was made a tensor, and else 0."""
    if (constant := getattr(value, "constant", None)) is not None:  # FakeTensorMode's
        return without_simulation(constant.item)()
    return False if value.dtype == torch.bool else 0.0 if value.is_floating_point() else 0


def _clear_caches() -> None:
    """Constants on devices, kept from step to step: real ones and simulated ones must not meet."""
    packing._bytes_of_bits.cache_clear()
    digits._on_device.cache_clear()


def _caller() -> str:
    """Where the project's code, or that of a library which it runs, asked for something."""
    for frame in reversed(traceback.extract_stack()):
        if "/memory/simulation/" in frame.filename or "/torch/" in frame.filename or "/unittest/" in frame.filename:
            continue
        return f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"
    return "an unknown place"
