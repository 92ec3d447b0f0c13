"""Full fine-tuning in which, at every optimizer step, only the largest gradient entries are applied."""

import sys
import time

import torch
from omegaconf import DictConfig, OmegaConf
from torch.distributed.tensor import DTensor
from torchtune import config, training, utils
from torchtune.training.checkpointing._checkpoint_client import CheckpointClient
from torchtune.training.lr_schedulers import get_lr

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune import data, process_group, training_state
from gmt_tune.integrations.torchtune.base_recipes import load_base_recipe
from gmt_tune.integrations.torchtune.checkpoints import RunCheckpoints
from gmt_tune.integrations.torchtune.entry import StopRun, run_recipe
from gmt_tune.integrations.torchtune.finite import nonfinite_gradients
from gmt_tune.integrations.torchtune.mask import build_gradient_mask, register_gradient_mask
from gmt_tune.integrations.torchtune.optimizers import keep_tensor_lr
from gmt_tune.integrations.torchtune.progress import Progress
from gmt_tune.integrations.torchtune.signals import StopSignal
from gmt_tune.integrations.torchtune.validation import Validation
from gmt_tune.reporting.run_log import RunLog, mask_detail

FullFinetuneRecipeDistributed = load_base_recipe("full_finetune_distributed").FullFinetuneRecipeDistributed

# Saving and resuming is done by RunCheckpoints; torchtune's own knows only the ends of epochs.
_NOT_TORCHTUNES = {"resume_from_checkpoint": False, "enable_async_checkpointing": False}

log = utils.get_logger("INFO")


