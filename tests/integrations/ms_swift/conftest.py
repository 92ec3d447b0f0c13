"""A tiny ms-swift run on disk. All tests here need the real one: see requirements.txt beside this file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[3] / "examples" / "ms_swift_plugin.py"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before it is first imported


@pytest.fixture
def swift_options(chat_model, tiny_world, tmp_path):
    """Function that gives the options of four steps on the CPU as ``swift`` takes them; keywords replace some."""
    with (tmp_path / "turns.jsonl").open("w") as file:
        for row in map(json.loads, (tiny_world / "train.jsonl").read_text().splitlines()):
            turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
            file.write(json.dumps({"messages": turns, "rejected_response": "No."}) + "\n")

    def make(**changes) -> list[str]:
        options = {
            "model": chat_model,
            "model_type": "llama",
            "template": "chatml",
            "tuner_type": "full",
            "torch_dtype": "float32",
            "fp16": False,  # which ms-swift takes float32 to mean
            "dataset": tmp_path / "turns.jsonl",
            "split_dataset_ratio": 0,
            "max_length": 128,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 4,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0,
            "logging_steps": 1,
            "save_steps": 2,
            "output_dir": tmp_path / "out",
            "add_version": False,
            "report_to": "none",
            "dataloader_num_workers": 0,
            "use_hf": True,
            "check_model": False,
            "external_plugins": PLUGIN,
            "callbacks": "gradient_mask",
            **changes,
        }
        return [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]

    return make


@pytest.fixture
def run_swift(tmp_path):
    """Function that runs a ``swift`` command; gives what it printed."""

    def run(command: str, options: list[str], **environment: str) -> str:
        process = subprocess.run(
            [Path(sys.executable).with_name("swift"), command, *options],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        output = process.stdout + process.stderr
        assert process.returncode == 0, output[-6000:]
        return output

    return run
