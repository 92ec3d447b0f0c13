"""torchtune's recipe, set up our way: data before the model, then the mask and all that watches a training."""

import contextlib
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchtune import config, utils
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.training.checkpointing._checkpoint_client import CheckpointClient

from gmt_tune._quiet import quieter
from gmt_tune.data.rows import positions_in_words
from gmt_tune.integrations.torchtune import process_group
from gmt_tune.integrations.torchtune.checkpoint.exchange import TrainingParts
from gmt_tune.integrations.torchtune.checkpoint.run_checkpoints import RunCheckpoints
from gmt_tune.integrations.torchtune.checkpoint.tied_output import drop_tied_output
from gmt_tune.integrations.torchtune.config.mask import build_gradient_mask
from gmt_tune.integrations.torchtune.config.public import PublicConfigLogger, public_config
from gmt_tune.integrations.torchtune.run import data, schedule
from gmt_tune.integrations.torchtune.run.base_recipes import load_base_recipe
from gmt_tune.integrations.torchtune.run.gradients import FiniteCheck
from gmt_tune.integrations.torchtune.run.logs import RunLogs
from gmt_tune.integrations.torchtune.run.low_bit import show_states_as_float32_
from gmt_tune.integrations.torchtune.run.profiling import RunProfiler
from gmt_tune.integrations.torchtune.run.signals import StopSignal
from gmt_tune.integrations.torchtune.run.step_numbers import StepNumbers
from gmt_tune.integrations.torchtune.run.validation import Validation
from gmt_tune.masking.optimizers import CompactOptimizer
from gmt_tune.masking.tracker import SelectionTracker
from gmt_tune.models.losses import LinearCrossEntropyLoss
from gmt_tune.reporting.mask_metrics import MaskMetrics
from gmt_tune.reporting.run_log import RunLog

FullFinetuneRecipeDistributed: Any = load_base_recipe("full_finetune_distributed").FullFinetuneRecipeDistributed

# RunCheckpoints saves and resumes; torchtune's own code, which knows only the ends of epochs, must not.
_WITHOUT_RESUMING = {"resume_from_checkpoint": False, "enable_async_checkpointing": False}

log = utils.get_logger("INFO")


class RecipeSetup(FullFinetuneRecipeDistributed):
    """Sets up a training with a gradient mask, on one device or many."""

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
        self._numbers = StepNumbers()
        self._stops: Tensor | None = None  # how many ranks were asked to stop when they had done this step's backward
        self._must_stop = False  # whether any was, as far as the host knows
        # On CUDA, a step's numbers are looked at behind the next step, unless something is due: no step waits for them
        self._reads_late = self._device.type == "cuda"
        self._last_numbers: dict[str, float] = {}  # that are known
        self._tokens_per_second: float | None = None
        self._tokens: int | None = 0  # of all steps that the host knows of; None where a part of the run is not known
        self._window_tokens = 0.0  # of the steps since the host last waited for the device
        self._knows_all = True  # whether it has done so in this step
        self._profiler = RunProfiler(None)
        self._epoch = self._batches_done = 0
        self._further_steps = 0  # steps of this epoch done before resuming, when the world size was different
        # Those whose gradients the next optimizer step will apply: (epoch, number in it)
        self._micro_batches: list[tuple[int, int]] = []
        self._resumed_rng: dict | None = None
        self._validation_seconds = 0.0
        self._is_saved_as_final = False

    def _check_row(self, row: Mapping, key: str) -> None:
        """Raise UserError if a row of the config's section ``key`` is not what the recipe trains on."""

    def _setup_reference(self, cfg: DictConfig) -> None:
        """Set up further models, which are not trained."""

    def _resume(self, checkpoint) -> None:
        raise NotImplementedError

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
        cfg = OmegaConf.merge(cfg, _WITHOUT_RESUMING)
        cfg.checkpointer = checkpointer  # replaced: its list of files does not merge with a filename_format
        self._evaluate = None
        if cfg.get("evaluation", None) is not None:
            self._evaluate = config.instantiate(cfg.evaluation, self._tokenizer)
        self._checkpoint_client = CheckpointClient(cfg)
        super().setup(cfg)
        if self.world_size > 1:
            for optimizer in self._optimizers:
                show_states_as_float32_(optimizer)
        if isinstance(self._loss_fn, LinearCrossEntropyLoss):
            self._loss_fn.attach_(self._model)
        # Use the original config: ${checkpointer...} must resolve to the user's folder, not to the resumed one
        self._setup_reference(original)

        if self._is_compact and self._clip_grad_norm is not None:
            self._optimizer.max_grad_norm = float(self._clip_grad_norm)
        self._mask = build_gradient_mask(cfg.get("gradient_mask", None), self._model)
        if self._mask is None and self._is_rank_zero:
            log.info(
                "The config has no section gradient_mask: all entries are trained, as torchtune's own recipe does."
            )
        # Before the mask: hooks act in the order in which they are registered
        self._finite = FiniteCheck(
            self._model,
            self._optimizers,
            steps_in_backward=self._optimizer_in_bwd,
            skips=self._skips_nonfinite,
            is_late=self._reads_late and not self.fsdp_cpu_offload,  # which waits for gradients anyway
            rows_of=lambda batches: data.rows_of_batches(self._dataloader, batches),
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
        self._parts = TrainingParts(
            model=self._model,
            optimizers=self._optimizers,
            lr_scheduler=self._lr_scheduler,
            mask=self._mask,
            tracker=self._selection_tracker,
            device=self._device,
            checkpointer=self._checkpoint_client._get_checkpointer(),
        )
        if self._checkpoints.resumed is not None:
            self._resume(self._checkpoints.resumed)
        self._checkpoints.check_space(self._parts, self.total_epochs, self._steps_per_epoch)
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
        is_on = bool((cfg_profiler or {}).get("enabled", True))
        with contextlib.nullcontext() if is_on else quieter(log, logging.ERROR):  # that it is off, the config says
            profiler = super()._setup_profiler(cfg_profiler)
        if self._is_rank_zero and self.profiler_profile_memory and self._device.type == "cuda":
            first = self.profiler_wait_steps + self.profiler_warmup_steps
            return RunProfiler(profiler, range(first, first + self.profiler_active_steps))
        return RunProfiler(profiler)

    @property
    def _is_compact(self) -> bool:
        """Whether gradients and states exist for selected entries alone."""
        return not self._optimizer_in_bwd and isinstance(self._optimizer, CompactOptimizer)

    @property
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """The one optimizer, or with optimizer in backward, one for each parameter."""
        if self._optimizer_in_bwd:
            return list(self._optim_ckpt_wrapper.optim_map.values())
        return [self._optimizer]
