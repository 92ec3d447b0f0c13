"""Families of models, one package each, and what they share: tokenizers, losses, the checkpointer.

What is exported here is imported on first use, so that what needs no torchtune does not import it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmt_tune.models.chat_tokenizer import ChatTokenizer
    from gmt_tune.models.checkpointer import FullModelHFCheckpointer

__all__ = ["ChatTokenizer", "FullModelHFCheckpointer"]

_MODULES = {"ChatTokenizer": "chat_tokenizer", "FullModelHFCheckpointer": "checkpointer"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"gmt_tune.models.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'gmt_tune.models' has no attribute '{name}'")
