"""docs/results/peft_table.md: the comparison's figures beside ours, and whether our configs fit on the card.

``published.json`` holds rows of huggingface/peft, method_comparison/MetaMathQA/results, each with its commit; what they
lack there is null. ``simulated.json`` holds peaks of ``gmt-tune memory --measure``.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from benchmarks.peft_table.experiments import HERE, config_file, experiments, methods
from benchmarks.peft_table.runner import result_file
from benchmarks.quality.experiment import ROOT

PAGE = ROOT / "docs" / "results" / "peft_table.md"
RESULTS = HERE / "results"
SIMULATED = HERE / "simulated.json"
GIB = 2**30

COLUMNS = (
    "experiment_name", "peft_type", "total_time", "train_time", "test_accuracy", "train_loss", "accelerator_memory_max",
    "accelerator_memory_reserved_99th", "accelerator_memory_reserved_avg", "num_trainable_params", "file_size",
    "created_at", "task_name", "forgetting*", "transformers_version",
)  # fmt: skip
_FOLDER = "https://github.com/huggingface/peft/tree/main/method_comparison/MetaMathQA"
_SOURCE = "https://github.com/huggingface/peft/blob/{commit}/method_comparison/MetaMathQA/results/{name}.json"

_TEXT = """# In PEFT's public comparison: the table to fill

PEFT compares methods on one task ([method_comparison/MetaMathQA]({folder})): Llama 3.2 3B trains on MetaMathQA and
answers GSM8K's test set. Here are its figures, and configs of ours for the same work. This page is written by
`python -m benchmarks.peft_table table`.

{state}

One command, on a machine with one GPU of 48 GB, makes all of them, one after the other, and writes this page; what is
done is skipped when it is repeated:

```sh illustration
pip install -c constraints.txt -e '.[transformers]'
tune download meta-llama/Llama-3.2-3B --output-dir /tmp/Llama-3.2-3B --ignore-patterns "original/consolidated*"
python -m benchmarks.peft_table run
```

`run compact_0.05 --lr 1e-4` makes one row. The pipeline has run on a CPU alone, with the quickstart's model and a
few local rows (`tests/benchmarks/test_peft_table.py`).

## The table

The columns are the comparison's, in its order: seconds, bytes, entries; `forgetting*` is the rise of the loss on
Wikipedia, lower is better. The names of the first rows lead to the files that they were read from.

{table}

