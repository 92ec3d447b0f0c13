"""What the masking functions refuse, said in one sentence: which key, which value, what would be right."""

import difflib
import functools
import inspect
import json
import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch

SCOPES = ("tensor", "global")
SCORES = ("magnitude", "saliency", "random")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_density(value: Any) -> float:
    """The density as a float, if it is a real number in (0, 1].

    Raises:
        ValueError: if it is not.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if is_number and 0 < value <= 1:
        return float(value)
    hint = f"; for {value} percent write {value / 100:g}" if is_number and 1 < value <= 100 else ""
    raise ValueError(
        f"density must be a number above 0 and at most 1 (0.2 keeps a fifth of the gradient's entries), "
        f"got {value!r}{hint}"
    )


def check_scope(value: object) -> str:
    """The scope, if it is one of ``SCOPES``; else raises ValueError."""
    return _check_choice("scope", value, SCOPES)


def check_score(value: object) -> str:
    """The name of a score, if it is one of ``SCORES``; else raises ValueError."""
    return _check_choice("score", value, SCORES)


def check_int(key: str, value: object) -> int:
    """The value, if it is a whole number; else raises TypeError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{key} must be a whole number, got {value!r}")
    return value


def check_refresh_every(value: object) -> int | None:
    """The value, if it is a whole number of steps or None; else raises ValueError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"refresh_every must be a whole number of optimizer steps from 1 on, or null to select once, got {value!r}"
        )
    return value


def check_patterns(key: str, patterns: Any) -> tuple[str, ...]:
    """Name patterns as a tuple, if they are a list of strings or None; else raises TypeError."""
    if patterns is None:
        return ()
    if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f'{key} must be a list of name patterns such as ["*norm*"], got {patterns!r}')
    return tuple(patterns)


def check_policy(policy: Any) -> dict[str, Any]:
    """A mask's policy as it is after being saved: plain numbers, texts, lists and dicts; else raises TypeError."""
    plain = {}
    for key, value in policy.items():
        try:
            plain[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            raise TypeError(
                "policy() of the gradient mask must give numbers, texts, lists and dicts of these, as a checkpoint can "
                f"hold them, got {type(value).__name__} under {key!r}: convert it, such as by float(), list() or str()"
            ) from None
    return plain


def check_answer(method: str, value: Any) -> bool:
    """What a method answered, if it is true or false; else raises TypeError."""
    if value not in (True, False):  # NumPy's are equal to these
        raise TypeError(f"{method} must return True or False, got {value!r}")
    return bool(value)


def check_dtype(tensor: Any) -> None:
    """Raises TypeError unless the tensor (or product) is dense and float32, bfloat16 or float16."""
    if tensor.layout != torch.strided:
        raise TypeError("gradients must be dense, got a sparse one: set sparse=False on the embedding")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"gradients must be float32, bfloat16 or float16, got {tensor.dtype}")


def _check_choice(key: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}")
    return value


Init = TypeVar("Init", bound=Callable[..., None])


def names_unknown_keys(init: Init) -> Init:
    """Let a misspelt keyword fail with the nearest right one; ``inspect.signature`` still sees the original."""
    known = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def checked(self, *args, **kwargs):
        for key, value in kwargs.items():
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean '{nearest[0]}'?" if nearest else f"it takes {', '.join(known[1:])}"
                raise TypeError(f"{type(self).__name__} has no argument '{key}' (given {value!r}): {hint}")
        init(self, *args, **kwargs)

    return cast(Init, checked)  # type checkers see the original too
