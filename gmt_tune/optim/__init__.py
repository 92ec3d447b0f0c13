"""Optimizers whose states exist for selected entries alone."""

from gmt_tune.optim.compact_adamw import CompactAdamW

__all__ = ["CompactAdamW"]
