"""The methods: what each changes in a model, in the Trainer's arguments, callbacks and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from gmt_tune import GradientMask
from gmt_tune.errors import UserError

LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_NOT_MATRICES = ["*norm*", "*embed*"]  # what GaLore, APOLLO, LoRA and LIFT leave out


@dataclass
class Setup:
    """What a Trainer is given.

    Attributes:
        model: that is trained.
        arguments: of TrainingArguments, besides those that all methods share.
        callbacks: of the Trainer.
        optimizer: None lets the Trainer make the one that ``arguments`` names.
    """

    model: nn.Module
    arguments: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Sequence[Any] = ()
    optimizer: torch.optim.Optimizer | None = None


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        title: for the table.
        set_up: function of a model, a learning rate, a seed and ``options``.
        options: of the method itself; a result is valid as long as they stay as they are.
        packages: distributions whose versions belong to a result, besides those of all.
        start: the learning rates that are tried first, of ``LADDER``.
        source: why these.
        processes: how two processes share the work: "DDP" or "FSDP2".
    """

    title: str
    set_up: Callable[..., Setup]
    options: Mapping[str, Any]
    packages: tuple[str, ...]
    start: tuple[float, ...]
    source: str
    processes: str = "DDP"


class LowRankMagnitude(GradientMask):
    """LIFT's rule (Liu et al., ICML 2025): the largest entries of a low-rank approximation of the weight.

    Args:
        named_parameters, density, **options: as GradientMask takes them.
        rank: of the approximation, by a randomized singular value decomposition.
    """

    def __init__(self, named_parameters, density, *, rank: int, **options) -> None:
        super().__init__(named_parameters, density, **options)
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be a whole number from 1 on, got {rank!r}")
        self.rank = rank

    def compute_score(self, name: str, parameter: Tensor, grad: Tensor) -> Tensor:
        weight = parameter.detach().float()
        if weight.ndim != 2:
            return weight
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        left, values, right = torch.svd_lowrank(whole, q=min(self.rank, *whole.shape))
        score = (left * values) @ right.T
        if isinstance(weight, DTensor):  # of the first rank, whose random numbers made it
            return distribute_tensor(score, weight.device_mesh, weight.placements)
        return score

    def policy(self) -> dict:
        return {**super().policy(), "rank": self.rank}


def method(name: str) -> Method:
    """A method by its name.

    Raises:
        UserError: if there is none of that name.
    """
    if name not in METHODS:
        raise UserError(f"there is no method '{name}': choose from {', '.join(METHODS)}")
    return METHODS[name]


# ---------------------------------------------------------------------- how each is meant to be used on the Trainer


def _of_trainer(model: nn.Module, rate: float, seed: int, *, optim: str, **optim_args: Any) -> Setup:
    """An optimizer that TrainingArguments can name; with ``optim_args``, one that projects gradients of matrices."""
    arguments: dict[str, Any] = {"optim": optim}
    if optim_args:
        arguments["optim_target_modules"] = "all-linear"
        arguments["optim_args"] = ", ".join(f"{key}={value}" for key, value in optim_args.items())
    return Setup(model, arguments)


def _badam(model: nn.Module, rate: float, seed: int, *, switch_block_every: int, switch_mode: str) -> Setup:
    from badam import BlockOptimizer

    torch.manual_seed(seed)  # of the order of blocks
    optimizer = BlockOptimizer(
        base_optimizer=torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0),
        named_parameters_list=list(model.named_parameters()),
        switch_block_every=switch_block_every,
        switch_mode=switch_mode,
        verbose=0,
    )
    return Setup(model, optimizer=optimizer)


def _flash_adamw(model: nn.Module, rate: float, seed: int, *, master_weight_bits: int | None) -> Setup:
    from flashoptim import FlashAdamW

    optimizer = FlashAdamW(model.parameters(), lr=rate, weight_decay=0.0, master_weight_bits=master_weight_bits)
    return Setup(model, optimizer=optimizer)


