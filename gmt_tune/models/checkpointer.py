"""torchtune's checkpointer of Hugging Face folders, for families whose weights torchtune does not map.

Reading and writing files, shards and their index stay torchtune's. A family is a module with two functions:
``hf_to_tune(weights, config)`` and its inverse ``tune_to_hf(weights, config)``, where ``weights`` are tensors by name
and ``config`` is the folder's config.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune import training
from torchtune.training.checkpointing import _checkpointer
from torchtune.training.checkpointing._utils import ModelType

from gmt_tune.errors import UserError, did_you_mean, one_line

OWN_FAMILIES = ("gmt_tune.models.gemma2", "gmt_tune.models.qwen3")

# What torchtune's class reads of every config.json, and gives to functions that it does not call here.
_SIZES = ("num_attention_heads", "num_key_value_heads", "hidden_size")


def family_of(model_type: object, key: str = "checkpointer.model_type") -> ModuleType | None:
    """The module that a ``model_type`` names; None for one of torchtune's, such as ``LLAMA3``.

    Raises:
        UserError: if it is neither, cannot be imported, or lacks one of the two functions.
    """
    if str(model_type) in ModelType.__members__:
        return None
    try:
        module = import_module(str(model_type))
    except Exception as error:  # a module may raise anything when it is imported
        known = [*ModelType.__members__, *OWN_FAMILIES]
        otherwise = "set it to one such as LLAMA3, or to a module with hf_to_tune and tune_to_hf"
        raise UserError(
            f"{key} is {model_type}, which is no model type of torchtune and no module that can be "
            f"imported ({one_line(error)}): {did_you_mean(str(model_type), known, otherwise)}"
        ) from None
    lacking = [name for name in ("hf_to_tune", "tune_to_hf") if not callable(getattr(module, name, None))]
    if lacking:
        raise UserError(
            f"{key} is {model_type}, a module without {' and '.join(lacking)}: name one of "
            f"torchtune's model types, or a module with both, such as {OWN_FAMILIES[-1]}"
        )
    return module


class FullModelHFCheckpointer(training.FullModelHFCheckpointer):
    """torchtune's checkpointer of the same name, whose ``model_type`` may also be the dotted path of a family's module.

    The arguments are otherwise torchtune's. Reading converts back once, without values, so that functions that are not
    inverse to each other, by names and shapes, are noticed before anything is trained.

    Raises:
        UserError: if ``model_type`` names no family; when reading, if ``tune_to_hf`` does not give the names and shapes
            that ``hf_to_tune`` was given. What ``hf_to_tune`` leaves out, such as copies of tied embeddings, is not
            written.
    """

    _config: dict[str, Any]
    _weight_map: dict[str, str]

    def __init__(
        self,
        checkpoint_dir: str,
        checkpoint_files: list[str] | dict[str, str],
        model_type: str,
        output_dir: str,
        adapter_checkpoint: str | None = None,
        recipe_checkpoint: str | None = None,
        resume_from_checkpoint: bool = False,
        safe_serialization: bool = True,
        should_load_recipe_state: bool = False,
    ) -> None:
        self._family = family_of(model_type)
        super().__init__(
            checkpoint_dir=checkpoint_dir,
            checkpoint_files=checkpoint_files,
            model_type=model_type if self._family is None else ModelType.LLAMA3.name,  # those with no way of their own
            output_dir=output_dir,
            adapter_checkpoint=adapter_checkpoint,
            recipe_checkpoint=recipe_checkpoint,
            resume_from_checkpoint=resume_from_checkpoint,
            safe_serialization=safe_serialization,
            should_load_recipe_state=should_load_recipe_state,
        )

    def load_checkpoint(self) -> dict[str, Any]:
        """The weights by torchtune's names, under the key ``model``."""
        with self._conversions():
            return super().load_checkpoint()

    def save_checkpoint(
        self,
        state_dict: dict[str, Any],
        epoch: int,
        intermediate_checkpoint: bool = False,
        adapter_only: bool = False,
    ) -> None:
        """Write what :meth:`load_checkpoint` gave, each weight into the file of the same number as it was read from.

        Args:
            state_dict: the weights by torchtune's names, under the key ``model``.
            epoch: number in the name of the folder that is written.
            intermediate_checkpoint: write the recipe's state too, if ``state_dict`` has it.
            adapter_only: write an adapter's weights alone.
        """
        with self._conversions():
            super().save_checkpoint(state_dict, epoch, intermediate_checkpoint, adapter_only)

    @contextmanager
    def _conversions(self) -> Iterator[None]:
        """Within it, torchtune's class calls the family's functions where it would call its own for Llama."""
        if self._family is None:
            yield
            return
        given, config = _checkpointer.convert_weights, self._config
        _checkpointer.convert_weights = SimpleNamespace(
            hf_to_tune=lambda weights, **sizes: self._to_tune(weights, config),
            tune_to_hf=lambda weights, **sizes: self._family.tune_to_hf(weights, config),
        )
        self._config = dict.fromkeys(_SIZES) | config  # a family may call them otherwise
        try:
            yield
        finally:
            _checkpointer.convert_weights, self._config = given, config

    def _to_tune(self, weights: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
        assert self._family is not None
        converted = self._call("hf_to_tune", weights, config)
        shapes = {name: weight.to("meta") for name, weight in converted.items()}
        with _NoChanges():
            back = self._call("tune_to_hf", shapes, config)
        wrong = [name for name in back if name not in weights or back[name].shape != weights[name].shape]
        if wrong:
            raise UserError(
                f"{self._family.__name__}: tune_to_hf makes {wrong[0]} {list(back[wrong[0]].shape)} of what hf_to_tune "
                "gives, which the files in checkpoint_dir do not have: make it the inverse"
            )
        lost = [name for name in weights if name not in back]
        if lost and _entries(back) < _entries(converted):
            raise UserError(
                f"{self._family.__name__}: tune_to_hf leaves out entries of what hf_to_tune gives, and does not make "
                f"{lost[0]}, which the files in checkpoint_dir have: make it the inverse"
            )
        # A file, or the index, would name what was left out
        self._weight_map = {name: file for name, file in self._weight_map.items() if name in back}
        return converted

    def _call(self, function: str, weights: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
        try:
            return getattr(self._family, function)(weights, config)
        except UserError:
            raise
        except Exception as error:  # anything that the function of a family may raise
            raise UserError(
                f"{self._family.__name__}: {function} fails ({type(error).__name__}: {one_line(error)}): choose the "  # type: ignore[union-attr]
                "model_type that fits the files in checkpoint_dir, or mend the function"
            ) from error


class _NoChanges(TorchDispatchMode):
    """Refuses to change tensors in place: when a model is saved, each weight is there only while it is written."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            raise TypeError(f"{func} changes a tensor in place: make a new one")
        return func(*args, **(kwargs or {}))


def _entries(weights: dict[str, Tensor]) -> int:
    return sum(weight.numel() for weight in weights.values())
