"""Compile all kernels for a GPU, which need not be there: python compile_kernels.py cuda:80 [few]

Fails where the compiler refuses one, or where the entries of one are not loaded 16 bytes at a time. ``few`` compiles
one kind of each.
"""

import itertools
import re
import sys

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gmt_tune.masking.draws import ROUNDS
from gmt_tune.masking.places import RUN, SEGMENT
from gmt_tune.masking.search.entries import Product
from gmt_tune.masking.search.kernels import apply, apply_packed, count, draw, narrow, pack, place, sample
from gmt_tune.masking.search.kernels.tables import make_table
from gmt_tune.masking.search.triton import BINS
from gmt_tune.optim.kernels import carry, gather, update

backend, arch = sys.argv[1].split(":")
IS_FEW = "few" in sys.argv
TARGET = GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)
NOT_INT64_POINTERS = {"chunk_tensors": "*i32", "largest": "*i32", "smallest": "*i32", "search_steps": "i32"}


def compile_kernel(kernel, num_warps, types=NOT_INT64_POINTERS, **constants):
    names = kernel.arg_names
    assert set(constants) <= set(names), set(constants) - set(names)
    types = {name: types.get(name, "*i64") for name in names}
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


def wide_loads(compiled, width: str = "v4") -> int:
    return len(re.findall(rf"ld\.global\.{width}\.b32", compiled.asm["ptx"])) if backend == "cuda" else 1


CASES = [
    (torch.float32, make_table([[torch.ones(64)]])),
    (torch.bfloat16, make_table([[Product(torch.ones(64).bfloat16(), torch.ones(64).bfloat16())]])),
    (torch.bfloat16, make_table([[torch.ones(64).bfloat16()]])),
    (torch.float16, make_table([[torch.ones(64).half()]])),
    (torch.float32, make_table([[Product(torch.ones(64).bfloat16(), torch.ones(64))]])),
    (torch.float32, make_table([[torch.ones(64).half()]], [torch.ones(64)])),
]

for dtype, table in CASES[: 2 if IS_FEW else None]:
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
    own = {"TILE": place.TILE, "SEGMENT": SEGMENT, "SEGMENTS": place.CHUNK // SEGMENT}
    counting = compile_kernel(place._count_kernel, 8, **constants, **own)
    types = NOT_INT64_POINTERS | {"tensors": "i32"}
    placing = compile_kernel(place._place_kernel, 8, types, **constants, **own, RUN=RUN)
    assert all(map(wide_loads, (packing, unpacking, drawing, counting, placing))), (constants, "narrow loads")

FLOATS = [tl.float32, tl.bfloat16, tl.float16]
LOOKUP = {"SEGMENT": SEGMENT, "RUN": RUN}
NUMBERS = {"tensors": "i32"}
for dtype, is_sparse, (adds, checks) in itertools.product(
    FLOATS[1:2] if IS_FEW else FLOATS, (True, False), [(False, False), (False, True), (True, True)]
):
    constants = dict(GRAD=dtype, ADDS=adds, CHECKS=checks, IS_SPARSE=is_sparse, TILE=gather.TILE, TILES=gather.TILES)
    gathering = compile_kernel(gather._gather_kernel, 4, NUMBERS, **constants, IS_ALIGNED=True, **LOOKUP)
    assert wide_loads(gathering) or not (checks or is_sparse), (constants, "narrow loads")
compile_kernel(gather._gather_kernel, 4, NUMBERS, **constants, IS_ALIGNED=False, **LOOKUP)
for dtype, places, block, lr_on_device in itertools.product(
    FLOATS[1:2] if IS_FEW else FLOATS, ("offsets", "bits", "all"), (0, 256), (True,) if IS_FEW else (True, False)
):
    numbers = ("lr", "decay", "weight1", "weight2", "log_beta1", "log_beta2", "eps")
    types = NUMBERS | dict.fromkeys(numbers, "fp32") | {"first_qmap": "*fp32", "second_qmap": "*fp32"}
    types |= {"lr": "*fp32", "decay": "*fp32"} if lr_on_device else {}
    constants = dict(WEIGHT=dtype, GRAD=dtype, BY_CHANCE=dtype == tl.bfloat16, BLOCK=block)
    constants |= dict(IS_WHOLE=places == "all", IS_SPARSE=places == "offsets")
    constants["STATE"] = tl.uint8 if block else tl.float32
    age = dict(AGE=tl.int32, OLDEST=2**31 - 1) if dtype == tl.float32 else dict(AGE=tl.int16, OLDEST=2**15 - 1)
    age = dict(AGE=tl.float32, OLDEST=0) if places == "all" else age
    tiles = {"TILE": update.TILE, "TILES": update.TILES}
    updating = compile_kernel(
        update._update_kernel, 8, types, **constants, **age, LR_ON_DEVICE=lr_on_device, **tiles, **LOOKUP
    )
    assert wide_loads(updating, r"v[24]"), (constants, "narrow loads")  # of bfloat16, 4 entries a thread
kinds = list(itertools.product((True, False), (True, False), (0, 256)))  # now, before, block
for is_sparse, was_sparse, block in [(True, False, 256), (False, True, 0)] if IS_FEW else kinds:
    types = NUMBERS | {"first_qmap": "*fp32", "second_qmap": "*fp32"}
    constants = dict(IS_SPARSE=is_sparse, WAS_SPARSE=was_sparse, BLOCK=block, STATE=tl.uint8 if block else tl.float32)
    tiles = {"TILE": carry.TILE, "TILES": carry.TILES, "AGE": tl.int32 if block else tl.int16}
    compile_kernel(carry._carry_kernel, 8, types, **constants, **tiles, **LOOKUP)
print("compiled")
