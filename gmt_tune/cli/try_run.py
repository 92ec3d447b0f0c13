"""``gmt-tune try``: a config with its own data and tokenizer on the CPU, before a card is rented.

The real model is replaced by a small one of the same family (``gmt_tune.cli.dry_run``); all else goes the way of
``tune run``.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gmt_tune.cli.configs import add_arguments, check_world_size, devices_of_run_line, read_config
from gmt_tune.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from gmt_tune.cli.dry_run.facts import Plan, Rows
    from gmt_tune.cli.dry_run.trial import Trial
    from gmt_tune.memory import Estimate

GIB = 2**30
_WIDTH, _MARGIN = 110, 14
# All files of weights, of Python and of checkpoints of other formats, in the one pattern that `tune download` takes
_WEIGHTS = "*.[bps]*"


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "try",
        help="try a config on the CPU with a small model, before a card is rented",
        description="Check a config as `tune run` does, with your own data and tokenizer, and train, save and resume "
        "for a few steps on the CPU, with a small random model of the same family in place of the real one. Takes "
        "about a minute, writes nothing into output_dir, and needs of the model its tokenizer and config.json alone.",
        epilog="Example: gmt-tune try --config llama3_1/8B_gmt_compact checkpointer.checkpoint_dir=my_llama",
        usage="gmt-tune try --config NAME_OR_PATH [--world-size N] [KEY=VALUE ...]",
    )
    parser.add_argument(
        "--config", metavar="NAME_OR_PATH", required=True, help="a config's name, as `tune ls` shows it, or its file"
    )
    add_arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    from omegaconf import OmegaConf

    from gmt_tune.cli.dry_run.facts import look_at_rows, plan
    from gmt_tune.cli.dry_run.trial import try_out
    from gmt_tune.memory import estimate
    from gmt_tune.memory.moments import has_reference

    check_world_size(args)
    start = time.monotonic()
    cfg, text = read_config(args.config, args.overrides)
    is_dpo = has_reference(cfg)
    recipe = "gmt_full_dpo" if is_dpo else "gmt_full_finetune"
    devices = args.world_size or _devices(cfg, text)
    print(f"{args.config} as tune run {recipe} would train it, on the CPU with a small model\n\nchecked", flush=True)
    _check(cfg, recipe, text)
    _show("config", "every key, value and file, as tune run does before it loads the model")

    rows = look_at_rows(cfg, "dataset", pairs=is_dpo)
    vocab_size, parameters = _size_of_model(cfg)
    _check_ids(rows, vocab_size, cfg)
    ids = f"ids of tokens go up to {rows.largest_id:,}, and the model has {vocab_size:,} of them"
    _show("tokenizer", f"{cfg.tokenizer._component_}: {ids}")
    _show("data", _of_rows(rows, cfg, is_dpo))
    if cfg.get("dataset_val", None) is not None:
        held_out = look_at_rows(cfg, "dataset_val", pairs=is_dpo)
        _check_ids(held_out, vocab_size, cfg)
        _show("held out", _of_rows(held_out, cfg, is_dpo))
    resolved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    try:
        memory, reason = estimate(resolved, devices), ""
    except UserError as error:
        memory, reason = None, str(error)
    steps = plan(resolved, rows.packs or rows.rows, devices, parameters, memory)
    _show("schedule", _of_plan(steps, cfg, devices, is_packed=rows.packs is not None))
    _show("disk", _of_disk(steps, cfg))
    with tempfile.TemporaryDirectory(prefix="gmt-tune-try-") as folder:
        trial = try_out(cfg, recipe, Path(folder), vocab_size, rows.median)
    for name, sentence in _of_trial(trial, cfg):
        _show(name, sentence)
    _show("memory", _of_memory(memory, devices) if memory is not None else f"not estimated: {reason}")
    print("\nnot checked")
    for name, sentence in _not_checked(cfg, trial, rows.longest, devices):
        _show(name, sentence)
    print(f"\n{time.monotonic() - start:.0f} s. To train: {_run_line(args, recipe, devices)}")
    return 0


# ---------------------------------------------------------------------------- the config


def _check(cfg: DictConfig, recipe: str, text: str) -> None:
    """The check of ``tune run``, which weights may lack for; folders that it makes to write into do not stay."""
    from gmt_tune.integrations.torchtune.config.check import check_config
    from gmt_tune.integrations.torchtune.run.preference import OWN_KEYS, check_preference_config

    with _folders_as_they_were(cfg):
        try:
            check_config(cfg, OWN_KEYS if recipe == "gmt_full_dpo" else (), needs_weights=False)
        except UserError as error:
            if re.match(r"(checkpointer\.checkpoint_dir|tokenizer\.\w+) \S+ does not exist", str(error)):
                raise UserError(f"{error}. {_download(cfg, text)}") from None
            raise
    if recipe == "gmt_full_dpo":
        check_preference_config(cfg)


def _download(cfg: DictConfig, text: str) -> str:
    """How to get what a dry run needs of a model, which is not its weights."""
    line = re.search(r"^#\s*tune download (\S+)", text, re.MULTILINE)
    folder = cfg.checkpointer.checkpoint_dir
    repository = line[1] if line else "<REPOSITORY>"
    token = " --hf-token <HF_TOKEN>" if line is None or "--hf-token" in text else ""
    return (
        "A dry run needs the tokenizer and config.json alone: "
        f'tune download {repository} --output-dir {folder} --ignore-patterns "{_WEIGHTS}"{token}'
    )


@contextlib.contextmanager
def _folders_as_they_were(cfg: DictConfig) -> Iterator[None]:
    """Remove the folders of a run that are made within the block, and are empty."""
    from omegaconf import OmegaConf

    made: set[Path] = set()
    for key in ("output_dir", "checkpointer.output_dir", "metric_logger.log_dir"):
        with contextlib.suppress(Exception):  # what is wrong with it, the check says
            folder = Path(str(OmegaConf.select(cfg, key))).absolute()
            made.update(path for path in (folder, *folder.parents) if not path.exists())
    try:
        yield
    finally:
        for path in sorted(made, reverse=True):  # those within others first
            with contextlib.suppress(OSError):
                path.rmdir()


def _devices(cfg: DictConfig, text: str) -> int:
    return max(devices_of_run_line(text), cfg.get("tensor_parallel_dim", 1))


def _size_of_model(cfg: DictConfig) -> tuple[int, int]:
    """Entries of its vocabulary, and parameters."""
    import torch
    from torchtune import config

    with torch.device("meta"):
        model = config.instantiate(cfg.model)
    embeddings = getattr(getattr(model, "tok_embeddings", None), "weight", None)
    if embeddings is None:
        raise UserError(
            f"model._component_ {cfg.model._component_} builds a model without tok_embeddings, of which gmt-tune try "
            "can make no small one: take one of torchtune's or gmt-tune's families"
        )
    return embeddings.shape[0], sum(p.numel() for p in model.parameters())


def _check_ids(rows: Rows, vocab_size: int, cfg: DictConfig) -> None:
    if rows.largest_id >= vocab_size:
        raise UserError(
            f"tokenizer ({cfg.tokenizer._component_}) gives the token {rows.largest_id}, but model "
            f"({cfg.model._component_}) has {vocab_size} of them, counted from 0: take the tokenizer of the model"
        )


# ---------------------------------------------------------------------------- what is said


def _show(name: str, sentence: str) -> None:
    lines = textwrap.wrap(sentence, _WIDTH - _MARGIN, break_long_words=False, break_on_hyphens=False)
    print(f"  {name:<{_MARGIN - 2}}" + f"\n{'':<{_MARGIN}}".join(lines), flush=True)


def _of_rows(rows: Rows, cfg: DictConfig, is_dpo: bool) -> str:
    max_seq_len = cfg.tokenizer.get("max_seq_len", None)
    seen = "all" if rows.seen == rows.rows else f"{rows.seen:,}"
    answer = "an answer with its prompt" if is_dpo else "a row"
    parts = [
        f"{rows.rows:,} {'pairs' if is_dpo else 'rows'}, {seen} of them made into tokens: {rows.median:,} of {answer} "
        f"(median), {rows.longest:,} of the longest"
    ]
    if max_seq_len is None:
        parts.append("tokenizer.max_seq_len is null, so none is cut")
    else:
        cut = f"and {_percent(rows.cut)} are cut" if rows.cut else "and none is longer"
        parts.append(f"tokenizer.max_seq_len is {max_seq_len:,}, {cut}")
    parts.append(f"{_percent(rows.in_loss)} of the tokens are in the loss")
    if rows.packs is not None:
        parts.append(f"packed into about {rows.packs:,} sequences")
    if rows.without_loss:
        parts.append(f"{_percent(rows.without_loss)} have no token in the loss, and teach nothing")
    return "; ".join(parts)


def _percent(share: float) -> str:
    return "less than 0.1%" if share < 0.001 else f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def _of_plan(plan: Plan, cfg: DictConfig, devices: int, *, is_packed: bool) -> str:
    what = "pairs" if cfg.get("ref_checkpointer", None) is not None else "rows"
    what = "packed sequences" if is_packed else what
    most = " (max_steps_per_epoch)" if plan.steps_of_an_epoch == cfg.get("max_steps_per_epoch", None) else ""
    where = f" on {devices} devices" if devices > 1 else ""
    parts = [
        f"{plan.steps:,} steps{where}, {plan.steps_of_an_epoch:,} an epoch{most}, each of {plan.rows_of_a_step} {what}"
    ]
    if plan.rates:
        first, middle, last, highest = plan.rates
        course = f"the learning rate is {highest:.3g}"
        if len(set(plan.rates)) > 1:
            course += (
                f" at its highest, {first:.3g} at the first step, {middle:.3g} in the middle, {last:.3g} at the end"
            )
        parts.append(course)
    if plan.warmup is not None:
        late = (
            ", and the run ends before that: lower lr_scheduler.num_warmup_steps" if plan.warmup >= plan.steps else ""
        )
        parts.append(f"it rises for {plan.warmup:,} steps{late}")
    return "; ".join(parts)


def _of_disk(plan: Plan, cfg: DictConfig) -> str:
    every, keep = cfg.get("save_every_n_steps", None), cfg.get("keep_last_n_checkpoints", None)
    when = "at the end of each epoch" + (f" and every {every:,} steps" if every else "")
    if plan.saves == 1:
        return f"one checkpoint, at the end: {_gib(plan.weights_bytes)} of weights"
    which = f"the newest {keep:,} of them are" if keep else "all are"
    return (
        f"{plan.saves:,} checkpoints, {when}: {_gib(plan.weights_bytes)} of weights each, and about "
        f"{_gib(plan.state_bytes)} of training state in all but the last; {which} kept, about {_gib(plan.kept_bytes)} "
        "in all"
    )


def _of_trial(trial: Trial, cfg: DictConfig) -> Iterator[tuple[str, str]]:
    losses = " ".join(f"{loss:.2f}" for loss in trial.losses)
    yield "training", f"{trial.steps} steps, loss {losses}"
    if trial.val_loss is not None:
        yield "validation", f"val_loss {trial.val_loss:.2f}"
    if cfg.get("evaluation", None) is not None:
        yield "evaluation", ", ".join(f"{name} {value:.3g}" for name, value in trial.evaluation.items()) or "it ran"
    yield "saving", f"{', '.join(trial.model_files)} in the checkpointer's format, and the training state"
    same = "the weights at the end are those of the run that was not interrupted, bit for bit"
    other = "it goes on, but its weights differ from those of the run that was not interrupted: something is random"
    yield "resuming", same if trial.is_same else other


def _of_memory(memory: Estimate, devices: int) -> str:
    from gmt_tune.memory import cards_that_fit

    each = " on each device" if devices > 1 else ""
    if memory.device.startswith("cpu"):
        return f"about {_gib(memory.device_bytes)} of the host's, by gmt-tune memory"
    cards = cards_that_fit(memory.device_bytes)
    fits = (
        f"fits cards of {', '.join(cards)}" if cards else "fits no single card: use more devices, or a smaller config"
    )
    host = f", and {_gib(memory.host_bytes)} of the host's{each and ' for each'}" if memory.host_bytes else ""
    return f"about {_gib(memory.device_bytes)}{each}{host}, by gmt-tune memory: {fits}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:,.1f} MiB"


def _not_checked(cfg: DictConfig, trial: Trial, longest: int, devices: int) -> Iterator[tuple[str, str]]:
    from gmt_tune.integrations.torchtune.config.files import file_names

    folder, files = Path(cfg.checkpointer.checkpoint_dir), file_names("checkpointer", cfg.checkpointer.checkpoint_files)
    missing = [name for name in files if not (folder / name).is_file()]
    there = f": {len(missing)} of {len(files)} files are not in {folder} yet" if missing else ""
    yield "weights", f"those of the real model{there}. What a loss is, the real run shows"
    smaller = [f"batch_size {trial.batch_size}, gradient_accumulation_steps 1"]
    if trial.max_seq_len is not None and trial.max_seq_len < min(longest, cfg.tokenizer.max_seq_len):
        smaller.append(f"rows cut at {trial.max_seq_len} tokens")
    yield "size", f"the small run had {', '.join(smaller)}, so that it takes a minute"
    yield "speed", "and all that needs the card: kernels, compile, offloading of activations"
    if devices > 1:
        yield "devices", f"the config is for {devices} devices; the small run had one process, and shards nothing"
    yield "logger", f"nothing was sent to {cfg.metric_logger._component_.rpartition('.')[2]}"


def _run_line(args: argparse.Namespace, recipe: str, devices: int) -> str:
    processes = f"--nproc_per_node {devices} " if devices > 1 else ""
    return f"tune run {processes}{recipe} --config {shlex.join([args.config, *args.overrides])}"
