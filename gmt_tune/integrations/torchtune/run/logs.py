"""Where a run's numbers go: the config's metric logger, and the files that ``gmt-tune report`` draws."""

from collections.abc import Mapping

from torchtune import utils
from torchtune.training.metric_logging import StdoutLogger

from gmt_tune.reporting.mask_metrics import MaskMetrics, for_a_line
from gmt_tune.reporting.run_log import RunLog

log = utils.get_logger("INFO")


class RunLogs:
    """Logs the numbers of a run; rank 0 has one, with ``mask_metrics`` None where there is no mask."""

    def __init__(self, metric_logger, run_log: RunLog, mask_metrics: MaskMetrics | None) -> None:
        self._metric_logger, self._run_log, self._mask_metrics = metric_logger, run_log, mask_metrics
        # The config's own, in what hides secrets from it
        self._prints = isinstance(getattr(metric_logger, "_logger", metric_logger), StdoutLogger)
        self._has_logger_failed = False

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        by_group = {}
        if self._mask_metrics is not None:
            metrics = {**metrics, **self._mask_metrics.totals()}
            # For the metric logger alone: the report has the same by parameter
            by_group = self._mask_metrics.by_group(self._run_log.log_mask(step, self._mask_metrics.detail))
        self.log(step, metrics, by_group)

    def log(self, step: int, metrics: Mapping[str, float], for_logger_alone: Mapping[str, float] | None = None) -> None:
        given = {**metrics, **(for_logger_alone or {})}
        try:
            self._metric_logger.log_dict(for_a_line(given) if self._prints else given, step=step)
        except OSError as error:  # such as a full disk, which somebody may make room on before the next checkpoint
            if not self._has_logger_failed:
                log.warning(f"metric_logger cannot write ({error}): training goes on, and numbers may be missing.")
            self._has_logger_failed = True
        self._run_log.log(step, metrics)
