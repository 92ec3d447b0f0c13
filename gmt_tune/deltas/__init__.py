"""A fine-tune as a small file: which entries of a base model's weights changed, and by which bits.

A delta holds the exclusive or of old and new bits of every entry that differs, so that the same file turns the base
into the tuned model and the tuned model back into the base, bit for bit; ``file_format`` says how it is laid out.
"""

from gmt_tune.deltas.file_format import Delta
from gmt_tune.deltas.folders import rebuild
from gmt_tune.deltas.making import LargeDeltaError, Made, make_delta
from gmt_tune.deltas.running_model import apply_delta_
from gmt_tune.deltas.shira import write_adapter

__all__ = ["Delta", "LargeDeltaError", "Made", "apply_delta_", "make_delta", "rebuild", "write_adapter"]