class GMTFullFinetuneRecipe(FullFinetuneRecipeDistributed):
    """
    Full fine-tuning of dense transformer LLMs with a gradient mask, on one device or many.

    It extends torchtune's ``FullFinetuneRecipeDistributed``. All of torchtune's options keep their names and
    meaning: activation checkpointing and offloading, gradient accumulation, gradient clipping, optimizer in
    backward, compilation, packed data, chunked losses, learning rate schedulers, profiler, metric loggers.

        - Gradient mask (``gradient_mask``). Right before each optimizer step, all gradient entries but the
          fraction ``density`` with the largest magnitude are zeroed: after accumulation, reduction over the
          ranks, normalisation by the token count, and clipping (whose norm is that of the whole gradient).
          With optimizer in backward, each parameter is masked right before its own step. Without the section,
          or with ``density: 1.0``, losses and weights equal torchtune's recipe bit for bit.

        - Optimizers. ``torch.optim.AdamW``, torchao's ``AdamW8bit``, ``AdamW4bit``, ``AdamWFp8`` (also with
          ``bf16_stochastic_round: True``) or any other ``torch.optim.Optimizer``. Momentum and weight decay
          still move weights whose gradient was zeroed.

        - One device or many. ``tune run gmt_full_finetune`` runs in one process, on a GPU or on the CPU;
          ``tune run --nproc_per_node 8 gmt_full_finetune`` shards with FSDP2.

        - Checkpoints (``save_every_n_steps``, ``keep_last_n_checkpoints``; with ``enable_async_checkpointing``
          written while training goes on), also at the end of each epoch and
          when the run is told to stop (SIGTERM, SIGINT, SIGUSR1). ``resume_from_checkpoint: True`` finds the
          newest whole one in ``output_dir`` and goes on exactly, or starts if there is none yet.

        - Validation (``dataset_val``, ``run_val_every_n_steps``, ``batch_size_val``).

        - Numbers that go wrong (``on_nonfinite``). A loss or gradient that is not finite ends the run before
          any weight changes (``error``), or that step is left out and counted (``skip``).

        - Evaluation (``evaluation``). A component made with the tokenizer is called with the model before the
          first and after the last step; what it returns is printed and logged.

    Args:
        cfg (DictConfig): OmegaConf object parsed from yaml file

    Raises:
        UserError: if the config, the data, a checkpoint or a number is wrong; the message names the remedy.
    """

    def __init__(self, cfg: DictConfig) -> None:
        process_group.ensure_rendezvous()
        super().__init__(OmegaConf.merge(cfg, _NOT_TORCHTUNES))
        self._checkpoints = RunCheckpoints(cfg, self.rank, self.world_size)
        self._run_val_every_n_steps = cfg.get("run_val_every_n_steps", None)
        self._on_nonfinite = cfg.get("on_nonfinite", "error")
        self._stop = StopSignal()
        self._epoch = self._batches_done = self._skipped_steps = 0
        self._validation_seconds = 0.0
        self._resumed_rng = None

    def setup(self, cfg: DictConfig) -> None:
        """Set up data, model, optimizer, loss and scheduler as torchtune does, then the mask; then resume."""
        # Data first: what is wrong with it shows before minutes are spent on loading the model.
        self._tokenizer = config.instantiate(cfg.tokenizer)
        self._dataset, self._packed = data.build_dataset(cfg.dataset, self._tokenizer)
        data.check_enough_rows(
            len(self._dataset), cfg.batch_size, self.data_parallel_dim, self._gradient_accumulation_steps
        )
        cfg = OmegaConf.merge(cfg, _NOT_TORCHTUNES, {"checkpointer": self._checkpoints.find()})
        self._checkpoint_client = CheckpointClient(cfg)
        super().setup(cfg)

        self._mask = build_gradient_mask(cfg.get("gradient_mask", None), self._model)
        if self._mask is not None:
            if not self._optimizer_in_bwd:
                # The loop checks loss and gradients over all ranks before the mask acts.
                self._mask.error_if_nonfinite = False
            register_gradient_mask(self._mask, self._optimizers)
        self._validation = self._setup_validation(cfg)
        self._evaluate = None
        if cfg.get("evaluation", None) is not None:
            self._evaluate = config.instantiate(cfg.evaluation, self._tokenizer)
        if self._checkpoints.resumed is not None:
            self._resume(self._checkpoints.resumed)
        self._checkpoints.check_space(self._model, self._optimizers, self.total_epochs, self._steps_per_epoch)
        if self._is_rank_zero:
            self._run_log = RunLog(self._output_dir, OmegaConf.to_container(cfg, resolve=True))
            self._run_log.truncate_after(self.global_step)

    def _setup_model(self, *args, **kwargs):
        with process_group.no_memory_stats_on_cpu(self._device):
            return super()._setup_model(*args, **kwargs)

    def _setup_lr_scheduler(self, *args, **kwargs):
        lr_scheduler = super()._setup_lr_scheduler(*args, **kwargs)
        if lr_scheduler is not None and self._optimizer_in_bwd:
            keep_tensor_lr(lr_scheduler, self._optimizers)
        return lr_scheduler

    def _setup_data(self, cfg_dataset, shuffle, batch_size, collate_fn, dataloader_state_dict=None):
        self._collate = data.build_collate(collate_fn, self._packed, self._tokenizer.pad_id, self._loss_fn.ignore_index)
        return data.build_dataloader(
            self._dataset,
            self._collate,
            batch_size=batch_size,
            shuffle=shuffle,
            rank=self.dp_rank,
            world_size=self.dp_size,
        )

    def _setup_validation(self, cfg: DictConfig) -> Validation | None:
        if cfg.get("dataset_val", None) is None:
            return None
        dataset, packed = data.build_dataset(cfg.dataset_val, self._tokenizer, "dataset_val")
        collate_fn = cfg.get("collate_fn", "torchtune.data.padded_collate_sft")
        ignore_index = self._loss_fn.ignore_index
        return Validation(
            dataset,
            batch_size=cfg.get("batch_size_val", None) or cfg.batch_size,
            collate_fn=data.build_collate(collate_fn, packed, self._tokenizer.pad_id, ignore_index),
            ignore_index=ignore_index,
            rank=self.dp_rank,
            world_size=self.dp_size,
        )

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
        )
        self.seed = progress["seed"]
        self.global_step = checkpoint.step
        self.epochs_run = self._epoch = progress["epoch"]
        self._batches_done = progress["samples"] // (self._dataloader.batch_size * self.dp_size)
        self._skipped_steps = progress["skipped_steps"]

    @property
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """The one optimizer, or with optimizer in backward, one for each parameter."""
        if self._optimizer_in_bwd:
            return list(self._optim_ckpt_wrapper.optim_map.values())
        return [self._optimizer]

    def train(self) -> None:
        """The training loop."""
        if self.epochs_run >= self.total_epochs:
            utils.log_rank_zero(log, f"The run is complete: its model is in {self._checkpoints.last_saved}.")
            return
        process_group.cleanup_before_training(self._device)
        if self.global_step == 0:
            self._run_evaluation("before")
        self._stop.install()
        self._zero_grad()

        run_start = t0 = time.perf_counter()
        running_loss, num_tokens = 0, 0
        self._profiler.start()

        first_batch = self._batches_done  # not zero, like epochs_run, when training goes on from a checkpoint
        for epoch in range(self.epochs_run, self.total_epochs):
            self._epoch = epoch
            steps_done = first_batch // self._gradient_accumulation_steps
            progress = Progress(
                epoch + 1, self._steps_per_epoch, steps_done, self._log_every_n_steps, self._is_rank_zero
            )
            self._dataloader.sampler.set_epoch(self._epoch)
            batches = self._dataloader
            if steps_done == self.max_steps_per_epoch:
                batches = []  # the checkpoint was saved at the last step of this epoch
            elif first_batch:
                batches.sampler.load_state_dict({"yielded": first_batch * batches.batch_size})

            iterator = iter(batches)
            if self._resumed_rng is not None:
                training_state.set_rng_state(self._resumed_rng, self._device)
                self._resumed_rng = None
            for idx, batch in enumerate(iterator, start=first_batch):
                self._record_memory_history(idx)
                utils.batch_to_device(batch, self._device)

                # The loss is a mean over tokens: weigh it by their number, so that micro-batches of
                # different lengths add up to the mean over all tokens of the step.
                batch_tokens = (batch["labels"] != self._loss_fn.ignore_index).sum()
                num_tokens += batch_tokens
                loss = self._loss(batch) * batch_tokens
                running_loss += loss.detach()

                if self._optimizer_in_bwd:
                    # Optimizers step during backward, so the loss must be normalised before it. The world
                    # size undoes the division by it in FSDP2's gradient reduction.
                    num_tokens, running_loss, must_stop = self._reduce(num_tokens, running_loss)
                    self._check_finite(None, running_loss, idx)
                    loss = loss * (self.world_size / num_tokens)
                loss.backward()

                if (idx + 1) % self._gradient_accumulation_steps == 0:
                    if not self._optimizer_in_bwd:
                        num_tokens, running_loss, must_stop = self._reduce(num_tokens, running_loss)
                        if self._check_finite(self._model, running_loss, idx):
                            training.scale_grads(self._model, self.world_size / num_tokens)
                            if self._clip_grad_norm is not None:
                                grad_norm = torch.nn.utils.clip_grad_norm_(
                                    self._model.parameters(), max_norm=float(self._clip_grad_norm)
                                )
                                if isinstance(grad_norm, DTensor):
                                    grad_norm = grad_norm.full_tensor()
                            # The gradient mask is the optimizer's step pre-hook: it acts inside this call,
                            # on the gradient as it is now.
                            self._optimizer.step()
                        self._optimizer.zero_grad(set_to_none=True)

                    self.global_step += 1
                    self._batches_done = idx + 1
                    if self._lr_scheduler is not None:
                        self._lr_scheduler.step()

                    loss_to_log = (running_loss.item() / num_tokens).item()
                    seconds = time.perf_counter() - t0
                    tokens_per_second = num_tokens.item() / seconds
                    mask_share = self._mask.seconds / seconds if self._mask is not None else None
                    progress.update(self.global_step, loss_to_log, tokens_per_second, mask_share)
                    if self._is_rank_zero and self.global_step % self._log_every_n_steps == 0:
                        metrics = {
                            "loss": loss_to_log,
                            "lr": get_lr(self._optim_ckpt_wrapper if self._optimizer_in_bwd else self._optimizer),
                            "tokens_per_second_per_gpu": tokens_per_second / self.world_size,
                        }
                        if self._log_peak_memory_stats:
                            metrics.update(training.get_memory_stats(device=self._device))
                        if self._clip_grad_norm is not None:
                            metrics["grad_norm"] = grad_norm.item()
                        if self._on_nonfinite == "skip":
                            metrics["skipped_steps"] = self._skipped_steps
                        if self._mask is not None:
                            metrics.update(self._mask.metrics())
                            self._run_log.log_mask(self.global_step, lambda: mask_detail(self._mask))
                        self._log(metrics)

                    self._finish_step(progress, must_stop)
                    running_loss, num_tokens = 0, 0
                    t0 = time.perf_counter()
                    self._stop_memory_history(idx)
                    self._profiler.step()

                if (idx + 1) // self._gradient_accumulation_steps == self.max_steps_per_epoch:
                    break

            progress.close()
            self.epochs_run += 1
            first_batch = 0

        self._profiler.stop()
        self._stop.uninstall()
        seconds = time.perf_counter() - run_start
        saving, validating = self._checkpoints.seconds, self._validation_seconds
        utils.log_rank_zero(
            log,
            f"Trained for {seconds:.1f} s, of which saving took {saving:.1f} s ({saving / seconds:.1%}) and "
            f"validating {validating:.1f} s ({validating / seconds:.1%}).",
        )
        self._run_evaluation("after")
        utils.log_rank_zero(
            log, f"The model is in {self._checkpoints.last_saved}; to draw the run: gmt-tune report {self._output_dir}"
        )

    def _loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy of one micro-batch, ``tokens`` and ``labels`` of shape [batch, sequence]."""
        labels_BS = batch.pop("labels")
        with self.activations_handling_ctx:
            logits = self._model(**batch)
        # The model's output at a position predicts the next token: shift the labels, not the logits.
        ignored_B1 = torch.full_like(labels_BS[:, :1], self._loss_fn.ignore_index)
        labels_BS = torch.hstack((labels_BS[..., 1:], ignored_B1))
        if isinstance(logits, list):  # chunked losses take the chunks as they are
            return self._loss_fn(logits, labels_BS)
        return self._loss_fn(logits.reshape(-1, logits.size(-1)), labels_BS.reshape(-1))

    def _reduce(self, num_tokens: torch.Tensor, running_loss: torch.Tensor):
        """Token count and loss over all ranks, and whether any rank was told to stop: all decide alike."""
        counts = torch.stack((num_tokens, torch.full_like(num_tokens, int(self._stop.received > 0))))
        torch.distributed.all_reduce(counts)
        torch.distributed.all_reduce(running_loss)
        return counts[0], running_loss, counts[1]

    def _check_finite(self, model, loss: torch.Tensor, idx: int) -> bool:
        """Whether this step may change weights; raises where ``on_nonfinite`` says so. All ranks agree."""
        if model is not None:
            bad = nonfinite_gradients(model, loss)
        else:
            bad = None if torch.isfinite(loss).item() else []
        if bad is None:
            return True
        what = f"the gradient of '{bad[0]}' (and {len(bad) - 1} more)" if bad else "the loss"
        first = idx + 1 - self._gradient_accumulation_steps
        rows = data.rows_of_batches(self._dataloader, first, idx + 1)
        where = f"{what} holds NaN or infinity at step {self.global_step + 1}, rows {rows} of the data set"
        if self._on_nonfinite == "skip" and model is not None:
            self._skipped_steps += 1
            utils.log_rank_zero(log, f"Left out a step: {where}.")
            return False
        raise UserError(
            f"{where}; no weight was changed by it. Lower the learning rate, set clip_grad_norm, look at these rows, "
            f"or set on_nonfinite: skip; the last checkpoint: {self._checkpoints.last_saved or 'none yet'}"
        )

    def _finish_step(self, progress: Progress, must_stop: torch.Tensor) -> None:
        """Validate and save where it is due; leave if the run was told to stop."""
        steps_in_epoch = self._batches_done // self._gradient_accumulation_steps
        ends_epoch = steps_in_epoch == self._steps_per_epoch
        ends_run = ends_epoch and self._epoch + 1 == self.total_epochs
        val_loss = None
        every = self._run_val_every_n_steps
        if self._validation is not None and (ends_run or (every and self.global_step % every == 0)):
            start = time.perf_counter()
            val_loss = self._validation.run(self._model, self._loss, self._device)
            self._validation_seconds += time.perf_counter() - start
            progress.show_validation(val_loss)
            self._log({"val_loss": val_loss})
        if ends_epoch:
            self._checkpoints.save(self, f"epoch_{self._epoch}", is_final=ends_run, val_loss=val_loss)
        elif self._checkpoints.is_due(self.global_step) or must_stop:
            self._checkpoints.save(self, f"step_{self.global_step}", val_loss=val_loss)
        if ends_run or must_stop:
            self._checkpoints.finish()
        if must_stop and not ends_run:
            raise StopRun(
                f"Stopped after step {self.global_step} and saved {self._checkpoints.last_saved}. "
                "To go on, run the same command with resume_from_checkpoint=True.",
                self._stop.received or 15,
            )

    def _log(self, metrics: dict[str, float]) -> None:
        """Numbers of this step, for the config's metric logger and for ``gmt-tune report``."""
        if self._is_rank_zero:
            self._metric_logger.log_dict(metrics, step=self.global_step)
            self._run_log.log(self.global_step, metrics)

    def _zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def _run_evaluation(self, when: str) -> None:
        if self._evaluate is None:
            return
        results = self._evaluate(self._model)
        if self._is_rank_zero:
            for name, value in results.items():
                print(f"{name} {when}: {value:.4g}", flush=True)
        self._log({f"{name}_{when}": value for name, value in results.items()})

    def _record_memory_history(self, idx: int) -> None:
        """Start recording CUDA allocations when the profiler's active steps of the first epoch begin."""
        if self._profiles_memory() and idx == self.profiler_wait_steps + self.profiler_warmup_steps:
            torch.cuda.memory._record_memory_history()

    def _stop_memory_history(self, idx: int) -> None:
        if self._profiles_memory() and idx == (
            self.profiler_wait_steps + self.profiler_warmup_steps + self.profiler_active_steps
        ):
            torch.cuda.memory._record_memory_history(enabled=None)

    def _profiles_memory(self) -> bool:
        return self._is_rank_zero and self._epoch == 0 and self.profiler_profile_memory and self._device.type == "cuda"


def finetune(cfg: DictConfig) -> None:
    """One run of the recipe."""
    config.log_config(recipe_name="GMTFullFinetuneRecipe", cfg=cfg)
    recipe = GMTFullFinetuneRecipe(cfg=cfg)
    recipe.setup(cfg=cfg)
    recipe.train()
    recipe.cleanup()


@config.parse
def recipe_main(cfg: DictConfig) -> int:
    """
    Entry point for the recipe.

    Configurable parameters are read in the following order:
        - Parameters specified in config (see available configs through ``tune ls``)
        - Overwritten by arguments from the command-line
    """
    return run_recipe(cfg, finetune)


if __name__ == "__main__":
    sys.exit(recipe_main())
