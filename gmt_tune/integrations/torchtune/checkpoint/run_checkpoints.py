"""A run's checkpoints: saving at any step, and going on from the newest whole one.

A checkpoint is an ordinary model folder in the format of the config's checkpointer (for Hugging Face models
with config, tokenizer and generation files), plus the training state. How a folder becomes whole or stays absent is
in ``folder``; what the training state holds, in ``state``.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchtune import utils
from torchtune.training import FullModelHFCheckpointer

from gmt_tune.deltas import make_delta
from gmt_tune.errors import UserError, one_line
from gmt_tune.integrations.torchtune import process_group
from gmt_tune.integrations.torchtune.checkpoint import folder as folders
from gmt_tune.integrations.torchtune.checkpoint import state as training_state
from gmt_tune.integrations.torchtune.checkpoint.exchange import Position, TrainingParts
from gmt_tune.integrations.torchtune.checkpoint.finding import find_checkpoint, new_run_from
from gmt_tune.integrations.torchtune.checkpoint.lock import FileLock, lock_folder
from gmt_tune.integrations.torchtune.checkpoint.manifest import Checkpoint, Progress, read_checkpoint
from gmt_tune.integrations.torchtune.checkpoint.model import model_files, write_model, writes_one_by_one
from gmt_tune.integrations.torchtune.checkpoint.model_card import model_card
from gmt_tune.integrations.torchtune.checkpoint.shards import ShardWriter
from gmt_tune.integrations.torchtune.checkpoint.space import check_space
from gmt_tune.integrations.torchtune.checkpoint.weights import copied, one_by_one
from gmt_tune.integrations.torchtune.checkpoint.writer import (
    Lookout,
    Mark,
    Writer,
    attempt,
    has_failed,
    make_marks,
    take_written,
    wait_for_others,
)
from gmt_tune.integrations.torchtune.config.inputs import inputs_in
from gmt_tune.integrations.torchtune.config.public import environment_checks, public_config
from gmt_tune.models.origin import CARD, read_base
from gmt_tune.reporting.run_log import write_whole
from gmt_tune.reporting.weights_reader import DELTA

log = utils.get_logger("INFO")

# Network file systems may show a new folder to other nodes a little later.
SECONDS_UNTIL_SHARED = 5.0


class RunCheckpoints:
    """Saves and finds the checkpoints of one run, by the recipe's config; all ranks call its methods together.

    Attributes:
        resumed: what the run goes on from.
        last_saved: the newest checkpoint that this run wrote or goes on from.
        seconds: spent in :meth:`save`.
    """

    def __init__(self, cfg: DictConfig, rank: int, world_size: int) -> None:
        self.output_dir = Path(cfg.checkpointer.output_dir)
        self.save_every_n_steps = cfg.get("save_every_n_steps", None)
        self.keep_last_n = cfg.get("keep_last_n_checkpoints", None)
        self.resumed: Checkpoint | None = None
        self.last_saved: Path | None = None
        self.seconds = 0.0
        self._save_delta = cfg.get("save_delta", False)
        self._cfg, self._rank, self._world_size = cfg, rank, world_size
        self._public_config, self._environment = public_config(cfg), environment_checks(cfg)
        self._inputs: dict[str, str] = {}
        self._locks: list[FileLock] = []
        self._is_async = bool(cfg.get("enable_async_checkpointing", False))
        self._pending: tuple[Writer, Path, str] | None = None
        # Read now: the model's folder need not be there for long
        writes_card = rank == 0 and cfg.get("save_model_card", True)
        self._base = read_base(Path(cfg.checkpointer.checkpoint_dir)) if writes_card else None

    def find(self, dataset_rows: int, rows_of_a_step: int) -> DictConfig:
        """Look for the checkpoint to go on from, on rank 0 for all.

        Args:
            dataset_rows, rows_of_a_step: of this run, as a manifest's ``Progress`` has them.

        Returns:
            The checkpointer's config: as given, or reading its weights from the newest whole checkpoint.

        Raises:
            UserError: if the config or the data contradict that checkpoint, or the ranks do not share a folder.
        """
        self._dataset_rows, self._rows_of_a_step = dataset_rows, rows_of_a_step
        self._check_shared()
        found = [None, None]
        if self._rank == 0:
            found = attempt(self._find_on_rank_zero)
        with process_group.waiting_longer():
            dist.broadcast_object_list(found, src=0)
        _raise_if(found[1])
        self.resumed = found[0]
        checkpointer = OmegaConf.create(OmegaConf.to_container(self._cfg.checkpointer, resolve=True))
        if self.resumed is not None:
            self.last_saved = self.resumed.path
        if self.resumed is not None and self.resumed.progress.model_files:  # else complete, with a delta alone
            checkpointer.checkpoint_dir = str(self.resumed.path)
            checkpointer.checkpoint_files = self.resumed.progress.model_files
            checkpointer.recipe_checkpoint = None
        return checkpointer

    def _find_on_rank_zero(self) -> Checkpoint | None:
        config = OmegaConf.to_container(self._cfg, resolve=True)
        self._inputs = inputs_in(config, self.output_dir)
        found = find_checkpoint(self._cfg, self._inputs, self._world_size, self._dataset_rows, self._rows_of_a_step)
        if found is not None:
            self._put_in_order(found.path.name)  # what a run that was killed right after a save has not done
        return found

    def _check_shared(self) -> None:
        """Raise on all ranks if one of them does not see the folder that rank 0 writes to."""
        name: list = [uuid.uuid4().hex, None]
        if self._rank == 0:
            folder = folders.incomplete_path(self.output_dir, name[0])
            name[1] = attempt(self._lock)[1] or attempt(lambda: folders.make_incomplete(folder))[1]
        dist.broadcast_object_list(name, src=0)
        _raise_if(name[1])
        probe = folders.incomplete_path(self.output_dir, name[0])
        deadline = time.monotonic() + SECONDS_UNTIL_SHARED
        while not probe.is_dir() and time.monotonic() < deadline:
            time.sleep(0.1)
        seen = self._of_all_ranks(probe.is_dir())
        if self._rank == 0:
            probe.rmdir()
        if not all(seen):
            raise UserError(
                f"output_dir {self.output_dir} is not the same folder for all processes: rank {seen.index(False)} "
                "does not see what rank 0 writes; choose an output_dir on a file system that all nodes share"
            )

    def _lock(self) -> None:
        """Keep other runs out of this run's folders, until :meth:`close` or the end of this process."""
        for folder in dict.fromkeys((self.output_dir, Path(self._cfg.output_dir))):
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(folder, log.warning)
            if lock is not None:
                self._locks.append(lock)

    def close(self) -> None:
        """Let other runs write to this run's folders."""
        for lock in self._locks:
            lock.release()
        self._locks.clear()

    def check_space(self, parts: TrainingParts, epochs: int, steps_per_epoch: int) -> None:
        """Raise on all ranks if the checkpoints to come would not fit on the disk, by an estimate.

        It leaves nothing to spare: it refuses only what cannot end well.
        """
        steps = range(self.resumed.step + 1 if self.resumed else 1, epochs * steps_per_epoch)
        saves = sum(self.is_due(step) or step % steps_per_epoch == 0 for step in steps)
        result = [None, None]
        if self._rank == 0 and not (self.resumed and self.resumed.progress.is_final):
            result = attempt(lambda: check_space(self.output_dir, parts, saves, self.keep_last_n))
        dist.broadcast_object_list(result, src=0)
        _raise_if(result[1])

    def restore(self, parts: TrainingParts) -> dict | None:
        """Put the training state of the checkpoint that the run goes on from back, as ``state.restore`` does."""
        assert self.resumed is not None
        is_same_world = self.resumed.progress.world_size == self._world_size
        return training_state.restore(self.resumed.path / training_state.FOLDER, parts, is_same_world=is_same_world)

    def new_run(self) -> str:
        """The overrides of a new run from the weights of what this run goes on from."""
        assert self.resumed is not None
        return new_run_from(self.resumed, self._cfg)

    def is_due(self, global_step: int) -> bool:
        """Whether ``save_every_n_steps`` asks for a checkpoint at this step."""
        return bool(self.save_every_n_steps) and global_step % self.save_every_n_steps == 0

    def save(self, name: str, parts: TrainingParts, position: Position) -> None:
        """Write a checkpoint at a step boundary; all ranks fail if one does.

        With ``enable_async_checkpointing`` the state is copied and written in the background while training goes
        on; the next save, and :meth:`finish`, wait for it.

        Args:
            name: ``step_N`` or ``epoch_N``.

        Raises:
            UserError: if it could not be written, such as on a full disk; checkpoints before it are untouched.
        """
        start = time.perf_counter()
        self.finish()
        folder = folders.incomplete_path(self.output_dir, name)
        error = None
        if self._rank == 0:
            error = attempt(lambda: self._prepare(folder, position.is_final))[1]
        self._agree(error, folder, name)
        # Before the weights are gathered, for which all ranks meet: from then on rank 0 sees who lives
        mark = Mark(folder, self._rank)
        weights: contextlib.AbstractContextManager[dict[str, Tensor]]
        if self._is_async or not writes_one_by_one(parts.checkpointer):
            weights = contextlib.nullcontext(copied(parts.model, parts.device, keep=self._is_async))
        else:
            weights = one_by_one(parts.model, parts.device, Lookout(folder).look)
        state = None
        if not position.is_final:
            state = training_state.plan_save(folder / training_state.FOLDER, parts, copy=self._is_async)
        progress = Progress(
            **asdict(position),
            world_size=self._world_size,
            rows_of_a_step=self._rows_of_a_step,
            dataset_rows=self._dataset_rows,
            config=self._public_config,
            environment=self._environment,
            model_files=[],
        )
        writer = Writer(lambda: self._write(folder, name, parts, weights, state, progress, mark))
        self._pending = (writer, folder, name)
        writer.start()
        if not self._is_async:
            self.finish()
        self.seconds += time.perf_counter() - start

    def finish(self) -> None:
        """Wait until a checkpoint that is being written is whole.

        Raises:
            UserError: on all ranks, if it could not be written.
        """
        if self._pending is None:
            return
        (writer, folder, name), self._pending = self._pending, None
        writer.wait()
        if writer.has_lost_rank:  # whom a collective would wait for
            reason = folders.by_final_name(str(writer.error))
            raise UserError(
                f"the checkpoint {self.output_dir / name} is not whole: {reason}. Go on with "
                f"resume_from_checkpoint: True; the last whole checkpoint: {self.last_saved or 'none yet'}"
            )
        with process_group.waiting_longer():
            self._agree(writer.error, folder, name)
        self.last_saved = self.output_dir / name
        if self._rank == 0:
            log.info(f"Saved {self.last_saved}.")

    def describe_last(self, parts: TrainingParts) -> None:
        """Write the model card of the newest checkpoint once more: the run has logged more numbers since."""
        saved = read_checkpoint(self.last_saved) if self._base is not None and self.last_saved is not None else None
        if saved is None or not (saved.path / CARD).is_file():
            return
        self._write_card(saved.path, saved.path.name, parts, saved.progress)

    def _write_card(self, folder: Path, name: str, parts: TrainingParts, progress: Progress) -> None:
        """On rank 0: a checkpoint's README.md, if the config wants one."""
        if self._base is None:
            return
        try:
            text = model_card(
                folder,
                name,
                progress,
                base=self._base,
                policy=parts.mask.policy() if parts.mask is not None else None,
                parameters=sum(p.numel() for p in parts.model.parameters()),
                is_hugging_face=isinstance(parts.checkpointer, FullModelHFCheckpointer),
                run_dir=Path(self._cfg.output_dir),
            )
            write_whole(folder / CARD, text.encode(errors="replace"))
        except Exception as error:  # of a component of the user's own, say: a checkpoint is worth more than its card
            log.warning(f"{name} gets no {CARD}, which could not be written: {one_line(error, with_type=True)}")

    def _write_delta(self, folder: Path, name: str) -> bool:
        """On rank 0: write what an epoch's weights changed of the base, if the config wants it; whether it did."""
        if not self._save_delta or not name.startswith("epoch_"):
            return False
        try:
            made = make_delta(Path(self._cfg.checkpointer.checkpoint_dir), folder, folder / DELTA)
        except (UserError, OSError) as error:  # the weights are there, of which `gmt-tune delta` can make it
            log.warning(f"{name} has whole weights and no {DELTA}: {folders.by_final_name(one_line(error))}")
            return False
        log.info(f"{name}/{DELTA}: {made}.")
        return True

    def _prepare(self, folder: Path, is_final: bool) -> None:
        folders.make_incomplete(folder)
        if not is_final:
            (folder / training_state.FOLDER).mkdir()
        make_marks(folder, self._world_size)

    def _write(
        self,
        folder: Path,
        name: str,
        parts: TrainingParts,
        weights: contextlib.AbstractContextManager[dict[str, Tensor]],
        state: ShardWriter | None,
        progress: Progress,
        mark: Mark,
    ) -> None:
        """This rank's files; on rank 0 also, once all ranks have written theirs, the model's, and the final name."""
        try:
            with weights as by_name:
                try:
                    written = mark.write(state.write if state is not None else bytes)
                finally:
                    if self._rank == 0:
                        wait_for_others(folder)  # also after an error, for which all ranks are about to meet
                if self._rank > 0 or has_failed(folder):
                    return
                write_model(parts.checkpointer, by_name, folder, self._newest_model_folder())
        finally:
            mark.release()
        by_others = take_written(folder)
        if state is not None:
            state.finish([written, *by_others])
        progress = replace(progress, model_files=model_files(folder))
        self._write_card(folder, name, parts, progress)
        if self._write_delta(folder, name) and self._save_delta == "only" and progress.is_final:
            for file in (*progress.model_files, "model.safetensors.index.json"):
                (folder / file).unlink(missing_ok=True)
            progress = replace(progress, model_files=[])
            self._write_card(folder, name, parts, progress)
        _, earlier = folders.complete(folder, name, progress)
        if earlier is not None:
            log.warning(f"Kept what had the name {name} before as {earlier}: delete it if it is of no use.")
        self._put_in_order(name)

    def _put_in_order(self, newest: str) -> None:
        """Discard what ``keep_last_n_checkpoints`` does not keep, and name the best; the newest always stays."""
        try:
            if self.keep_last_n:
                best = folders.best(self.output_dir)
                keep = {newest, *self._inputs, *((best.path.name,) if best is not None else ())}
                folders.keep_newest(self.output_dir, self.keep_last_n, keep)
            folders.mark_best(self.output_dir)
        except OSError as error:  # such as a file that somebody reads, on NFS; the new checkpoint is whole
            log.warning(f"After {newest} was saved, older checkpoints could not be put in order: {error}")

    def _newest_model_folder(self) -> Path:
        """Where config, tokenizer and generation files are copied from: the checkpoint before may be deleted by now."""
        given = Path(self._cfg.checkpointer.checkpoint_dir)
        return self.last_saved if self.last_saved is not None and self.last_saved.is_dir() else given

    def _of_all_ranks(self, value) -> list:
        gathered = [None] * self._world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def _agree(self, error: str | None, folder: Path, name: str) -> None:
        """Raise on all ranks if there was an error on any; then what was half written is removed."""
        first = next((e for e in self._of_all_ranks(error) if e is not None), None)
        if first is None:
            return
        if self._rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        last = self.last_saved or "none yet"
        reason = folders.by_final_name(first)
        raise UserError(
            f"the checkpoint {self.output_dir / name} could not be written ({reason}): free disk space or choose "
            f"another output_dir, then go on with resume_from_checkpoint: True; the last whole checkpoint: {last}"
        )


def _raise_if(message: str | None) -> None:
    if message is not None:
        raise UserError(message)
