"""A tiny LLaMA-Factory run on disk. All tests here need the real one: see requirements.txt beside this file."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"
if importlib.util.find_spec("llamafactory") is not None and importlib.util.find_spec("torchaudio") is None:
    sys.path.append(str(Path(__file__).with_name("without_audio")))

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before it is first imported


@pytest.fixture
def run_example(tmp_path):
    """Function that runs an example with a config, as its users do; gives what it printed."""

    def run(name: str, config: dict, check: bool = True, processes: int = 1) -> str:
        (tmp_path / "config.yaml").write_text(json.dumps(config))  # which YAML includes
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        process = subprocess.run(
            [sys.executable, *(torchrun if processes > 1 else []), EXAMPLES / name, "config.yaml"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )
        output = process.stdout + process.stderr
        assert (process.returncode == 0) == check, output[-6000:]
        return output

    return run


@pytest.fixture
def sft_config(chat_model, tiny_world, tmp_path):
    """Function that gives a config of four steps on the CPU as a dict; keywords replace its keys."""
    columns = {"prompt": "question", "response": "answer"}
    info = {"sums": {"file_name": str(tiny_world / "train.jsonl"), "columns": columns}}
    pairs = {"prompt": "question", "chosen": "answer", "rejected": "rejected"}
    info["pairs"] = {"file_name": str(tmp_path / "pairs.jsonl"), "columns": pairs, "ranking": True}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    rows = map(json.loads, (tiny_world / "train.jsonl").read_text().splitlines())
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({**row, "rejected": "No."}) + "\n" for row in rows))

    def make(**changes) -> dict:
        return {
            "model_name_or_path": str(chat_model),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "full",
            "template": "chatml",
            "dataset_dir": str(tmp_path),
            "dataset": "sums",
            "cutoff_len": 128,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 4,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_steps": 2,
            "output_dir": str(tmp_path / "out"),
            "report_to": "none",
            "use_cpu": True,
            **changes,
        }

    return make


@pytest.fixture
def v1_config(chat_model, tiny_world, tmp_path):
    """The same for LLaMA-Factory's v1, with AdamW under a mask."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    # v1 does not resume a model with tied embeddings
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(chat_model, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "untied")
    PreTrainedTokenizerFast.from_pretrained(chat_model).save_pretrained(tmp_path / "untied")

    def turn(role: str, text: str, weight: float) -> dict:
        return {"role": role, "content": [{"type": "text", "value": text}], "loss_weight": weight}

    with (tmp_path / "turns.jsonl").open("w") as file:
        for row in map(json.loads, (tiny_world / "train.jsonl").read_text().splitlines()):
            turns = [turn("user", row["question"], 0.0), turn("assistant", row["answer"], 1.0)]
            file.write(json.dumps({"messages": turns}) + "\n")

    def make(mask: dict, **changes) -> dict:
        return {
            "model": str(tmp_path / "untied"),
            "train_dataset": str(tmp_path / "turns.jsonl"),
            "micro_batch_size": 4,
            "global_batch_size": 8,
            "cutoff_len": 128,
            "max_steps": 4,
            "bf16": False,
            "batching_workers": 0,
            "save_steps": 2,
            "output_dir": str(tmp_path / "out"),
            "optim_config": {"name": "gradient_mask", "lr": 3e-3, **mask},
            **changes,
        }

    return make
