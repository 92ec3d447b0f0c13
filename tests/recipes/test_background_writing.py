"""A process knows whether it is writing a checkpoint, also while it trains on."""

import pytest

from gmt_tune.integrations.torchtune.checkpoint.run_checkpoints import RunCheckpoints
from gmt_tune.integrations.torchtune.run import signals


@pytest.mark.parametrize("is_async", [False, True])
def test_a_checkpoint_that_is_being_written_is_seen(is_async, tmp_path, tiny_config, run_recipe, monkeypatch):
    write, seen = RunCheckpoints._write, []

    def watched(*args):
        seen.append(signals.is_writing())
        return write(*args)

    monkeypatch.setattr(RunCheckpoints, "_write", watched)
    run_recipe(tiny_config(tmp_path, max_steps_per_epoch=2, enable_async_checkpointing=is_async))
    assert seen == [True] and not signals.is_writing()
