"""Hugging Face Trainer and everything built on it (TRL, Axolotl): the mask as a ``TrainerCallback``."""

from gmt_tune.integrations.transformers.versions import check_versions, problem_of_trl

check_versions()  # before the names that an old release lacks are imported

from transformers.utils import logging  # noqa: E402

from gmt_tune.integrations.transformers.callback import GradientMaskCallback  # noqa: E402

if (problem := problem_of_trl()) is not None:
    logging.get_logger(__name__).warning(problem)

__all__ = ["GradientMaskCallback"]