def _lora(model: nn.Module, rate: float, seed: int, **config: Any) -> Setup:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return Setup(get_peft_model(model, LoraConfig(target_modules="all-linear", **config)))


def _shira(model: nn.Module, rate: float, seed: int, **config: Any) -> Setup:
    from peft import ShiraConfig, get_peft_model

    return Setup(get_peft_model(model, ShiraConfig(target_modules="all-linear", random_seed=seed, **config)))


def _mask(model: nn.Module, rate: float, seed: int, *, optim: str = "adamw_torch", **options: Any) -> Setup:
    from gmt_tune.integrations.transformers import GradientMaskCallback

    return Setup(model, {"optim": optim}, [GradientMaskCallback(seed=seed, **options)])


def _lift(model: nn.Module, rate: float, seed: int, **options: Any) -> Setup:
    return _mask(model, rate, seed, mask_class=LowRankMagnitude, **options)


_FULL = (3e-5, 1e-4, 3e-4)
_SPARSE = (1e-4, 3e-4, 1e-3)
_ADAPTER = (3e-4, 1e-3, 3e-3)
_COMPACT = {"dense": ["*norm*"], "refresh_every": 10, "compact": True}

METHODS: dict[str, Method] = {
    "adamw": Method(
        "full AdamW (torch, fused)", _of_trainer, {"optim": "adamw_torch_fused"}, (), _FULL,
        "around 1e-4, as in docs/results.md",
    ),
    "gmt_0.2": Method(
        "GMT 0.2, masked AdamW (ours)", _mask,
        {"density": 0.2, "dense": ["*norm*"], "optim": "adamw_torch_fused"}, (), _FULL, "those of full AdamW"
    ),
    "compact_0.2": Method(
        "compact 0.2, every 10 steps (ours)", _mask, {"density": 0.2, **_COMPACT}, (), _SPARSE,
        "up to three times those of full AdamW, as docs/results.md found", "FSDP2",
    ),
    "compact_0.05": Method(
        "compact 0.05, every 10 steps (ours)", _mask, {"density": 0.05, **_COMPACT}, (), _SPARSE,
        "those of compact 0.2", "FSDP2",
    ),
    "lora_16": Method(
        "LoRA, rank 16", _lora, {"r": 16, "lora_alpha": 32}, ("peft",), _ADAPTER,
        "3e-4, torchtune's for LoRA, and above, for a model this small",
    ),
    "shira_16": Method(
        "SHiRA, as many entries as LoRA", _shira, {"r": 16}, ("peft",), _ADAPTER, "those of LoRA",
    ),
    "lift_0.05": Method(
        "LIFT's rule 0.05, selected once, compact (ours)", _lift,
        {"density": 0.05, "rank": 128, "refresh_every": None, "frozen": _NOT_MATRICES, "compact": True}, (), _SPARSE,
        "1e-4 to 5e-4 in its paper", "FSDP2",
    ),
    "badam": Method(
        "BAdam", _badam, {"switch_block_every": 1, "switch_mode": "random"}, ("badam",), _SPARSE,
        "above those of full AdamW, since a layer moves at one step of 30",
    ),
    "apollo": Method(
        "APOLLO, rank 128", _of_trainer, {"optim": "apollo_adamw", "rank": 128}, ("apollo-torch",), _FULL,
        "those of full AdamW; 5e-6 to 2e-4 in its paper",
    ),
    "adamw8bit": Method(
        "AdamW8bit (torchao)", _of_trainer, {"optim": "adamw_torch_8bit"}, ("torchao",), _FULL, "those of full AdamW"
    ),
    "galore": Method(
        "GaLore, rank 128", _of_trainer, {"optim": "galore_adamw", "rank": 128}, ("galore-torch",), _SPARSE,
        "three times those of full AdamW: its scale is 0.25",
    ),
    "flash_adamw": Method(
        "FlashAdamW", _flash_adamw, {"master_weight_bits": 24}, ("flashoptim",), _FULL, "those of full AdamW"
    ),
}  # fmt: skip
