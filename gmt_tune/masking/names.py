"""Parameter names without what wrappers put into them.

Patterns, saved states and the key of the random score see the bare name, so that compiling, checkpointing
activations, sharding or averaging a model selects the same entries.
"""

from collections.abc import Iterable, Sequence

# The attributes under which wrappers keep the module they wrap, where no model of its own has such a name:
# activation checkpointing and offloading, FSDP1, torch.compile, Fabric, FairScale, PyTorch/XLA, TorchRec.
_WRAPPERS = frozenset(
    {
        "_checkpoint_wrapped_module",
        "_fsdp_wrapped_module",
        "_orig_mod",
        "_forward_module",
        "_fpw_module",
        "_orig_module",
        "_dmp_wrapped_module",
    }
)
# DistributedDataParallel, DataParallel, AveragedModel, DeepSpeed's engine and others call it ``module``, as a model
# may call a part of its own. A wrapper has no other part.
_SOLE = "module"


def bare_name(name: str) -> str:
    """A name without the wrappers that the name alone shows: all but those called ``module``."""
    return ".".join(_without_wrappers(name))


def bare_names(names: Iterable[str]) -> list[str]:
    """The names of one model's parameters without what wrappers put into them, in the same order.

    Args:
        names: of all parameters; ``module`` is a wrapper's where everything beside it is below it.
    """
    return [".".join(path) for path in _without_sole_modules([_without_wrappers(name) for name in names])]


def _without_wrappers(name: str) -> tuple[str, ...]:
    *parents, last = name.split(".")
    return (*(part for part in parents if part not in _WRAPPERS), last)


def _without_sole_modules(paths: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    while paths and all(len(path) > 1 and path[0] == _SOLE for path in paths):
        paths = [path[1:] for path in paths]
    below: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        if len(path) > 1:
            below.setdefault(path[0], []).append(i)
    bare = list(paths)
    for head, members in below.items():
        for i, rest in zip(members, _without_sole_modules([paths[i][1:] for i in members]), strict=True):
            bare[i] = (head, *rest)
    return bare
