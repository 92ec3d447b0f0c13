"""Loops over entries on the CPU, in C++: built by the machine's own compiler when they are first used.

What PyTorch does in ten passes, they do in one. Where there is no compiler, PyTorch's operations do the same, to
rounding.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

ENTRIES = Path(__file__).with_name("entries.cpp")
FLOATS = (torch.bfloat16, torch.float32)  # of which it can read entries
_PLAIN = (Tensor, torch.nn.Parameter)
_HEADER = Path(__file__).with_name("places.h")
# Multiplications and additions are not fused behind our back: results are those of PyTorch's operations
_FLAGS = "-std=c++17 -O3 -fPIC -ffp-contract=off -fno-math-errno -fno-trapping-math".split()
_CPU_FLAGS = {"AVX2": ["-march=x86-64-v3"], "AVX512": ["-march=x86-64-v4"]}
_folders: list[tempfile.TemporaryDirectory] = []  # of this process


def serves(*tensors: Tensor) -> bool:
    """Whether these are what C++ can work on: plain, contiguous tensors in the CPU's own memory."""
    for t in tensors:  # a loop, for it is asked hundreds of times in a step
        if type(t) not in _PLAIN or not t.is_cpu or t.layout != torch.strided or not t.is_contiguous():
            return False
    return True


def load_for(*values: Tensor) -> ctypes.CDLL | None:
    """The library of ``entries.cpp``, where it serves tensors of floats, all of the same dtype."""
    same = values[0].dtype in FLOATS and all(value.dtype == values[0].dtype for value in values)
    return load(ENTRIES) if same and serves(*values) else None


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def entries(values: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64, int]:
    """How C++ is given a tensor: where its entries are, how many, and the bytes of each."""
    return pointer(values), ctypes.c_int64(values.numel()), values.element_size()


@functools.cache
def load(source: Path, more_flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The library built from a source file, once for all processes of a user; None, with a warning, where it cannot be.

    Loops run on as many threads as they are given, those of PyTorch.

    Args:
        source: a file in C++.
        more_flags: of the compiler, behind ours.
    """
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CXX", ""), "g++", "c++", "clang++"])), None)
    if compiler is None:
        _warn("there is no C++ compiler")
        return None
    flags = [*_FLAGS, *_CPU_FLAGS.get(torch.backends.cpu.get_cpu_capability(), []), *more_flags]
    key = hashlib.sha256(source.read_bytes() + _HEADER.read_bytes() + " ".join([compiler, *flags]).encode())
    target = _cache() / f"{source.stem}_{key.hexdigest()[:16]}.so"
    try:
        if not target.exists():
            _build(compiler, flags, source, target)
        return ctypes.CDLL(str(target))
    except subprocess.CalledProcessError as error:
        _warn(f"{compiler} failed: {' '.join(error.stderr.split())[:300] or f'exit status {error.returncode}'}")
    except OSError as error:
        _warn(str(error))
    return None


def _build(compiler: str, flags: list[str], source: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built, object_file = Path(folder, "built.so"), Path(folder, "built.o")
        run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
        # Not linked to OpenMP: its functions are found in the library that PyTorch has loaded, so the threads are its
        run([compiler, *flags, "-fopenmp", "-c", str(source), "-o", str(object_file)])
        run([compiler, "-shared", str(object_file), "-o", str(built)])
        os.replace(built, target)


def _cache() -> Path:
    """A folder that nobody else can write to: what lies there is run."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gmt_tune"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
        if found.st_uid == os.geteuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # no home
        pass
    _folders.append(tempfile.TemporaryDirectory(prefix="gmt_tune_"))
    return Path(_folders[-1].name)


def _warn(reason: str) -> None:
    warnings.warn(
        f"{reason}: on the CPU, gradient masks and CompactAdamW use PyTorch's own operations, which do the same and "
        "take longer. What they lack is a C++ compiler, as the package g++ has it",
        stacklevel=4,
    )
