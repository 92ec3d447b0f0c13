"""Makes torchtune 0.6.1 importable with today's torchao, or says in one sentence why that cannot be.

torchtune's development ended with 0.6.1, and later releases of torchao moved or removed names that it imports. Those
are filled in, and nothing that exists is touched. The removed ones are quantization functions that only torchtune's own
quantization recipe calls: they become functions that raise a clear error.
"""

import importlib
import re
import sys
from collections.abc import Callable

from gmt_tune._installed import installed_version, release

TORCHTUNE_VERSION = "0.6.1"
_TORCH_OF_TORCHAO_0_18 = (2, 10)

_REMOVED = (
    ("torchao.dtypes", "TensorCoreTiledLayout"),
    ("torchao.quantization", "int4_weight_only"),
    ("torchao.quantization", "int8_dynamic_activation_int4_weight"),
)
_MOVED = {"torchao.dtypes.nf4tensor": "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"}  # in 0.18


class VersionError(ImportError):
    """The installed torch, torchao and torchtune cannot work together; the message holds the remedy."""


def pip_line() -> str:
    """The command that installs what works with the installed torch."""
    is_old = (2, 6) <= release(installed_version("torch") or "0") < _TORCH_OF_TORCHAO_0_18
    below = "0.18" if is_old else "0.19"
    return f'pip install "torch>=2.6" "torchtune=={TORCHTUNE_VERSION}" "torchao>=0.11,!=0.12.*,<{below}"'


def check_torchtune_version() -> str | None:
    """One sentence where another torchtune than the supported one is installed, else None."""
    found = installed_version("torchtune")
    # A local suffix such as 0.6.1+cpu names a build, not another release.
    if found is not None and found.split("+")[0] == TORCHTUNE_VERSION:
        return None
    return f"gmt-tune works with torchtune {TORCHTUNE_VERSION}, found {found or 'none'}: run {pip_line()}"


def check_before_torchao() -> None:
    """End a ``tune`` command, no other program, whose torchao cannot be imported: one sentence, no traceback."""
    if _is_tune_command():
        _raise_if(_problem_of_versions())


def make_torchtune_importable() -> None:
    """Fill in what torchtune misses in the installed torchao; raises VersionError, under ``tune`` SystemExit."""
    if check_torchtune_version() is None:  # another torchtune is not ours to change; our recipes refuse it
        _raise_if(_problem_of_versions() or _fill_in_torchao())


def _raise_if(problem: str | None) -> None:
    if problem is not None:
        sentence = f"gmt-tune: {problem}; to mend it, run: {pip_line()}"
        raise SystemExit(sentence) if _is_tune_command() else VersionError(sentence)


def _is_tune_command() -> bool:
    program = re.split(r"[\\/]", sys.argv[0] if sys.argv else "")[-1]
    return re.fullmatch(r"tune(\.exe|-script\.py)?", program) is not None


def _problem_of_versions() -> str | None:
    torch, torchao = installed_version("torch") or "0", installed_version("torchao")
    if release(torch) < (2, 6):
        return f"torch {torch} is too old (2.6 or newer is needed)"
    if torchao is None:
        return "torchao is not installed"
    if not (0, 11) <= release(torchao) <= (0, 18) or release(torchao) == (0, 12):
        return f"torchao {torchao} does not work with torchtune {TORCHTUNE_VERSION} (0.11 and 0.13 to 0.18 do)"
    if release(torchao) == (0, 18) and release(torch) < _TORCH_OF_TORCHAO_0_18:
        return f"torchao {torchao} needs torch 2.10 or newer, found {torch}"
    return None


def _fill_in_torchao() -> str | None:
    """Add what is missing; return a clause that says what stands in the way, or None."""
    version = installed_version("torchao")
    try:
        for old, new in _MOVED.items():
            try:
                importlib.import_module(old)
            except ModuleNotFoundError:
                sys.modules[old] = importlib.import_module(new)
                parent, _, child = old.rpartition(".")
                setattr(importlib.import_module(parent), child, sys.modules[old])
        for module_name, name in _REMOVED:
            module = importlib.import_module(module_name)
            if not hasattr(module, name):
                setattr(module, name, _removed_function(module_name, name, version))
    except Exception as error:  # whatever torchao raises while it is imported, its user needs the remedy
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        return f"torchao {version} cannot be used with torch {installed_version('torch')} and torchtune ({first_line})"
    return None


def _removed_function(module_name: str, name: str, version: str | None) -> Callable:
    def removed(*args, **kwargs):
        raise NotImplementedError(
            f"{module_name}.{name} was removed from torchao before {version}; torchtune's post-training "
            "quantization needs it: install torchao 0.15.0, or quantize with torchao.quantization.quantize_"
        )

    removed.__name__ = removed.__qualname__ = name
    return removed
