"""What our recipes have in common: set-up, resuming, and what is due after a step. Loops and losses are theirs.

A recipe's file defines one class on top of :class:`MaskedRecipe`, with its training loop in sight, and says what
its rows, losses and validation are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtune import config, training, utils
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.training.checkpointing._checkpoint_client import CheckpointClient
from torchtune.training.lr_schedulers import get_lr

from gmt_tune.data.rows import positions_in_words
from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune import process_group, training_state
from gmt_tune.integrations.torchtune.checkpoints import RunCheckpoints
from gmt_tune.integrations.torchtune.public_config import PublicConfigLogger, public_config
from gmt_tune.integrations.torchtune.run import data, schedule
from gmt_tune.integrations.torchtune.run.base_recipes import load_base_recipe
from gmt_tune.integrations.torchtune.run.gradients import FiniteCheck
from gmt_tune.integrations.torchtune.run.logs import RunLogs
from gmt_tune.integrations.torchtune.run.mask import build_gradient_mask
from gmt_tune.integrations.torchtune.run.profiling import RunProfiler
from gmt_tune.integrations.torchtune.run.progress import Progress
from gmt_tune.integrations.torchtune.run.signals import StopRun, StopSignal
from gmt_tune.integrations.torchtune.run.validation import Validation
from gmt_tune.integrations.torchtune.tied_output import drop_tied_output
from gmt_tune.reporting.mask_metrics import MaskMetrics
from gmt_tune.reporting.report_at_end import report_at_end
from gmt_tune.reporting.run_log import RunLog
from gmt_tune.reporting.selection_tracker import SelectionTracker

FullFinetuneRecipeDistributed: Any = load_base_recipe("full_finetune_distributed").FullFinetuneRecipeDistributed

# RunCheckpoints saves and resumes; torchtune's own code, which knows only the ends of epochs, must not.
_WITHOUT_RESUMING = {"resume_from_checkpoint": False, "enable_async_checkpointing": False}

log = utils.get_logger("INFO")


class MaskedRecipe(FullFinetuneRecipeDistributed):
    """Full training with a gradient mask, on one device or many, set up as torchtune's own recipe is.

    A recipe gives ``train`` and ``_validate``, and is started with :meth:`run`. Its loop calls :meth:`_begin_training`,
    for each epoch :meth:`_epoch_batches`, for each optimizer step :meth:`_reduce`, :meth:`_check_finite`,
    :meth:`_log_step` and :meth:`_finish_step`, and then :meth:`_end_training`.

    Args:
        cfg (DictConfig): OmegaConf object parsed from yaml file
    """

    # Makes a batch of rows, unless the config's collate_fn names another
    default_collate_fn = "torchtune.data.padded_collate_sft"

    def __init__(self, cfg: DictConfig) -> None:
        # torchtune compares the device with "cuda", and takes the index from LOCAL_RANK
        device, _, index = str(cfg.device).partition(":")
        process_group.ensure_rendezvous(index)
        super().__init__(OmegaConf.merge(cfg, _WITHOUT_RESUMING, {"device": device}))
        if self._device.type == "cpu" or self.data_parallel_dim == 1:
            # On the CPU all is in the host's memory anyway; and where FSDP2 shards nothing, it brings nothing back
            self.fsdp_cpu_offload = False
        self._checkpoints = RunCheckpoints(cfg, self.rank, self.world_size)
        self._run_val_every_n_steps = cfg.get("run_val_every_n_steps", None)
        self._skips_nonfinite = cfg.get("on_nonfinite", "error") == "skip"
        self._write_report = cfg.get("write_report", False)
        self._collate_fn = cfg.get("collate_fn", None) or self.default_collate_fn
        self._stop = StopSignal()
        self._must_stop: Tensor | int = 0  # above 0 if any rank was asked to stop
        self._profiler = RunProfiler(None)
        self._epoch = self._batches_done = 0
        self._further_steps = 0  # steps of this epoch done before resuming, when the world size was different
        # Those whose gradients the next optimizer step will apply: (epoch, number in it)
        self._micro_batches: list[tuple[int, int]] = []
        self._resumed_rng: dict | None = None
        self._validation_seconds = 0.0
        self._is_saved_as_final = False

    def run(self, cfg: DictConfig) -> None:
        """Set up and train. However that ends, what was opened is closed; the process group stays."""
        has_failed = True
        try:
            self.setup(cfg)
            self.train()
            has_failed = False
        except StopRun:
            has_failed = False
            raise
        finally:
            self._close(has_failed)

    def cleanup(self) -> None:
        """Close what was opened, and leave the process group, as torchtune's recipes do at their end."""
        self._close()
        torch.distributed.destroy_process_group()

    def _close(self, has_failed: bool = False) -> None:
        """Close profiler and metric logger, and let other runs write to the folder.

        It raises nothing, which would hide why the run has ended.

        Args:
            has_failed: this rank ends by an error, and others may not come to where they would wait for it.
        """
        self._profiler.writes_trace = not has_failed or self.world_size == 1
        close = [self._stop.uninstall, self._profiler.stop]
        if self._is_rank_zero and hasattr(self, "_metric_logger"):
            close.append(self._metric_logger.close)
        close.append(self._checkpoints.close)
        for each in close:
            try:
                each()
            except Exception as error:
                log.warning(f"At the end of the run, {each.__qualname__} failed: {error}")

    # ------------------------------------------------------------------ what a recipe defines

    def train(self) -> None:
        """The training loop."""
        raise NotImplementedError

    def _validate(self) -> dict[str, float]:
        """Numbers of the held-out data, the same on all ranks, from ``self._validation``; with ``val_loss``."""
        raise NotImplementedError

    def _check_row(self, row: Mapping, key: str) -> None:
        """Raise UserError if a row of the config's section ``key`` is not what the recipe trains on."""

    def _setup_reference(self, cfg: DictConfig) -> None:
        """Set up further models, which are not trained."""

    # ------------------------------------------------------------------ set-up

    def setup(self, cfg: DictConfig) -> None:
        """Set up data, model, optimizer, loss and scheduler as torchtune does, then the mask; then resume."""
        # Data first: what is wrong with it shows before minutes are spent on loading the model.
        self._tokenizer = data.build_tokenizer(cfg.tokenizer)
        self._dataset, self._packed = self._build_dataset(cfg, "dataset")
        data.check_enough_rows(
            len(self._dataset), cfg.batch_size, self.data_parallel_dim, self._gradient_accumulation_steps
        )
        held_out = self._build_dataset(cfg, "dataset_val") if cfg.get("dataset_val", None) is not None else None
        original = cfg
        rows_of_a_step = cfg.batch_size * self.data_parallel_dim * self._gradient_accumulation_steps
        checkpointer = self._checkpoints.find(len(self._dataset), rows_of_a_step)
        cfg = OmegaConf.merge(cfg, _WITHOUT_RESUMING, {"checkpointer": checkpointer})
        self._checkpoint_client = CheckpointClient(cfg)
        super().setup(cfg)
        # Use the original config: ${checkpointer...} must resolve to the user's folder, not to the resumed one
        self._setup_reference(original)

        self._mask = build_gradient_mask(cfg.get("gradient_mask", None), self._model)
        # Before the mask: hooks act in the order in which they are registered
        self._finite = FiniteCheck(
            self._model,
            self._optimizers if self._optimizer_in_bwd else (),
            skips=self._skips_nonfinite,
            rows_of_step=lambda: data.rows_of_batches(self._dataloader, self._micro_batches),
            in_words=partial(positions_in_words, self._dataset),
            checkpoints=self._checkpoints,
            max_seq_len=getattr(self._tokenizer, "max_seq_len", None),
        )
        self._selection_tracker = None
        if self._mask is not None:
            self._mask.error_if_nonfinite = False  # the loop checks loss and gradients over all ranks
            for optimizer in self._optimizers:
                self._mask.register(optimizer)
            every = cfg.get("track_selection_every_n_steps", None)
            if every is not None:
                self._selection_tracker = SelectionTracker(self._mask, every)
                for optimizer in self._optimizers:
                    self._selection_tracker.register(optimizer)
        self._validation = None
        if held_out is not None:
            dataset, packed = held_out
            self._validation = Validation(
                dataset,
                batch_size=cfg.get("batch_size_val", None) or cfg.batch_size,
                collate_fn=self._build_collate(packed),
                rank=self.dp_rank,
                world_size=self.dp_size,
            )
        self._evaluate = None
        if cfg.get("evaluation", None) is not None:
            self._evaluate = config.instantiate(cfg.evaluation, self._tokenizer)
        if self._checkpoints.resumed is not None:
            self._resume(self._checkpoints.resumed)
        self._checkpoints.check_space(self._model, self._optimizers, self.total_epochs, self._steps_per_epoch)
        self._logs = None
        if self._is_rank_zero:
            run_log = RunLog(self._output_dir, public_config(cfg))
            run_log.truncate_after(self.global_step)
            metrics = MaskMetrics(self._mask, self._selection_tracker) if self._mask is not None else None
            self._logs = RunLogs(self._metric_logger, run_log, metrics)

    @property
    def _metric_logger(self):
        """The config's metric logger; torchtune's set-up makes it and gives it the config."""
        return self._public_config_logger

    @_metric_logger.setter
    def _metric_logger(self, logger) -> None:
        self._public_config_logger = PublicConfigLogger(logger)

    def _build_dataset(self, cfg: DictConfig, key: str):
        dataset, packed = data.build_dataset(cfg[key], self._tokenizer, key)
        self._check_row(dataset[0], key)
        return dataset, packed

    def _build_collate(self, packed: bool):
        return data.build_collate(self._collate_fn, packed, self._tokenizer.pad_id, self._loss_fn.ignore_index)

    def _setup_model(self, *args, **kwargs):
        drop_tied_output(kwargs["model_state_dict"], kwargs["cfg_model"])
        with process_group.no_memory_stats_on_cpu(self._device):
            return super()._setup_model(*args, **kwargs)

    def _setup_lr_scheduler(self, cfg_lr_scheduler, num_training_steps, last_epoch):
        schedule.warn_of_long_warmup(cfg_lr_scheduler, num_training_steps)
        lr_scheduler = super()._setup_lr_scheduler(cfg_lr_scheduler, num_training_steps, last_epoch)
        if lr_scheduler is not None and self._optimizer_in_bwd:
            schedule.keep_tensor_lr(lr_scheduler, self._optimizers)
        return lr_scheduler

    def _setup_data(self, cfg_dataset, shuffle, batch_size, collate_fn, dataloader_state_dict=None):
        if not hasattr(self._loss_fn, "ignore_index"):
            self._loss_fn.ignore_index = CROSS_ENTROPY_IGNORE_IDX  # torchtune's set-up reads it of every loss
        return data.build_dataloader(
            self._dataset,
            self._build_collate(self._packed),
            batch_size=batch_size,
            shuffle=shuffle,
            rank=self.dp_rank,
            world_size=self.dp_size,
        )

    def _setup_profiler(self, cfg_profiler=None) -> RunProfiler:
        profiler = super()._setup_profiler(cfg_profiler)
        if self._is_rank_zero and self.profiler_profile_memory and self._device.type == "cuda":
            first = self.profiler_wait_steps + self.profiler_warmup_steps
            return RunProfiler(profiler, range(first, first + self.profiler_active_steps))
        return RunProfiler(profiler)

    @property
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """The one optimizer, or with optimizer in backward, one for each parameter."""
        if self._optimizer_in_bwd:
            return list(self._optim_ckpt_wrapper.optim_map.values())
        return [self._optimizer]

    def _lr(self) -> float:
        return get_lr(self._optim_ckpt_wrapper if self._optimizer_in_bwd else self._optimizer)

    # ------------------------------------------------------------------ checkpoints

    def _resume(self, checkpoint) -> None:
        """Continue where a checkpoint was saved; its weights are loaded already."""
        progress = checkpoint.progress
        if progress["is_final"]:
            if self.total_epochs > progress["total_epochs"]:
                raise UserError(
                    f"the run in {self._output_dir} is complete and kept no optimizer state: to train on, start a "
                    f"new run with checkpointer.checkpoint_dir={checkpoint.path} and another output_dir"
                )
            self.epochs_run = self.total_epochs
            self.global_step = checkpoint.step
            return
        self._resumed_rng = training_state.restore(
            checkpoint.path,
            progress["world_size"],
            self.rank,
            self.world_size,
            self._model,
            self._optimizers,
            self._lr_scheduler,
            self._mask,
            self._device,
            tracker=self._selection_tracker,
        )
        self.seed = progress["seed"]
        self.global_step = checkpoint.step
        self.epochs_run = self._epoch = progress["epoch"]
        # As many rows as were seen, in whole steps of this number of ranks
        rows_of_a_step = self._dataloader.batch_size * self.dp_size * self._gradient_accumulation_steps
        steps = progress["samples"] // rows_of_a_step
        self._batches_done = steps * self._gradient_accumulation_steps
        self._further_steps = progress["steps_in_epoch"] - steps
        self._finite.skipped_steps = progress["skipped_steps"]
        schedule.report_new_schedule(
            self._lr_scheduler,
            self.global_step + 1,
            self._lr(),
            epochs=(progress["total_epochs"], self.total_epochs),
            steps=(
                progress["total_epochs"] * progress["steps_per_epoch"],
                self.total_epochs * self._steps_per_epoch,
            ),
        )

    def _save(self, *, ends_epoch: bool, ends_run: bool, val_loss: float | None) -> None:
        """Save where it is due; complete what is being written before the run ends."""
        if ends_epoch:
            self._checkpoints.save(self, f"epoch_{self._epoch}", is_final=ends_run, val_loss=val_loss)
        elif self._checkpoints.is_due(self.global_step) or self._must_stop:
            self._checkpoints.save(self, f"step_{self.global_step}", val_loss=val_loss)
        if ends_run or self._must_stop:
            self._checkpoints.finish()
            self._stop.is_saved = True
        self._is_saved_as_final = ends_run

    # ------------------------------------------------------------------ what a training loop calls

    def _begin_training(self) -> bool:
        """Get ready for the first step. False if there is none to do, since the run was resumed and is complete."""
        if self.epochs_run >= self.total_epochs:
            utils.log_rank_zero(log, f"The run is complete: its model is in {self._checkpoints.last_saved}.")
            return False
        process_group.cleanup_before_training(self._device)
        if self.global_step == 0:
            self._run_evaluation("before")
        self._stop.install(process_group.watch_ranks_here())
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        self._profiler.start()
        self._training_start = self._step_start = time.perf_counter()
        return True

    def _epoch_batches(self, epoch: int) -> Iterator[tuple[Any, bool]]:
        """The batches of an epoch that are to do, and whether each completes an optimizer step.

        An epoch's last ones may be too few for a step. As in torchtune's recipes, their gradients stay and are
        applied by the next epoch's first step.
        """
        if epoch != self._epoch:
            self._epoch, self._batches_done, self._further_steps = epoch, 0, 0
        first, steps_done = self._batches_done, self._steps_done()
        self._progress = Progress(
            epoch + 1, self._steps_per_epoch, steps_done, self._log_every_n_steps, self._is_rank_zero
        )
        self._dataloader.sampler.set_epoch(epoch)
        batches: Any = self._dataloader
        if steps_done == self.max_steps_per_epoch:
            batches = []  # the checkpoint was saved at the last step of this epoch
        elif first:
            batches.sampler.load_state_dict({"yielded": first * batches.batch_size})
        batches = iter(batches)
        if self._resumed_rng is not None:
            training_state.set_rng_state(self._resumed_rng, self._device)
            self._resumed_rng = None
        for number, batch in enumerate(batches, start=first):
            self._micro_batches.append((epoch, number))
            self._batches_done = number + 1
            yield batch, self._batches_done % self._gradient_accumulation_steps == 0
            if self._steps_done() == self.max_steps_per_epoch:
                break
        self._progress.close()
        self.epochs_run += 1

    def _steps_done(self) -> int:
        """Optimizer steps of this epoch that are done."""
        return self._batches_done // self._gradient_accumulation_steps + self._further_steps

    def _ends_epoch(self) -> bool:
        accumulation = self._gradient_accumulation_steps
        has_seen_all = self._batches_done // accumulation == len(self._dataloader) // accumulation
        return has_seen_all or self._steps_done() == self.max_steps_per_epoch

    def _reduce(self, num_tokens: Tensor, running: Tensor) -> tuple[Tensor, Tensor]:
        """Token count (0-d) and numbers (any shape) summed over all ranks; all learn whether one is to stop."""
        self._finite.note_loss(running)
        counts = torch.stack((num_tokens, torch.full_like(num_tokens, int(self._stop.received > 0))))
        torch.distributed.all_reduce(counts)
        torch.distributed.all_reduce(running)
        self._must_stop = counts[1]
        return counts[0], running

    def _check_finite(self, loss: Tensor, num_tokens: Tensor) -> bool:
        """Whether this step may change weights; raises where ``on_nonfinite`` says so. All ranks agree.

        Args:
            loss: of the step, summed or a mean; what :meth:`_reduce` gave.
            num_tokens: what :meth:`_reduce` gave.
        """
        return self._finite.allows_step(self.global_step, loss, num_tokens)

    def _clip_gradients(self) -> Tensor | None:
        """Scale the gradient down to the norm ``clip_grad_norm``, if it is longer. Its norm before, or None."""
        if self._clip_grad_norm is None:
            return None
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), max_norm=float(self._clip_grad_norm))
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _log_step(
        self, loss: float, num_tokens: int, grad_norm: Tensor | None, more: Mapping[str, float] | None = None
    ) -> None:
        """Show the optimizer step that was just done, and log it where that is due.

        Args:
            loss: of the step.
            num_tokens: of the step, summed over all ranks.
            grad_norm: before clipping, of all ranks; None where it was not measured.
            more: further numbers to log, by name.
        """
        seconds = time.perf_counter() - self._step_start
        # Each rank counts its tokens, and those of a tensor-parallel group have the same ones
        tokens_per_second = num_tokens / self.tensor_parallel_dim / seconds
        # An accelerator still works on the mask when the host has gone on: its time is no share of the step's
        mask_share = None
        if self._mask is not None and self._device.type == "cpu":
            mask_share = self._mask.seconds / seconds
        self._progress.update(self.global_step, loss, tokens_per_second, mask_share)
        if self._logs is None or self.global_step % self._log_every_n_steps != 0:
            return
        metrics = {
            "loss": loss,
            "lr": self._lr(),
            "tokens_per_second_per_gpu": tokens_per_second / self.world_size,
            **(more or {}),
        }
        if self._log_peak_memory_stats:
            metrics.update(training.get_memory_stats(device=self._device))
        if grad_norm is not None:
            metrics["grad_norm"] = grad_norm.item()
        if self._skips_nonfinite:
            metrics["skipped_steps"] = self._finite.skipped_steps
        self._logs.log_step(self.global_step, metrics)

    def _finish_step(self) -> None:
        """Validate and save where it is due; leave if the run is to stop."""
        self._finite.check_after_backward(self.global_step)
        self._micro_batches.clear()
        ends_epoch = self._ends_epoch()
        ends_run = ends_epoch and self._epoch + 1 == self.total_epochs
        val_loss = None
        every = self._run_val_every_n_steps
        if self._validation is not None and (ends_run or (every and self.global_step % every == 0)):
            start = time.perf_counter()
            numbers = self._validate()
            val_loss = numbers["val_loss"]
            self._validation_seconds += time.perf_counter() - start
            self._progress.show_validation(val_loss)
            if self._logs is not None:
                self._logs.log(self.global_step, numbers)
        self._save(ends_epoch=ends_epoch, ends_run=ends_run, val_loss=val_loss)
        if self._must_stop and not ends_run:
            raise StopRun(
                f"Stopped after step {self.global_step} and saved {self._checkpoints.last_saved}. "
                "To go on, run the same command with resume_from_checkpoint=True.",
                self._stop.received or 15,
            )
        self._step_start = time.perf_counter()
        self._profiler.step()

    def _end_training(self) -> None:
        """Say how long it took and where the model is; evaluate it."""
        if not self._is_saved_as_final:  # resumed on more ranks, a step of which the rest of the data does not fill
            self._checkpoints.save(self, f"epoch_{self._epoch}", is_final=True)
            self._checkpoints.finish()
        self._profiler.stop()
        self._stop.uninstall()
        seconds = time.perf_counter() - self._training_start
        saving, validating = self._checkpoints.seconds, self._validation_seconds
        utils.log_rank_zero(
            log,
            f"Trained for {seconds:.1f} s, of which saving took {saving:.1f} s ({saving / seconds:.1%}) and "
            f"validating {validating:.1f} s ({validating / seconds:.1%}).",
        )
        self._run_evaluation("after")
        report = f"to draw the run: gmt-tune report {self._output_dir}"
        if self._write_report and self._is_rank_zero:
            report = report_at_end(self._output_dir)
        utils.log_rank_zero(log, f"The model is in {self._checkpoints.last_saved}; {report}")

    def _run_evaluation(self, when: str) -> None:
        if self._evaluate is None:
            return
        results = self._evaluate(self._model)
        if self._logs is not None:
            for name, value in results.items():
                print(f"{name} {when}: {value:.4g}", flush=True)
            self._logs.log(self.global_step, {f"{name}_{when}": value for name, value in results.items()})
