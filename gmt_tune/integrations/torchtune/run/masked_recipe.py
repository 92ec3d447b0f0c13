"""What our recipes have in common while they train: resuming, and what is due in a step. Loops and losses are theirs.

A recipe's file defines one class on top of :class:`MaskedRecipe`, with its training loop in sight, and says what
its rows, losses and validation are.
"""

import gc
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torchtune import training, utils
from torchtune.training.lr_schedulers import get_lr

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune import process_group
from gmt_tune.integrations.torchtune.checkpoint.exchange import Position
from gmt_tune.integrations.torchtune.checkpoint.manifest import Checkpoint
from gmt_tune.integrations.torchtune.checkpoint.state import set_rng_state
from gmt_tune.integrations.torchtune.run import schedule
from gmt_tune.integrations.torchtune.run.progress import Progress
from gmt_tune.integrations.torchtune.run.recipe_setup import RecipeSetup
from gmt_tune.integrations.torchtune.run.signals import StopRun
from gmt_tune.reporting.report import report_at_end

__all__ = ["MaskedRecipe"]

log = utils.get_logger("INFO")


class MaskedRecipe(RecipeSetup):
    """Full training with a gradient mask, on one device or many, set up as torchtune's own recipe is.

    A recipe gives ``train`` and ``_validate``, and is started with :meth:`run`. Its loop calls :meth:`_begin_training`,
    for each epoch :meth:`_epoch_batches`, for each optimizer step :meth:`_reduce`, :meth:`_check_finite`,
    :meth:`_scale_gradients`, :meth:`_clip_gradients`, :meth:`_log_step` and :meth:`_finish_step`, and then
    :meth:`_end_training`.

    Args:
        cfg: the config, composed with what the command line overrides.
    """

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
        """Close what was opened. It raises nothing, which would hide why the run has ended."""
        self._profiler.writes_trace = not has_failed or self.world_size == 1  # for a trace, ranks wait for each other
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

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Continue where a checkpoint was saved; its weights are loaded already."""
        saved = checkpoint.progress
        self.global_step = saved.global_step
        if saved.is_final:
            if self.total_epochs > saved.total_epochs:
                raise UserError(
                    f"the run in {self._output_dir} is complete and kept no optimizer state: to train on, start a new "
                    f"run from its model, without resume_from_checkpoint: {self._checkpoints.new_run()}"
                )
            self.epochs_run = self.total_epochs
            return
        self._resumed_rng = self._checkpoints.restore(self._parts)
        self.seed = saved.seed
        self.epochs_run = self._epoch = saved.epoch
        # As many rows as were seen, in whole steps of this number of ranks
        rows_of_a_step = self._dataloader.batch_size * self.dp_size * self._gradient_accumulation_steps
        steps = saved.samples // rows_of_a_step
        self._batches_done = steps * self._gradient_accumulation_steps
        self._further_steps = saved.steps_in_epoch - steps
        self._finite.skipped_steps = saved.skipped_steps
        self._tokens = saved.tokens
        schedule.report_new_schedule(
            self._lr_scheduler,
            self.global_step + 1,
            self._lr(),
            epochs=(saved.total_epochs, self.total_epochs),
            steps=(saved.total_epochs * saved.steps_per_epoch, self.total_epochs * self._steps_per_epoch),
        )

    def _save(self, name: str, *, is_final: bool = False, val_loss: float | None = None) -> None:
        position = Position(
            global_step=self.global_step,
            epoch=self._epoch,
            samples=self._batches_done * self._dataloader.batch_size * self.dp_size,
            steps_in_epoch=self._steps_done(),
            steps_per_epoch=self._steps_per_epoch,
            total_epochs=self.total_epochs,
            skipped_steps=self._finite.skipped_steps,
            seed=self.seed,
            is_final=is_final,
            val_loss=val_loss,
            tokens=self._tokens,
        )
        self._checkpoints.save(name, self._parts, position)

    # ------------------------------------------------------------------ what a training loop calls

    def _begin_training(self) -> bool:
        """Get ready for the first step. False if there is none to do, since the run was resumed and is complete."""
        if self.epochs_run >= self.total_epochs:
            utils.log_rank_zero(log, f"The run is complete: its model is in {self._checkpoints.last_saved}.")
            return False
        if self._device.type == "cpu":
            gc.collect()
        else:
            training.cleanup_before_training()
        if self.global_step == 0:
            self._run_evaluation("before")
        self._stop.install(process_group.watch_ranks_here())
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        self._profiler.start()
        self._training_start = self._window_start = time.perf_counter()
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
            set_rng_state(self._resumed_rng, self._device)
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

    def _ends_run(self) -> bool:
        return self._ends_epoch() and self._epoch + 1 == self.total_epochs

    def _reduce(self, num_tokens: Tensor, running: Tensor) -> tuple[Tensor, Tensor]:
        """Token count (0-d) and numbers (any shape) summed over all ranks; all learn whether one is to stop."""
        self._finite.note_loss(running)
        counts = torch.stack((num_tokens, torch.full_like(num_tokens, int(self._stop.received > 0))))
        torch.distributed.all_reduce(counts)
        torch.distributed.all_reduce(running)
        self._stops = counts[1]
        return counts[0], running

    def _check_finite(self, loss: Tensor, num_tokens: Tensor) -> bool:
        """Whether this step may change weights, by what :meth:`_reduce` gave; raises where ``on_nonfinite`` says so.

        On CUDA, with ``on_nonfinite: error``, the host does not wait to know it: :meth:`_log_step` raises.
        """
        return self._finite.allows_step(self.global_step + 1, loss, num_tokens, self._micro_batches)

    def _scale_gradients(self, factor: Tensor) -> None:
        """Multiply the gradient of the step by a number (0-d), wherever the optimizer keeps it."""
        training.scale_grads(self._model, factor)
        if self._is_compact:
            self._optimizer.scale_gradients_(factor)

    def _clip_gradients(self) -> Tensor | None:
        """Scale the gradient down to the norm ``clip_grad_norm``, if it is longer. Its norm before, or None.

        A compact optimizer does so inside its step, when it is known what is selected: then None.
        """
        if self._clip_grad_norm is None or self._is_compact:
            return None
        # Tensor parallelism leaves what it does not cut on a mesh of its own, and PyTorch takes the norm of one mesh
        by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
        for p in self._model.parameters():
            if p.grad is not None:
                by_mesh.setdefault(getattr(p.grad, "device_mesh", None), []).append(p)
        norms = [get_total_norm([p.grad for p in group if p.grad is not None]) for group in by_mesh.values()]
        if len(norms) == 1:
            norm = norms[0]
        else:
            whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
            norm = get_total_norm(whole)
        for group in by_mesh.values():
            clip_grads_with_norm_(group, float(self._clip_grad_norm), norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _log_step(
        self, loss: Tensor, num_tokens: Tensor, grad_norm: Tensor | None, more: Mapping[str, Tensor] | None = None
    ) -> None:
        """Show the optimizer step that was just done, and log it where that is due.

        Numbers are 0-d, of the step and over all ranks; ``grad_norm`` is before clipping, and None where it was not
        measured. On CUDA, where nothing is due behind this step, the host only looks at the numbers of the step before:
        the device goes on meanwhile.

        Raises:
            UserError: if a step has changed weights by numbers that are not finite: nothing is logged or saved.
        """
        assert self._stops is not None
        numbers = {"loss": loss, "num_tokens": num_tokens, "stops": self._stops, **(more or {})}
        if grad_norm is not None:
            numbers["grad_norm"] = grad_norm
        check = self._finite.end_step()
        if check is not None:
            numbers["nonfinite"] = check.on_any_rank()
        self._numbers.send(numbers, check)
        self._take_in(with_last=self._is_anything_due())
        # An accelerator still works on the mask when the host has gone on: its time is no share of the step's
        mask_share = None
        if self._knows_all:
            seconds = time.perf_counter() - self._window_start
            # Each rank counts its tokens, and those of a tensor-parallel group have the same ones
            self._tokens_per_second = self._window_tokens / self.tensor_parallel_dim / seconds
            if self._mask is not None and self._device.type == "cpu":
                mask_share = self._mask.seconds / seconds
        latest = self._last_numbers
        self._progress.update(self.global_step, latest.get("loss"), self._tokens_per_second, mask_share)
        if self._logs is None or self.global_step % self._log_every_n_steps != 0:
            return
        assert self._tokens_per_second is not None
        metrics = {
            "loss": latest["loss"],
            "lr": self._lr(),
            "tokens_per_second_per_gpu": self._tokens_per_second / self.world_size,
            **{name: latest[name] for name in more or {}},
        }
        if self._log_peak_memory_stats:
            metrics.update(training.get_memory_stats(device=self._device))
        if grad_norm is not None:
            metrics["grad_norm"] = latest["grad_norm"]
        if self._skips_nonfinite:
            metrics["skipped_steps"] = self._finite.skipped_steps
        self._logs.log_step(self.global_step, metrics)

    def _take_in(self, *, with_last: bool) -> None:
        """Look at the numbers of the steps so far, or of those before the last one; all ranks see the same.

        Raises UserError where a step has changed weights by what is not finite.
        """
        for numbers, check in self._numbers.receive(with_last=with_last):
            if numbers.get("nonfinite"):
                self._finite.end_run(check)
            self._last_numbers = numbers
            self._window_tokens += numbers["num_tokens"]
            if self._tokens is not None:
                self._tokens += int(numbers["num_tokens"]) // self.tensor_parallel_dim
            self._must_stop |= numbers["stops"] > 0
        self._knows_all = with_last
        if self._must_stop and not with_last:  # it is about to be saved
            self._take_in(with_last=True)

    def _is_anything_due(self) -> bool:
        """Whether the numbers of the step that was just done are needed before the next one; the same on all ranks."""
        return (
            not self._reads_late
            or self.global_step % self._log_every_n_steps == 0
            or self._progress.is_line_due()
            or self._is_validation_due()
            or self._checkpoints.is_due(self.global_step)
            or self._ends_epoch()
        )

    def _is_validation_due(self) -> bool:
        every = self._run_val_every_n_steps
        is_due = self._ends_run() or bool(every and self.global_step % every == 0)
        return self._validation is not None and is_due

    def _lr(self) -> float:
        return get_lr(self._optim_ckpt_wrapper if self._optimizer_in_bwd else self._optimizer)

    def _finish_step(self) -> None:
        """Validate and save where it is due; leave if the run is to stop."""
        self._micro_batches.clear()
        ends_run = self._ends_run()
        val_loss = None
        if self._is_validation_due():
            start = time.perf_counter()
            numbers = self._validate()
            val_loss = numbers["val_loss"]
            self._validation_seconds += time.perf_counter() - start
            self._progress.show_validation(val_loss)
            if self._logs is not None:
                self._logs.log(self.global_step, numbers)
        if self._ends_epoch():
            self._save(f"epoch_{self._epoch}", is_final=ends_run, val_loss=val_loss)
        elif self._checkpoints.is_due(self.global_step) or self._must_stop:
            self._save(f"step_{self.global_step}", val_loss=val_loss)
        if ends_run or self._must_stop:
            self._checkpoints.finish()
            self._stop.is_saved = True
        self._is_saved_as_final = ends_run
        if self._must_stop and not ends_run:
            raise StopRun(
                f"Stopped after step {self.global_step} and saved {self._checkpoints.last_saved}. "
                "To go on, run the same command with resume_from_checkpoint=True.",
                self._stop.received or 15,
            )
        if self._knows_all:
            self._window_start, self._window_tokens = time.perf_counter(), 0.0
        self._profiler.step()

    def _end_training(self) -> None:
        """Say how long it took and where the model is; evaluate it."""
        self._take_in(with_last=True)
        if not self._is_saved_as_final:  # resumed on more ranks, a step of which the rest of the data does not fill
            self._save(f"epoch_{self._epoch}", is_final=True)
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
            if when == "after":
                self._checkpoints.describe_last(self._parts)
