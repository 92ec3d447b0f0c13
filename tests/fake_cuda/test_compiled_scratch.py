"""What torchao's compiled updates allocate on CUDA, by the code that inductor generates: no kernel is run."""

import math
import re
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from gmt_tune.memory.states import compiled_scratch_bytes

pytestmark = [pytest.mark.fake_cuda, pytest.mark.filterwarnings("ignore")]

SHAPE = (512, 1024)
H100 = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    gcnArchName="",
    uuid="",
    clock_rate=1_755_000,
    memory_clock_rate=2_619_000,
    memory_bus_width=5120,
)
# By module of torchao: class, bits, entries in a block
STATES = {"8bit": ("OptimState8bit", 8, 256), "4bit": ("OptimState4bit", 4, 128), "fp8": ("OptimStateFp8", 8, 256)}


class Generated(Exception):
    """Carries the code, and ends the compilation."""


def simulate_h100(stack: ExitStack) -> None:
    import torch._inductor.config as inductor
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch.utils._triton import has_triton
    from triton.backends.compiler import GPUTarget

    has_triton.cache_clear()  # what it found without the device, and what it finds now
    stack.callback(has_triton.cache_clear)
    stack.enter_context(
        inductor.patch(compile_threads=1, joint_graph_constant_folding=False, fx_graph_cache=False)  # type: ignore
    )
    answers = {
        "get_device_properties": H100,
        "is_available": True,
        "get_compute_capability": 90,
        "current_device": 0,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "device_count": 1,
        "synchronize": None,
        "get_raw_stream": 0,
    }
    for name, answer in answers.items():
        stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(lambda *a, answer=answer: answer)))
    for name in ("get_device_properties", "current_device"):
        answer = staticmethod(lambda *a, answer=answers[name]: answer)
        stack.enter_context(mock.patch.object(CudaInterface.Worker, name, answer))
    stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", lambda *a: H100))
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda *a: 0,
    )
    stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))


def generate(graph_module, inputs):
    """As ``torch.compile`` would, up to the code that calls the kernels."""
    from torch._inductor.compile_fx import (
        _recursive_joint_graph_passes,
        _recursive_post_grad_passes,
        fake_tensor_prop,
        view_to_reshape,
    )
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    with V.set_fake_mode(inputs[0].fake_mode), V.set_debug_handler(DebugContext()):
        graph_module = _recursive_joint_graph_passes(graph_module) or graph_module
        view_to_reshape(graph_module)
        fake_tensor_prop(graph_module, inputs)
        _recursive_post_grad_passes(graph_module, is_inference=True)
        graph = GraphLowering(graph_module, shape_env=None, is_inference=True, example_inputs=inputs)
        with V.set_graph_handler(graph):
            graph.run(*inputs)
            code = graph.codegen()[0]
    raise Generated(getattr(code, "value", code))


def most_allocated(code: str) -> int:
    """Bytes of buffers that are alive at once in generated code, at the most."""
    sizes, most = {}, 0
    for line in code.splitlines():
        if made := re.match(r"\s*(\w+) = empty_strided_cuda\(\(([\d, ]*)\), .*, torch\.(\w+)\)", line):
            name, shape, dtype = made.groups()
            entries = math.prod(int(size) for size in shape.split(",") if size.strip())
            sizes[name] = entries * getattr(torch, dtype).itemsize
            most = max(most, sum(sizes.values()))
        elif freed := re.match(r"\s*del (\w+)", line):
            sizes.pop(freed[1], None)
        elif reused := re.match(r"\s*(\w+) = (?:reinterpret_tensor\()?(\w+)\b.*# reuse", line):
            sizes[reused[1]] = sizes.pop(reused[2], 0)
    return most


@pytest.mark.parametrize("kind", STATES)
def test_scratch_of_the_compiled_update_is_what_the_estimate_says(gpu, kind):
    import torchao.optim.adam as adam
    from torch._functorch.aot_autograd import aot_function
    from torch._inductor.decomposition import select_decomp_table

    name, bits, block = STATES[kind]
    module = __import__(f"torchao.optim.subclass_{kind}", fromlist=[name])
    make = getattr(module, name).zeros
    signs = [()] * 2 if kind == "fp8" else [(True,), (False,)]
    moments = [make(SHAPE, *sign, block, device="cuda") for sign in signs]
    names, contexts = moments[0].__tensor_flatten__()[0], [m.__tensor_flatten__()[1] for m in moments]
    plain = [getattr(moment, each) for moment in moments for each in names]
    p = torch.empty(SHAPE, dtype=torch.bfloat16, device="cuda")
    numbers = [torch.empty((), device="cpu") for _ in range(2)]

    def update(p, grad, step, lr, *plain):
        halves = plain[: len(names)], plain[len(names) :]
        first, second = (
            type(moments[0]).__tensor_unflatten__(dict(zip(names, half, strict=True)), context, None, None)
            for half, context in zip(halves, contexts, strict=True)
        )
        adam.single_param_adam(p, grad, step, first, second, None, lr, 0.9, 0.999, 0.01, 1e-8, True, True)
        return ()

    simulate_h100(gpu)
    options = dict(decompositions=select_decomp_table(), keep_inference_input_mutations=True)
    compiled = aot_function(update, fw_compiler=generate, inference_compiler=generate, **options)
    with pytest.raises(Generated) as generated, torch.no_grad():
        compiled(p, torch.empty_like(p), *numbers, *plain)
    per_entry = most_allocated(str(generated.value)) / p.numel()
    scale_of_blocks = 2 * 4 / block
    estimated = compiled_scratch_bytes(bits)
    assert estimated <= per_entry <= estimated + scale_of_blocks + 1e-3
