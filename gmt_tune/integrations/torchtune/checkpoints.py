"""A run's checkpoints: saving at any step, finding the newest whole one, and going on from it.

A checkpoint is an ordinary model folder in the format of the config's checkpointer (for Hugging Face models
with config, tokenizer and generation files), plus each rank's training state. How a folder becomes whole or
stays absent is told in ``checkpoint_folder``; what the training state holds, in ``training_state``.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torchtune import config, training, utils

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune import checkpoint_folder as folders
from gmt_tune.integrations.torchtune import process_group, training_state
from gmt_tune.integrations.torchtune.checkpoint_writer import (
    Mark,
    Writer,
    attempt,
    has_failed_part,
    make_marks,
    wait_for_others,
)
from gmt_tune.integrations.torchtune.config.inputs import inputs_in
from gmt_tune.integrations.torchtune.config.keys import may_differ
from gmt_tune.integrations.torchtune.config.public import check_of, environment_checks, leaves, public_config
from gmt_tune.integrations.torchtune.file_lock import FileLock, lock_folder
from gmt_tune.integrations.torchtune.model_folder import check_config_json, model_files, write_model
from gmt_tune.reporting.redaction import HIDDEN, without_secrets

log = utils.get_logger("INFO")

_FROM_ENVIRONMENT = "comes from the environment and is not what it was"

# Network file systems may show a new folder to other nodes a little later.
SECONDS_UNTIL_SHARED = 5.0


class RunCheckpoints:
    """Saves and finds the checkpoints of one run.

    Args:
        cfg: the recipe's config; ``output_dir``, ``resume_from_checkpoint``, ``save_every_n_steps`` and
            ``keep_last_n_checkpoints`` are read.
        rank, world_size: of this process.
    """

    def __init__(self, cfg: DictConfig, rank: int, world_size: int) -> None:
        self.output_dir = Path(cfg.checkpointer.output_dir)
        self.save_every_n_steps = cfg.get("save_every_n_steps", None)
        self.keep_last_n = cfg.get("keep_last_n_checkpoints", None)
        self._rank, self._world_size = rank, world_size
        self._cfg = cfg
        self._public_config, self._environment = public_config(cfg), environment_checks(cfg)
        self._last_saved: Path | None = None
        self.resumed: folders.Checkpoint | None = None
        self.seconds = 0.0  # spent in save()
        self._inputs: dict[str, str] = {}
        self._locks: list[FileLock] = []
        self._is_async = bool(cfg.get("enable_async_checkpointing", False))
        self._pending: tuple[Writer, Path, str] | None = None

    def find(self, dataset_rows: int, rows_of_a_step: int) -> DictConfig:
        """Look for the checkpoint to go on from, on rank 0 for all.

        Args:
            dataset_rows: length of the training set.
            rows_of_a_step: that all ranks together see in one optimizer step.

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
        self._raise_together(found[1])
        self.resumed = found[0]
        checkpointer = OmegaConf.create(OmegaConf.to_container(self._cfg.checkpointer, resolve=True))
        if self.resumed is not None:
            self._last_saved = self.resumed.path
            checkpointer.checkpoint_dir = str(self.resumed.path)
            checkpointer.checkpoint_files = self.resumed.progress["model_files"]
            checkpointer.recipe_checkpoint = None
        return checkpointer

    def _check_shared(self) -> None:
        """Raise on all ranks if one of them does not see the folder that rank 0 writes to."""
        name: list = [uuid.uuid4().hex, None]
        if self._rank == 0:
            folder = folders.incomplete_path(self.output_dir, name[0])
            name[1] = attempt(self._lock)[1] or attempt(lambda: folders.make_incomplete(folder))[1]
        dist.broadcast_object_list(name, src=0)
        self._raise_together(name[1])
        probe = folders.incomplete_path(self.output_dir, name[0])
        deadline = time.monotonic() + SECONDS_UNTIL_SHARED
        while not probe.is_dir() and time.monotonic() < deadline:
            time.sleep(0.1)
        seen: list = [None] * self._world_size
        dist.all_gather_object(seen, probe.is_dir())
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

    def _find_on_rank_zero(self) -> folders.Checkpoint | None:
        checkpoint = None
        if self._cfg.resume_from_checkpoint:
            checkpoint = folders.newest_whole(self.output_dir, log.warning)
        config = OmegaConf.to_container(self._cfg, resolve=True)
        self._inputs = inputs_in(config, self.output_dir)
        self._check_inputs(checkpoint is not None)
        folders.remove_incomplete(self.output_dir)
        if not self._cfg.resume_from_checkpoint:
            moved = folders.move_aside(self.output_dir)
            if moved is not None:
                log.info(f"Moved the checkpoints of an earlier run to {moved}.")
            return None
        if checkpoint is None:
            if self._set_damaged_aside(None):
                log.warning(f"None of the checkpoints in {self.output_dir} is whole: starting from the beginning.")
            else:
                log.info(f"No checkpoint in {self.output_dir} yet: starting from the beginning.")
            return None
        progress = checkpoint.progress
        differing = config_differences(progress["config"], progress.get("environment", {}), self._cfg)
        if progress["world_size"] != self._world_size and progress["rows_of_a_step"] == self._rows_of_a_step:
            # What makes the same steps on another number of ranks
            differing = [d for d in differing if not d.startswith(("batch_size ", "gradient_accumulation_steps "))]
        if progress["dataset_rows"] != self._dataset_rows:
            differing.append(f"dataset has {self._dataset_rows} rows, had {progress['dataset_rows']}")
        if progress["world_size"] != self._world_size and (progress["config"].get("tensor_parallel_dim") or 1) > 1:
            differing.append(
                f"{self._world_size} processes, were {progress['world_size']} (with tensor_parallel_dim above 1 it "
                "must be as many)"
            )
        if differing:
            raise UserError(
                f"the config differs from the run that saved {checkpoint.path}: {'; '.join(differing)}. Set it as "
                "it was, or start a new run with resume_from_checkpoint: False or another output_dir"
            )
        self._set_damaged_aside(checkpoint)
        self._put_in_order(checkpoint.path.name)  # what a run that was killed right after a save has not done
        log.info(f"Going on from {checkpoint.path} (step {checkpoint.step}).")
        return checkpoint

    def _check_inputs(self, is_resumed: bool) -> None:
        """Raise UserError if this run would move or delete a file that its config names, or cannot read its model."""
        sections = ["ref_checkpointer"] if is_resumed else ["checkpointer", "ref_checkpointer"]
        for section in sections:
            given = self._cfg.get(section, None)
            if given is None:
                continue
            if Path(given.output_dir).resolve().is_relative_to(Path(given.checkpoint_dir).resolve()):
                raise UserError(
                    f"{section}.output_dir {given.output_dir} is in {section}.checkpoint_dir {given.checkpoint_dir}: "
                    "choose an output_dir outside of the model's folder"
                )
            check_config_json(given)
        own = {c.path.name for c in folders.list_checkpoints(self.output_dir)} if is_resumed else set()
        for name, key in self._inputs.items():
            if folders.is_the_runs(name) and name not in own:
                raise UserError(
                    f"{key} is in {self.output_dir / name}, which this run would move aside or write over: choose "
                    "another output_dir"
                )

    def _set_damaged_aside(self, newer_than: folders.Checkpoint | None) -> list[Path]:
        aside = folders.set_damaged_aside(self.output_dir, newer_than)
        for path in aside:
            log.warning(f"Kept what is left of a damaged checkpoint as {path}: delete it if it is of no use.")
        return aside

    def check_space(self, model, optimizers: list, epochs: int, steps_per_epoch: int) -> None:
        """Raise on all ranks if the checkpoints to come would not fit on the disk, by an estimate.

        It leaves nothing to spare: it refuses only what cannot end well.
        """
        steps = range(self.resumed.step + 1 if self.resumed else 1, epochs * steps_per_epoch)
        saves = sum(self.is_due(step) or step % steps_per_epoch == 0 for step in steps)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        trained = [p for p in model.parameters() if p.requires_grad]
        state = sum(_state_bytes_per_entry(optimizers[0], p) * p.numel() for p in trained)
        result = [None, None]
        if self._rank == 0 and not (self.resumed and self.resumed.progress["is_final"]):
            there = sum(size for c in folders.list_checkpoints(self.output_dir) for size, _ in c.files.values())
            needed = folders.space_needed(weights, int(state), saves, self.keep_last_n, there)
            result = attempt(lambda: folders.check_space(self.output_dir, needed))
        dist.broadcast_object_list(result, src=0)
        self._raise_together(result[1])

    def is_due(self, global_step: int) -> bool:
        """Whether ``save_every_n_steps`` asks for a checkpoint at this step."""
        return bool(self.save_every_n_steps) and global_step % self.save_every_n_steps == 0

    def save(self, recipe, name: str, *, is_final: bool = False, val_loss: float | None = None) -> None:
        """Write a checkpoint; all ranks call it at the same step boundary, and all fail if one does.

        With ``enable_async_checkpointing`` the state is copied and written in the background while training goes
        on; the next save, and :meth:`finish`, wait for it.

        Args:
            recipe: the recipe, set up.
            name: ``step_N`` or ``epoch_N``.
            is_final: the run is complete; nothing that resuming needs is kept.
            val_loss: validation loss at this step, if there was a validation.

        Raises:
            UserError: if it could not be written, such as on a full disk; checkpoints before it are untouched.
        """
        start = time.perf_counter()
        self.finish()
        folder = folders.incomplete_path(self.output_dir, name)
        error = None
        if self._rank == 0:
            error = attempt(lambda: self._prepare(folder))[1]
        self._agree(error, folder, name)
        # Before the weights are gathered, for which all ranks meet: from then on rank 0 sees who lives
        mark = Mark(folder, self._rank)
        weights = training.gather_cpu_state_dict(recipe._model, self._rank == 0, device=recipe._device)
        state = None
        if not is_final:
            parts = recipe._model, recipe._optimizers, recipe._lr_scheduler, recipe._mask, recipe._device
            state = training_state.collect(*parts, tracker=recipe._selection_tracker, copy=self._is_async)
        if self._is_async and recipe._device.type == "cpu":  # these still are the tensors that training changes
            weights = {key: weight.clone() for key, weight in weights.items()}
        checkpointer = recipe._checkpoint_client._get_checkpointer()
        progress = self._progress(recipe, is_final, val_loss)
        writer = Writer(lambda: self._write(folder, name, checkpointer, weights, state, progress, mark))
        self._pending = (writer, folder, name)
        writer.start()
        if not self._is_async:
            self.finish()
        self.seconds += time.perf_counter() - start

    def finish(self) -> None:
        """Wait until a checkpoint that is being written is whole; all ranks call it.

        Raises:
            UserError: on all ranks, if it could not be written.
        """
        if self._pending is None:
            return
        (writer, folder, name), self._pending = self._pending, None
        writer.wait()
        if writer.has_lost_rank:  # whom a collective would wait for
            raise UserError(
                f"the checkpoint {self.output_dir / name} is not whole: {writer.error}. Go on with "
                f"resume_from_checkpoint: True; the last whole checkpoint: {self._last_saved or 'none yet'}"
            )
        with process_group.waiting_longer():
            self._agree(writer.error, folder, name)
        self._last_saved = self.output_dir / name
        if self._rank == 0:
            log.info(f"Saved {self._last_saved}.")

    def _write(self, folder: Path, name: str, checkpointer, weights, state, progress: dict, mark: Mark) -> None:
        """This rank's files; on rank 0 also the model's, and, once all ranks have written, the final name."""
        try:
            with mark:
                if state is not None:
                    torch.save(state, folder / training_state.state_file(self._rank))
            if self._rank > 0:
                return
            write_model(checkpointer, weights, folder, self._newest_model_folder())
        finally:
            if self._rank == 0:
                wait_for_others(folder)  # also after an error, for which all ranks are about to meet
        if has_failed_part(folder):
            return
        progress["model_files"] = model_files(folder)
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
        """Where config, tokenizer and generation files are copied from.

        Not always where the weights were loaded from: that may be a checkpoint that has been deleted since, to keep
        the newest alone.
        """
        given = Path(self._cfg.checkpointer.checkpoint_dir)
        return self._last_saved if self._last_saved is not None and self._last_saved.is_dir() else given

    def _prepare(self, folder: Path) -> None:
        folders.make_incomplete(folder)
        make_marks(folder, self._world_size)

    def _progress(self, recipe, is_final: bool, val_loss: float | None) -> dict:
        return {
            "global_step": recipe.global_step,
            "epoch": recipe._epoch,
            "batches": recipe._batches_done,
            "samples": recipe._batches_done * self._cfg.batch_size * recipe.dp_size,
            "steps_in_epoch": recipe._steps_done(),
            "rows_of_a_step": self._rows_of_a_step,
            "dataset_rows": self._dataset_rows,
            "steps_per_epoch": recipe._steps_per_epoch,
            "total_epochs": recipe.total_epochs,
            "is_final": is_final,
            "val_loss": val_loss,
            "seed": recipe.seed,
            "skipped_steps": recipe._finite.skipped_steps,
            "world_size": self._world_size,
            "config": self._public_config,
            "environment": self._environment,
        }

    @property
    def last_saved(self) -> Path | None:
        """The newest checkpoint that this run wrote or went on from."""
        return self._last_saved

    @staticmethod
    def _raise_together(message: str | None) -> None:
        if message is not None:
            raise UserError(message)

    def _agree(self, error: str | None, folder: Path, name: str) -> None:
        """Raise on all ranks if there was an error on any; then what was half written is removed."""
        errors = [None] * self._world_size
        dist.all_gather_object(errors, error)
        first = next((e for e in errors if e is not None), None)
        if first is None:
            return
        if self._rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        last = self._last_saved or "none yet"
        raise UserError(
            f"the checkpoint {self.output_dir / name} could not be written ({first}): free disk space or choose "
            f"another output_dir, then go on with resume_from_checkpoint: True; the last whole checkpoint: {last}"
        )


