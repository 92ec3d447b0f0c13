"""A config's recipe, set up and trained for a few steps on a simulated GPU: what memory it takes, and when."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import runpy
import sys
import tempfile
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchtune import training

from gmt_tune.integrations.torchtune.checkpoint.run_checkpoints import RunCheckpoints
from gmt_tune.integrations.torchtune.plugin.registry import recipe_path
from gmt_tune.masking.schedule import Schedule
from gmt_tune.memory.estimate import sequence_length
from gmt_tune.memory.moments import has_reference
from gmt_tune.memory.simulation import selecting
from gmt_tune.memory.simulation.gpu import SimulatedGPU, without_simulation
from gmt_tune.memory.states import compiled_scratch_bytes

_HERE = "gmt_tune.memory.simulation.inputs"


@dataclass
class Measured:
    """One training step of a simulated run, as the first of its devices sees it.

    Attributes:
        peak: bytes allocated at the most.
        parts: what they consist of at that moment, by name; what neither model, optimizer nor mask holds is
            "activations and working memory".
        phase: what the step was doing then.
        setup_peak: bytes allocated at the most before the first step.
        reads: how often the host waited for the device or read from it, by what and where, without the logging of the
            step; ``logging_reads``: in it.
        launches: kernels launched, by name.
    """

    peak: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    phase: str = ""
    setup_peak: int = 0
    reads: Counter[str] = field(default_factory=Counter)
    logging_reads: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)


class _Enough(Exception):
    """Ends a run."""


def measure(cfg: DictConfig, world_size: int = 1) -> Measured:
    """Train a config's recipe for a few steps on a simulated GPU, or on the first of several that shard the model.

    Every micro-batch is full, the model is not compiled, and packed rows are taken to be whole ones. With
    ``CompactAdamW`` the step is one in which as many entries are due as ever.

    Raises:
        UserError: if PyTorch is no build for CUDA, or a component of the config is refused.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _Run(_simulated(cfg, folder), world_size).measure()


def _simulated(cfg: DictConfig, folder: str) -> DictConfig:
    """The same config with simulated inputs, writing to a folder that is nobody's."""
    length, pairs = sequence_length(cfg), has_reference(cfg)
    weights = {"_component_": f"{_HERE}.Checkpointer", "model": cfg.model, "dtype": cfg.dtype, "output_dir": folder}
    weights["model_type"] = (cfg.get("checkpointer", None) or {}).get("model_type", "LLAMA3")
    changed = {
        "output_dir": folder,
        "device": "cuda",
        "tokenizer": {"_component_": f"{_HERE}.Tokenizer", "pad_id": 0, "max_seq_len": length},
        "dataset": {"_component_": f"{_HERE}.Rows", "length": length, "pairs": pairs},
        "metric_logger": {"_component_": f"{_HERE}.Logger"},
        "checkpointer": weights,
        "gradient_accumulation_steps": min(2, cfg.gradient_accumulation_steps),  # further ones need no more memory
        "resume_from_checkpoint": False,
        "save_every_n_steps": None,
        "max_steps_per_epoch": None,
        "epochs": 1,
        "shuffle": False,
        "compile": False,
        "log_peak_memory_stats": False,
        "write_report": False,
        "save_model_card": False,
    }
    changed |= {key: None for key in ("dataset_val", "evaluation", "profiler", "track_selection_every_n_steps")}
    if pairs:
        changed["ref_checkpointer"] = weights
    result = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    for key, value in changed.items():
        result[key] = value
    return result


class _Run:
    def __init__(self, cfg: DictConfig, world_size: int) -> None:
        self._cfg, self._world_size = cfg, world_size
        self._found = Measured()
        self._steps = 0

    def measure(self) -> Measured:
        name = "gmt_full_dpo" if has_reference(self._cfg) else "gmt_full_finetune"
        module = runpy.run_path(str(recipe_path(name)), run_name=name)
        recipe_class = module["GMTFullDPORecipe" if name == "gmt_full_dpo" else "GMTFullFinetuneRecipe"]
        with _quietly(), SimulatedGPU(self._world_size) as gpu, simulated_ranks(self._world_size):
            self._gpu = gpu
            gpu.enter_context(mock.patch.object(torch, "compile", simulated_compile(gpu)))
            gpu.enter_context(mock.patch.object(training, "set_torch_num_threads", lambda: None))  # for each rank
            # Nothing is read or written
            gpu.enter_context(mock.patch.object(RunCheckpoints, "find", lambda *args: self._cfg.checkpointer))
            gpu.enter_context(mock.patch.object(RunCheckpoints, "check_space", lambda *args: None))
            self._recipe = recipe = recipe_class(cfg=self._cfg)
            try:
                recipe.setup(self._cfg)
                self._found.setup_peak = gpu.peak
                # In backward, FSDP2 has whole weights in the place of some
                self._parameters = list(recipe._model.parameters())
                self._select_all_at_once()
                recipe._log_step = self._around_logging(recipe._log_step)
                recipe._finish_step = self._end_of_step
                with contextlib.suppress(_Enough):
                    recipe.train()
            finally:
                recipe._close(has_failed=True)
        return self._found

    def _around_logging(self, log_step: Callable[..., None]) -> Callable[..., None]:
        def log(*args: Any) -> None:
            before = Counter(self._gpu.reads)
            log_step(*args)
            self._found.reads, self._found.logging_reads = before, self._gpu.reads - before

        return log

    def _end_of_step(self) -> None:
        gpu, recipe = self._gpu, self._recipe
        self._steps += 1
        if self._steps == 2:
            self._found.peak, self._found.launches = gpu.peak, Counter(gpu.launches)
            gpu.expected_peak, gpu.at_peak = gpu.peak, self._look
        if self._steps == 3:
            raise _Enough
        self._let_most_be_due()
        recipe._micro_batches.clear()
        gpu.reset()

    # ------------------------------------------------------------------ what is due

    def _select_all_at_once(self) -> None:
        """Where tensors take turns, let all be due at the first step: each then has states, as after all turns."""
        mask = self._recipe._mask
        if mask is not None:
            for owner, name, value in selecting.patches(self._gpu, mask.density):
                self._gpu.enter_context(mock.patch.object(owner, name, value))
            self._schedule = mask._schedule
            mask._schedule = Schedule(mask._schedule.refresh_every)

    def _let_most_be_due(self) -> None:
        """Let the next step be one in which as many entries are due as ever."""
        mask = self._recipe._mask
        if mask is None:
            return
        mask._schedule, turns = self._schedule, mask.refresh_every or 1
        due: Counter[int] = Counter()
        for name, p in mask.masked_parameters.items():
            due[-mask._phases.get(name, 0) % turns] += p.numel()
        (most, _), *_ = due.most_common(1)
        mask._steps = dict.fromkeys(mask.masked_parameters, most + turns)

    # ------------------------------------------------------------------ what is there at the peak

    def _look(self) -> None:
        """Say what the memory consists of at this moment, and what is being done."""
        recipe, left = self._recipe, self._gpu.storages()
        reference = getattr(recipe, "_ref_model", None)
        optimizers, mask = recipe._optimizers, recipe._mask
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        states_of = [list(optimizer.state.values()) for optimizer in optimizers]
        for optimizer in optimizers:
            gradients += [part.local for part, _ in getattr(optimizer, "_taken", {}).values()]
        held = {
            "weights": [*self._parameters, *recipe._model.buffers()],
            "reference model": [] if reference is None else [*reference.parameters(), *reference.buffers()],
            "gradients": gradients,
            "optimizer states": states_of,
            "gradient mask": [] if mask is None else [_kept(s) for s in mask._selections.values()],
        }
        for name, owners in held.items():
            storages = {t.untyped_storage() for t in _plain_tensors(owners)}
            if n_bytes := sum(left.pop(storage, 0) for storage in storages):
                self._found.parts[name] = n_bytes
        self._found.parts["activations and working memory"] = sum(left.values())
        self._found.phase = _phase()


