"""The error that a command's user is meant to read."""

from gmt_tune.errors import UserError

__all__ = ["UserError"]
