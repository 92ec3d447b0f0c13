"""Lets autograd run backward on simulated CUDA tensors, on a machine that has PyTorch for CUDA and no driver."""

import ctypes
import functools
from pathlib import Path

import torch

from gmt_tune.errors import UserError
from gmt_tune.masking import native

_SOURCE = Path(__file__).with_name("driver.cpp")


@functools.cache
def answer_without_driver() -> None:
    """Once in a process, before autograd's first backward pass, which looks for devices.

    What it changes lasts, and only what has no driver can notice it.

    Raises:
        UserError: if PyTorch is no build for CUDA, or there is no C++ compiler.
    """
    if torch.version.cuda is None:
        raise UserError(
            f"a GPU can be simulated only with a build of PyTorch for CUDA, and this is {torch.__version__}: make an "
            "environment of its own with `pip install torch==2.14.1`, or leave --measure out for the estimate alone"
        )
    if torch.cuda.is_available():
        return
    from torch.utils.cpp_extension import include_paths

    version = f"-DFOR={torch.__version__}"  # built once for each
    library = native.load(_SOURCE, ("-std=c++20", "-O1", version, *(f"-I{path}" for path in include_paths())))
    if library is None:
        raise UserError("a GPU can be simulated only where a C++ compiler is, such as the package g++: install it")
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
    get_hooks = torch_cpu._ZN2at6detail12getCUDAHooksEv  # at::detail::getCUDAHooks()
    get_hooks.restype = ctypes.c_void_p
    library.answer_without_driver(ctypes.c_void_p(get_hooks()))
    torch._C._ensureCUDADeviceGuardSet()
