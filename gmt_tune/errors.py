"""The error that the person who wrote the command or the config is meant to read, and words that its message needs."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["UserError"]


class UserError(Exception):
    """One sentence that names what is wrong and what would be right; shown without a traceback."""


class UserErrorOfOneRank(UserError):
    """What only this process has met, such as a row of its share of the data: shown whatever the process's rank."""


def one_line(error: BaseException, *, with_type: bool = False) -> str:
    """An error's message without line breaks, if asked behind its type, which is all where there is no message."""
    message, kind = " ".join(str(error).split()), type(error).__name__
    return (f"{kind}: {message}" if with_type else message) if message else kind


def did_you_mean(
    word: str, known: Iterable[str], otherwise: str = "", *, prefix: str = "", most: int = 1, cutoff: float = 0.6
) -> str:
    """What a wrong word may have been meant to be: "did you mean lr?"; else ``otherwise``, or "it takes betas, lr".

    ``prefix``, such as a section, stands before a right word; ``most`` are named, at least ``cutoff`` near, 0 to 1.
    """
    known = sorted(known)
    but_for_case = [name for name in known if name.lower() == word.lower()]
    near = but_for_case[:most] or get_close_matches(word, known, n=most, cutoff=cutoff)
    if near:
        return f"did you mean {' or '.join(prefix + match for match in near)}?"
    return otherwise or f"it takes {', '.join(known) or 'none'}"
