"""Which parameters a mask masks, which are dense or frozen, and by which names it knows them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gmt_tune.masking.flat import FlatShard
from gmt_tune.masking.names import bare_names

#: What is dense where nobody says: norms, under the names of most models ("input_layernorm", "sa_norm", "q_norm"),
#: though not GPT-2's ("ln_1", "ln_f"). That it matches nothing, or what is frozen, is no mistake of the user's: configs
#: write it out, so its value counts, whoever gives it.
DEFAULT_DENSE = ("*norm*",)


class MaskedParameters:
    """The parameters of one model, sorted by name patterns.

    Args:
        named_parameters: pairs of name and parameter.
        dense: name patterns; those of ``DEFAULT_DENSE`` may match nothing, and leave to ``frozen`` what both match.
        frozen: name patterns; parameters that it matches stop requiring gradients.

    Attributes:
        masked: name by parameter, without what wrappers put into the name; those that are unfrozen later join it.
        names: the same of all parameters.

    Raises:
        TypeError, ValueError: if a pattern matches nothing, two kinds match one name, or nothing is left to mask.
    """

    def __init__(self, named_parameters: Any, dense: Sequence[str], frozen: Sequence[str]) -> None:
        parameters, self._given_names = _check_named_parameters(named_parameters)
        is_default = tuple(dense) == DEFAULT_DENSE
        self._dense = _match("dense", dense, self._given_names, must_match=not is_default)
        self._frozen = _match("frozen", frozen, self._given_names)
        if is_default:
            self._dense -= self._frozen
        for name in self._dense & self._frozen:
            raise ValueError(f"'{name}' matches both dense and frozen: remove it from one of the two")
        for name in self._frozen:
            parameters[name].requires_grad_(False)
        self._shards: Mapping[Tensor, FlatShard] = {}  # in place of the model's parameters
        self._within: dict[Tensor, list[Tensor]] = {}  # the shards in a flat tensor
        self.names = {p: name for name, p in parameters.items()}
        self.masked = {p: name for name, p in parameters.items() if name not in self._dense and p.requires_grad}
        if not self.masked:
            remedy = "dense=[] masks norms as well" if is_default else "remove patterns from dense and frozen"
            raise ValueError(
                f"no parameter is left to mask: all are dense, frozen, or do not require gradients; {remedy}"
            )

    def flatten(self, shards: Mapping[Tensor, FlatShard]) -> None:
        """Take, from now on, shards of flat tensors for the model's parameters that lie in these."""
        models: dict[Tensor, Tensor] = {shard: p for p, shard in self._shards.items()}

        def now(p: Tensor) -> Tensor:
            return shards.get(models.get(p, p), p)

        self.names = {now(p): name for p, name in self.names.items()}
        self.masked = {now(p): name for p, name in self.masked.items()}
        self._shards, self._within = shards, {}
        for shard in shards.values():
            self._within.setdefault(shard.within, []).append(shard)

    def stepped(self) -> set[Tensor]:
        """What an optimizer steps of the masked parameters: these, or the flat tensors that they lie in."""
        return {p.within if isinstance(p, FlatShard) else p for p in self.masked}

    def held(self, group: dict[str, Any]) -> list[Tensor]:
        """The parameters of an optimizer's parameter group; of a flat one, the shards in it."""
        return [p for held in group["params"] for p in self._within.get(held, [held])]

    def maskable(self) -> dict[str, Tensor]:
        """By name: what is masked, or will be once it requires gradients."""
        unmasked = self._dense | self._frozen
        return {name: p for p, name in self.names.items() if name not in unmasked}

    def is_dense(self, p: Tensor) -> bool:
        return self.names[p] in self._dense

    def dense(self) -> list[Tensor]:
        return [p for p in self.names if self.is_dense(p)]

    def join(self, p: Tensor) -> None:
        """Mask a parameter from now on that did not require gradients when the mask was made, if it is now trained."""
        name = self.names[p]
        if p in self.masked or name in self._dense:
            return
        if name in self._frozen:
            raise ValueError(
                f"'{name}' is frozen in the gradient mask and requires gradients again: remove its pattern from "
                "frozen, or leave requires_grad off"
            )
        self.masked[p] = name

    def sort(self, optimizer: Optimizer, is_trained: Callable[[Tensor], bool]) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters of an optimizer that are masked, and those that are dense; those that are trained join.

        Raises:
            ValueError: if it trains others, which would be updated in full without a word.
        """
        masked, dense, unknown = [], [], []
        for number, group in enumerate(optimizer.param_groups):
            for i, p in enumerate(self.held(group)):
                if p not in self.names:
                    if is_trained(p) and group.get("gradient_mask") is not False:
                        names = None if self._within else group.get("param_names")
                        unknown.append(f"'{names[i]}'" if names else f"{i} of group {number}, shape {tuple(p.shape)}")
                    continue
                if is_trained(p):
                    self.join(p)
                if p in self.masked:
                    masked.append(p)
                elif self.is_dense(p):
                    dense.append(p)
        if unknown:
            shown = "; ".join(unknown[:3]) + (f"; and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            raise ValueError(
                f"the optimizer trains parameters that the gradient mask does not know (parameter {shown}): make the "
                "mask from the named_parameters() of the whole model, after its layers were added, resized or wrapped, "
                "or, to update parameters beside the model in full, give them a parameter group with "
                "'gradient_mask': False"
            )
        return masked, dense

    def translate(self, names: Iterable[str]) -> dict[str, str]:
        """Saved names to these: those of earlier releases hold what wrappers put into them."""
        names = list(names)
        bare = dict(zip(names, bare_names(names), strict=True)) | {n: b for b, n in self._given_names.items()}
        return {name: name if name in self._given_names else bare[name] for name in names}


def _check_named_parameters(named_parameters) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters by their bare names, and the names as they were given."""
    try:
        pairs = [(name, p) for name, p in named_parameters if isinstance(name, str) and isinstance(p, Tensor)]
    except (TypeError, ValueError):
        pairs = []
    if not pairs:
        raise TypeError("named_parameters must be pairs of name and parameter: pass model.named_parameters()")
    for name, p in pairs:
        if getattr(p, "_fsdp_flattened", False):
            raise ValueError(
                f"'{name}' was flattened by FSDP version 1, so that its entries are no tensor with a threshold: "
                "shard with torch.distributed.fsdp.fully_shard (FSDP2)"
            )
    parameters: dict[str, Tensor] = {}
    given: dict[str, str] = {}
    seen = set()
    for name, (given_name, p) in zip(bare_names([name for name, _ in pairs]), pairs, strict=True):
        if p in seen:  # tied, with remove_duplicate=False
            continue
        if name in parameters:
            raise ValueError(f"named_parameters holds the name '{name}' twice: pass those of one model")
        seen.add(p)
        parameters[name], given[name] = p, given_name
    return parameters, given


def _match(key: str, patterns: Sequence[str], given_names: dict[str, str], must_match: bool = True) -> set[str]:
    """The bare names that a pattern matches, as they are or as they were given."""
    matched: set[str] = set()
    for pattern in patterns:
        names = {
            name for name, given in given_names.items() if fnmatchcase(name, pattern) or fnmatchcase(given, pattern)
        }
        if not names and must_match:
            some = ", ".join(list(given_names)[:3])
            raise ValueError(f"{key}: the pattern {pattern!r} matches no parameter; names look like {some}")
        matched |= names
    return matched
