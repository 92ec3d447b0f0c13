"""A torchtune metric logger that writes gmt-tune's run log: losses and times of recipes that are not ours."""

from collections.abc import Mapping

from torchtune.training.metric_logging import MetricLoggerInterface

from gmt_tune.reporting.run_log import RunLog


class RunLogMetricLogger(MetricLoggerInterface):
    """
    Writes ``run_log.jsonl`` as our recipes do by themselves.

    Args:
        output_dir (str): the run's folder.
    """

    def __init__(self, output_dir: str) -> None:
        self._log = RunLog(output_dir)
        self._log.truncate_after(0)

    def log(self, name: str, data: float, step: int) -> None:
        """One number of a step."""
        self._log.log(step, {name: data})

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Several numbers of a step."""
        self._log.log(step, payload)

    def log_config(self, config) -> None:
        """Not kept: the result of a run has it."""

    def close(self) -> None:
        """Nothing is open between two lines."""
