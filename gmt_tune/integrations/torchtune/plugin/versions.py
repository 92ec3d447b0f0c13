"""Makes torchtune 0.6.1 importable with today's torchao, or says in one sentence why that cannot be.

torchtune's development ended with 0.6.1. It imports names from torchao that later releases removed or
moved; each is listed in ``_NEEDED`` below. What is missing is filled in, and nothing that exists is
touched:

- ``torchao.dtypes.nf4tensor`` (moved in 0.18) becomes an alias of the module's new place;
- the removed post-training quantization functions become functions that raise a clear error when they
  are called. Only torchtune's own quantization recipe calls them; no training code does.
"""

import importlib
import importlib.metadata
import re
import sys
from collections.abc import Callable

TORCHTUNE_VERSION = "0.6.1"
PIP_LINE = f'pip install "torch>=2.6" "torchtune=={TORCHTUNE_VERSION}" "torchao>=0.11,!=0.12.*,<0.19"'

# What torchtune 0.6.1 imports from torchao when it is imported: (module, name).
_NEEDED = (
    ("torchao.dtypes", "TensorCoreTiledLayout"),
    ("torchao.dtypes.nf4tensor", "NF4Tensor"),
    ("torchao.dtypes.nf4tensor", "linear_nf4"),
    ("torchao.dtypes.nf4tensor", "to_nf4"),
    ("torchao.dtypes.nf4tensor", "implements"),
    ("torchao.quantization", "int4_weight_only"),
    ("torchao.quantization", "int8_dynamic_activation_int4_weight"),
    ("torchao.quantization", "quantize_"),
    ("torchao.quantization.qat", "Int4WeightOnlyQATQuantizer"),
    ("torchao.quantization.qat", "Int8DynActInt4WeightQATQuantizer"),
    ("torchao.quantization.qat.linear", "disable_4w_fake_quant"),
    ("torchao.quantization.qat.linear", "disable_8da4w_fake_quant"),
    ("torchao.quantization.qat.linear", "enable_4w_fake_quant"),
    ("torchao.quantization.qat.linear", "enable_8da4w_fake_quant"),
)
_REMOVED = (
    ("torchao.dtypes", "TensorCoreTiledLayout"),
    ("torchao.quantization", "int4_weight_only"),
    ("torchao.quantization", "int8_dynamic_activation_int4_weight"),
)
_MOVED = {"torchao.dtypes.nf4tensor": "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"}


class VersionError(ImportError):
    """The installed torch, torchao and torchtune cannot work together; the message holds the remedy."""


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution as pip shows it, or None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_torchtune_version() -> str | None:
    """One sentence where another torchtune than the supported one is installed, else None."""
    found = installed_version("torchtune")
    # A local suffix such as 0.6.1+cpu names a build, not another release.
    if found is not None and found.split("+")[0] == TORCHTUNE_VERSION:
        return None
    return f"gmt-tune works with torchtune {TORCHTUNE_VERSION}, found {found or 'none'}: run {PIP_LINE}"


def check_before_torchao() -> None:
    """End a ``tune`` command whose torchao cannot even be imported, with one sentence and no traceback.

    Other programs are left alone: they may have their own use for that torchao.

    Raises:
        SystemExit: with the sentence.
    """
    problem = _known_bad_torchao()
    if problem is not None and _is_tune_command():
        raise SystemExit(_with_remedy(problem))


def make_torchtune_importable() -> None:
    """Check the versions and fill in what torchtune 0.6.1 misses in the installed torchao.

    Raises:
        VersionError: if torchtune could not be imported even so. Under the ``tune`` command this is a
            ``SystemExit`` with the same sentence, so that its user sees no traceback.
    """
    if check_torchtune_version() is not None:
        return  # another torchtune: not ours to change; our recipes refuse it by themselves
    problem = _torch_problem() or _known_bad_torchao() or _fill_in_torchao()
    if problem is None:
        return
    if _is_tune_command():
        raise SystemExit(_with_remedy(problem))
    raise VersionError(_with_remedy(problem))


def _with_remedy(problem: str) -> str:
    return f"gmt-tune: {problem}; to mend it, run: {PIP_LINE}"


def _is_tune_command() -> bool:
    program = re.split(r"[\\/]", sys.argv[0] if sys.argv else "")[-1]
    return re.fullmatch(r"tune(\.exe|-script\.py)?", program) is not None


def _known_bad_torchao() -> str | None:
    version = installed_version("torchao")
    if version is None:
        return "torchao is not installed"
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < (0, 11) or numbers == (0, 12):
        return f"torchao {version} does not work with torchtune {TORCHTUNE_VERSION} (0.11 and 0.13 to 0.18 do)"
    return None


def _torch_problem() -> str | None:
    version = installed_version("torch") or "0"
    numbers = [int(part) for part in re.findall(r"\d+", version)[:2]]
    return None if numbers >= [2, 6] else f"torch {version} is too old (2.6 or newer is needed)"


def _fill_in_torchao() -> str | None:
    """Add what is missing; return a clause that says what still stands in the way, or None."""
    version = installed_version("torchao")
    try:
        importlib.import_module("torchao")
        for old, new in _MOVED.items():
            _alias_module(old, new)
        for module_name, name in _REMOVED:
            module = importlib.import_module(module_name)
            if not hasattr(module, name):
                setattr(module, name, _removed_function(module_name, name, version))
        missing = [
            f"{module_name}.{name}"
            for module_name, name in _NEEDED
            if not hasattr(importlib.import_module(module_name), name)
        ]
    except Exception as error:  # whatever torchao raises while it is imported, its user needs the remedy
        torch_version = installed_version("torch")
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        return f"torchao {version} cannot be used with torch {torch_version} and torchtune ({first_line})"
    if missing:
        return f"torchao {version} lacks what torchtune {TORCHTUNE_VERSION} imports ({', '.join(missing)})"
    return None


def _alias_module(old: str, new: str) -> None:
    try:
        importlib.import_module(old)
    except ModuleNotFoundError:
        module = importlib.import_module(new)
        sys.modules[old] = module
        parent, _, child = old.rpartition(".")
        setattr(importlib.import_module(parent), child, module)


def _removed_function(module_name: str, name: str, version: str | None) -> Callable:
    def removed(*args, **kwargs):
        raise NotImplementedError(
            f"{module_name}.{name} was removed from torchao before {version}; torchtune's post-training "
            "quantization needs it: install torchao 0.15.0, or quantize with torchao.quantization.quantize_"
        )

    removed.__name__ = removed.__qualname__ = name
    return removed
