"""The error that the person who wrote the command or the config is meant to read."""


class UserError(Exception):
    """One sentence that names what is wrong and what would be right; shown without a traceback."""


class UserErrorOfOneRank(UserError):
    """What only this process has met, such as a row of its share of the data: shown whatever the process's rank."""
