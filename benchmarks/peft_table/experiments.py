"""Which configs run with which learning rates, and what each is called in the table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gmt_tune.errors import UserError

HERE = Path(__file__).parent

# Of a file of configs/: its type in the table, and learning rates. Full fine-tuning has the comparison's own; for the
# others the best is unknown, and the lower the density, the higher it has been in docs/results.md.
_GRID = {
    "full": ("full-finetuning", (1e-5,)),
    "masked_0.2": ("GMT", (1e-5, 3e-5)),
    "compact_0.2": ("GMT_COMPACT", (1e-5, 3e-5, 1e-4)),
    "compact_0.05": ("GMT_COMPACT", (3e-5, 1e-4, 3e-4)),
}


@dataclass(frozen=True)
class Experiment:
    """A row of the table.

    Attributes:
        method: name of a file of ``configs/``.
        peft_type: as the table shows it.
        learning_rate: at its highest.
    """

    method: str
    peft_type: str
    learning_rate: float

    @property
    def name(self) -> str:
        """As the comparison names experiments: method/model-variant."""
        method, _, density = self.method.partition("_")
        folder = "full-finetuning" if method == "full" else f"gmt-{method}"
        return f"{folder}/llama-3.2-3B-{f'density{density}-' if density else ''}lr_{self.learning_rate:g}"

    @property
    def config(self) -> Path:
        """Its file, for ``tune run gmt_full_finetune``."""
        return config_file(self.method)


def config_file(method: str) -> Path:
    """The file of ``configs/``."""
    return HERE / "configs" / f"{method}.yaml"


def methods() -> list[str]:
    """All, in the order of the table."""
    return list(_GRID)


def experiments(names: list[str], learning_rate: float | None = None) -> list[Experiment]:
    """Rows of the table.

    Args:
        names: of methods; none for all.
        learning_rate: this one alone, in the grid or not.

    Raises:
        UserError: if there is no such method.
    """
    unknown = [name for name in names if name not in _GRID]
    if unknown:
        raise UserError(f"there is no method '{unknown[0]}': choose from {', '.join(_GRID)}")
    rows = [(name, *_GRID[name]) for name in names or _GRID]
    return [
        Experiment(name, kind, rate)
        for name, kind, rates in rows
        for rate in (rates if learning_rate is None else (learning_rate,))
    ]