def _state_bytes_per_entry(optimizer, p) -> float:
    """Bytes that an optimizer keeps for each entry of a parameter; a lower bound for kinds that are not known."""
    kind = type(optimizer).__name__.lower()
    if "sgd" in kind and not optimizer.param_groups[0].get("momentum"):
        return 0.0
    for part, size in (("8bit", 1.0), ("fp8", 1.0), ("4bit", 0.5)):
        if part in kind:
            return 2 * size
    return (2 if "adam" in kind else 1) * p.element_size()


def config_differences(saved: dict, checks: Mapping[str, str], cfg: DictConfig) -> list[str]:
    """Every key whose value changes the training and is not what it was, in words.

    Args:
        saved: config of the run that saved a checkpoint, as it is in the checkpoint.
        checks: of that run, as ``environment_checks`` made them.
        cfg: this run's config.
    """
    resolved = OmegaConf.to_container(cfg, resolve=True)
    # Earlier versions saved what is now left out of the file: passwords, and values from the environment
    configs = [without_secrets(saved), public_config(cfg), without_secrets(resolved)]
    saved, now, plain = json.loads(json.dumps(configs))
    found = []
    before, known, values = leaves(saved), leaves(plain), leaves(resolved)
    # The same value may have come from the environment then and not now, or the other way round
    for key, leaf in leaves(now).items():
        old = before.get(key)
        if old is None or may_differ(key):
            continue
        if key in checks and checks[key] != check_of(values[key]):
            is_from_environment = "${oc.env:" in f"{old.value}{leaf.value}"
            found.append(f"{key} " + (_FROM_ENVIRONMENT if is_from_environment else "is not what it was"))
        if key in checks or old.value in (known[key].value, HIDDEN):  # what was hidden then need not be hidden now
            old.holder[old.name] = leaf.value
    return found + _differences(saved, now)


def _differences(saved: dict, now: dict, prefix: str = "") -> list[str]:
    found = []
    for key in {**saved, **now}:
        if may_differ(f"{prefix}{key}"):
            continue
        a, b = saved.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            is_secret = isinstance(b, str) and "${oc.env:" in b  # and a is it, where an earlier version saved it
            found.append(f"{prefix}{key} " + (_FROM_ENVIRONMENT if is_secret else f"is {b!r}, was {a!r}"))
    return found


def load_checkpointer(cfg_checkpointer: DictConfig):
    """The config's checkpointer, for reading weights only: resuming is ours."""
    return config.instantiate(cfg_checkpointer, should_load_recipe_state=False)