def simulated_compile(gpu: SimulatedGPU) -> Callable[..., Any]:
    """In place of ``torch.compile``: of torchao's optimizers, what the compiled step needs; all else as it is."""

    def compile(function: Any = None, **options: Any) -> Any:
        if getattr(function, "__name__", "") != "single_param_adam":
            return function if function is not None else (lambda function: function)

        def update(*args: Any) -> None:
            p, grad, step, exp_avg, *others = (arg.to_local() if hasattr(arg, "to_local") else arg for arg in args)
            scratch = compiled_scratch_bytes(4 if "4bit" in type(exp_avg).__name__ else 8) * p.numel()
            torch.empty(scratch, dtype=torch.uint8, device=p.device)
            with gpu.ignoring():
                function(p, grad, step, exp_avg, *others)
            gpu.launch("compiled single_param_adam")

        return update

    return compile


def _kept(selection: Any) -> Any:
    """The tensors that a selection is kept in."""
    return vars(selection.places) if hasattr(selection, "places") else selection.bits


def _plain_tensors(held: Any) -> Iterator[Tensor]:
    """All tensors in something, by what they are made of."""
    if isinstance(held, Tensor):
        if hasattr(held, "__tensor_flatten__"):
            for name in held.__tensor_flatten__()[0]:
                yield from _plain_tensors(getattr(held, name))
        else:
            yield held
    elif isinstance(held, dict):
        yield from _plain_tensors(list(held.values()))
    elif isinstance(held, (list, tuple)):
        for each in held:
            yield from _plain_tensors(each)


def _phase() -> str:
    """What the training step is doing, by the functions that are running."""
    running = {frame.name for frame in traceback.extract_stack()}
    if threading.current_thread() is not threading.main_thread():  # one of autograd's
        return "recomputing a layer" if "recompute_fn" in running else "backward"
    named = {
        "_select_compactly": "selection",
        "_mask": "selection",
        "step": "optimizer step",
        "_clip_gradients": "clipping",
        "_scale_gradients": "scaling the gradient",
        "_check_finite": "looking for NaN and infinity",
        "_loss": "loss",
        "_numbers_of_pairs": "loss",
    }
    return next((phase for name, phase in named.items() if name in running), "between")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what a run says of itself: its numbers mean nothing."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def simulated_ranks(world_size: int) -> Iterator[None]:
    """A process group of so many ranks, of which this is the first and the others are not there."""
    import torch.distributed as dist
    import torch.distributed._tools.fake_collectives  # noqa: F401  # they compute shapes of collectives
    from torch.testing._internal.distributed.fake_pg import FakeStore

    variables = {"RANK": "0", "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    without_simulation(dist.init_process_group)("fake", store=FakeStore(), rank=0, world_size=world_size)
    answers = {
        "all_gather_object": lambda out, obj, group=None: out.__setitem__(slice(None), [obj] * len(out)),
        "broadcast_object_list": lambda objects, src=0, **kwargs: None,
        "barrier": lambda *args, **kwargs: None,
        "init_process_group": lambda *args, **kwargs: None,
    }
    base = sys.modules.get("torchtune_recipes_full_finetune_distributed")  # where a recipe is run
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, variables))
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(dist, name, answer))
        if base is not None:
            stack.enter_context(mock.patch.object(base, "init_process_group", answers["init_process_group"]))
            make_mesh = without_simulation(base.init_device_mesh)
            stack.enter_context(mock.patch.object(base, "init_device_mesh", make_mesh))
        try:
            yield
        finally:
            dist.destroy_process_group()
