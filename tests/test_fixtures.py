"""What tests compare in loops is there, or they fail."""

import pytest


def test_weights_and_logs_that_are_not_there_fail(final_weights, logged_metrics, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "log.txt").touch()
    with pytest.raises(AssertionError, match="no weights in"):
        final_weights(tmp_path)
    with pytest.raises(AssertionError, match="nothing was logged in"):
        logged_metrics(tmp_path)
