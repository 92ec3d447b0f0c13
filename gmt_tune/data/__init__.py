"""Data of the quickstarts, and the evaluations that a recipe runs before and after training."""

from gmt_tune.data.exact_match import ExactMatch
from gmt_tune.data.preference_accuracy import PreferenceAccuracy
from gmt_tune.data.quickstart import quickstart_dataset, quickstart_preference_dataset

__all__ = ["ExactMatch", "PreferenceAccuracy", "quickstart_dataset", "quickstart_preference_dataset"]
