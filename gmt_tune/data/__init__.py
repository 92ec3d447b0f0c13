"""Data of the quickstart, and the evaluation that a recipe runs before and after training."""

from gmt_tune.data.exact_match import ExactMatch
from gmt_tune.data.quickstart import quickstart_dataset

__all__ = ["ExactMatch", "quickstart_dataset"]
