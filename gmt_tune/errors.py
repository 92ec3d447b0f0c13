"""The error that the person who wrote the command or the config is meant to read."""


class UserError(Exception):
    """One sentence that names what is wrong and what would be right; shown without a traceback."""


class UserErrorOfOneRank(UserError):
    """What only this process has met, such as a row of its share of the data: shown whatever the process's rank."""


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
