"""Compile all kernels for a GPU, which need not be there: python compile_kernels.py cuda:80 [few]

Fails where the compiler refuses one, or where the entries of one are not loaded 16 bytes at a time.
"""

import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gmt_tune.masking.draws import ROUNDS
from gmt_tune.masking.search.entries import Product
from gmt_tune.masking.search.kernels import apply, apply_packed, count, draw, narrow, pack, sample
from gmt_tune.masking.search.kernels.tables import make_table
from gmt_tune.masking.search.triton import BINS

backend, arch = sys.argv[1].split(":")
TARGET = GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)
NOT_INT64_POINTERS = {"chunk_tensors": "*i32", "largest": "*i32", "smallest": "*i32", "search_steps": "i32"}


def compile_kernel(kernel, num_warps, **constants):
    names = kernel.arg_names
    assert set(constants) <= set(names), set(constants) - set(names)
    types = {name: NOT_INT64_POINTERS.get(name, "*i64") for name in names}
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs=constants,
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name not in constants and types[name][0] == "*"
        },
    )
    return triton.compile(source, target=TARGET, options={"num_warps": num_warps})


def wide_loads(compiled) -> int:
    return len(re.findall(r"ld\.global\.v4\.b32", compiled.asm["ptx"])) if backend == "cuda" else 1


CASES = [
    (torch.float32, make_table([[torch.ones(64)]])),
    (torch.bfloat16, make_table([[Product(torch.ones(64).bfloat16(), torch.ones(64).bfloat16())]])),
    (torch.bfloat16, make_table([[torch.ones(64).bfloat16()]])),
    (torch.float16, make_table([[torch.ones(64).half()]])),
    (torch.float32, make_table([[Product(torch.ones(64).bfloat16(), torch.ones(64))]])),
    (torch.float32, make_table([[torch.ones(64).half()]], [torch.ones(64)])),
]

for dtype, table in CASES[: 2 if "few" in sys.argv else None]:
    constants, bins = table.constants, BINS
    unaligned = {name: value for name, value in constants.items() if name != "SECOND_ALIGNED"}
    key_bits = 31 if dtype == torch.float32 else 15
    compile_kernel(sample._sample_kernel, 16, **unaligned, KEY_BITS=key_bits, BINS=bins, SAMPLE=sample.SAMPLE)
    compile_kernel(narrow._narrow_kernel, 1, NAN=constants["NAN"], BINS=bins)
    tiles = {"TILE": count.TILE, "TILES": count.CHUNK // count.TILE}
    for is_first in (True, False):
        counting = compile_kernel(count._count_kernel, 4, **constants, **tiles, BINS=bins, IS_FIRST=is_first)
        assert wide_loads(counting) or constants["RANKED_BY"] != "first", (constants, "narrow loads")
    tiles = {"TILE": apply.TILE, "TILES": apply.CHUNK // apply.TILE}
    assert wide_loads(compile_kernel(apply._apply_kernel, 8, **constants, **tiles)), (constants, "narrow loads")
    own = {"TILE": pack.TILE, "TILES": pack.CHUNK // pack.TILE}
    packing = compile_kernel(pack._pack_kernel, 8, **constants, **own)
    unpacking = compile_kernel(apply_packed._apply_packed_kernel, 8, FIRST_INT=constants["FIRST_INT"], **own)
    drawing = compile_kernel(draw._draw_kernel, 8, FIRST_INT=constants["FIRST_INT"], ROUNDS=ROUNDS, **own)
    assert all(map(wide_loads, (packing, unpacking, drawing))), (constants, "narrow loads")
print("compiled")