- Their rows are of the dates in `created_at`, all on an NVIDIA L40S. Where `forgetting*` is empty, it was not measured
  at that date, or without shifting targets by one token, as until [July
  2026](https://github.com/huggingface/peft/pull/3419). LoRA of rank 32 has since been given [an accuracy of
  0.478](https://github.com/huggingface/peft/pull/3552) and [a forgetting of
  0.050](https://github.com/huggingface/peft/pull/3725).
- **Accuracies of 2025 and of 2026 hardly compare.** Full fine-tuning has 0.500 and 0.472 at the same training loss to
  four digits. The likely reason: from version 5 on, transformers takes what a call leaves open from the model's
  `generation_config.json`, and Llama 3.2's asks for sampling at temperature 0.6; before, the same call was greedy. Ours
  is measured both ways: `test_accuracy` as with version 5, and in the JSON file `test accuracy, greedy`.

## Does it fit

`gmt-tune memory --config benchmarks/peft_table/configs/NAME.yaml` says so from the config alone, for 4 sequences of the
longest length, 768 tokens. The last column is the peak of a few steps of the recipe on a simulated GPU
(`python -m benchmarks.peft_table simulate`, with PyTorch's build for CUDA and no GPU). GiB:

{memory}

The comparison's full fine-tuning reserved {full} GiB at most, in training or in its evaluation. Its loss keeps the
logits; ours, `LinearCrossEntropyLoss`, does not.

## What is the same, and what is not

- **The same**: 5,000 steps of 4 rows, in the order of the comparison (rows of up to 1,300 characters, in buckets of 20
  batches with their longest rows first); the prompt; the loss on all tokens of prompt and answer; bf16 weights; seed
  0; cosine schedule with 500 steps of warm-up; gradients clipped to norm 1; no activation checkpointing; GSM8K's 1,319
  test problems, up to 300 new tokens, 50 at a time, and which numbers count as the answer; the loss on the first 100
  texts of FineWiki, up to 768 tokens of each, before and after. If the data are in the right order,
  `train total tokens` is theirs: 4,198,051.
- **Full fine-tuning** has their optimizer and rate: `torch.optim.AdamW`, 1e-5, its default weight decay. Updates below
  1/512 of a bf16 weight are rounded away, there as here.
- **Masked** adds the mask and nothing else. **Compact** has `CompactAdamW` with 8-bit states and stochastic rounding,
  and layers take turns of 20 steps. Their best rates are unknown: each rate of the grid is a row, and none is chosen by
  the test set.
- **Every row ends with an end-of-text token.** There, the longest row of a batch has none.
- **Nothing is generated on the way.** The comparison asks 50 problems every 250 steps, and does not count that time;
  here they are asked once, at the end.
- **Time**: `train_time` is the steps, the test, and both losses on Wikipedia, `total_time` everything with data and
  loading. **Memory**: `accelerator_memory_max` is the most that training or evaluation had reserved. The other two are
  of the most that was reserved in each step; the comparison looks behind each step, and empties the cache every tenth.
- **Trainable parameters and file**: all weights can be selected in some step, so both are those of full fine-tuning.
  How many entries did change is in the JSON file (`fraction_changed`).
"""


def write_page() -> Path:
    """Write the page; returns its file."""
    PAGE.write_text(page(), encoding="utf-8")
    return PAGE


def page() -> str:
    """The page, from the published figures, the results that there are, and the configs."""
    published = json.loads((HERE / "published.json").read_text(encoding="utf-8"))
    own = [_own_row(experiment) for experiment in experiments([])]
    missing = sum(row["created_at"] is None for row in own)
    state = f"{len(own) - missing} of our {len(own)} rows are filled."
    if missing == len(own):
        state = "**Our rows are empty: no such GPU was at hand.**"
    full = max(row["accelerator_memory_max"] for row in published if row["peft_type"] == "full-finetuning")
    rows = [*map(_published_row, published), *own]
    parts = {"folder": _FOLDER, "table": _table(rows), "memory": _memory_table(), "full": f"{full / GIB:.1f}"}
    return _TEXT.format(state=state, **parts)


def row_of(result: dict) -> dict:
    """A row of the table from a result of the comparison's layout."""
    run, train, packages = result["run_info"], result["train_info"], result["meta_info"]["package_info"]
    last = train["metrics"][-1]
    return {
        "experiment_name": run["experiment_name"],
        "peft_type": run["peft_config"]["peft_type"] if run["peft_config"] else "full-finetuning",
        "total_time": run["total_time"],
        "train_time": train["train_time"],
        "test_accuracy": last["test accuracy"],
        "train_loss": last["train loss"],
        **{name: train[name] for name in COLUMNS[6:11]},
        "created_at": run["created_at"],
        "forgetting*": last["forgetting"],
        "transformers_version": packages["transformers-version"],
    }


def _own_row(experiment) -> dict:
    file = result_file(RESULTS, experiment)
    if file.is_file():
        return row_of(json.loads(file.read_text(encoding="utf-8")))
    known = {"experiment_name": experiment.name, "peft_type": experiment.peft_type}
    return {name: known.get(name) for name in COLUMNS}


def _published_row(row: dict) -> dict:
    link = _SOURCE.format(commit=row["commit"], name=row["experiment_name"].replace("/", "--"))
    return {**row, "experiment_name": f"[{row['experiment_name']}]({link})"}


def _table(rows: list[dict]) -> str:
    lines = [" | ".join(COLUMNS), " | ".join(["---"] * 2 + ["---:"] * (len(COLUMNS) - 2))]
    for row in rows:
        row = {**row, "task_name": "MetaMathQA"}
        for name in ("total_time", "train_time"):
            row[name] = None if row[name] is None else round(row[name])
        if row["created_at"] is not None:
            row["created_at"] = f"{datetime.fromisoformat(row['created_at']):%Y-%m-%d}"
        lines.append(" | ".join(_cell(row[name]) for name in COLUMNS))
    return "\n".join(f"| {line} |" for line in lines)


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.3f}"
    return f"{value:,}" if isinstance(value, int) else value


def _memory_table() -> str:
    from gmt_tune.cli.memory import allocated_bytes, report

    simulated = json.loads(SIMULATED.read_text(encoding="utf-8")) if SIMULATED.is_file() else {}
    head = [
        "config",
        "weights",
        "optimizer states",
        "activations",
        "in all",
        "fits 48 GB",
        "of it tensors",
        "simulated",
    ]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for method in methods():
        found = report(str(config_file(method)), 1, [])
        parts = {row["name"]: row["device_bytes"] for row in found["rows"]}
        bytes_ = [*(parts[name] for name in head[1:4]), found["device_bytes"]]
        peak = simulated.get(method)
        lines.append(
            [
                f"`{method}`",
                *(f"{number / GIB:.1f}" for number in bytes_),
                "yes" if "48 GB" in found["fits_on"] else "no",
                f"{allocated_bytes(found) / GIB:.1f}",
                f"{peak['peak_bytes'] / GIB:.1f}" if peak else "",
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
