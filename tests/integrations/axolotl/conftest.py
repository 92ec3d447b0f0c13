"""A tiny Axolotl run on disk. All tests here need the real axolotl: see requirements.txt beside this file."""

import os

import pytest

# Before axolotl is first imported, which reads them then
os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_DISABLED", "true")


@pytest.fixture
def axolotl_config(chat_model, tiny_world, tmp_path):
    """Function that gives an Axolotl config of four steps on the CPU as a dict; keywords replace top-level keys."""

    def make(**changes) -> dict:
        config = {
            "base_model": str(chat_model),
            "plugins": ["gmt_tune.integrations.axolotl.GradientMaskPlugin"],
            "gradient_mask": {"density": 0.2, "dense": []},
            "datasets": [
                {
                    "path": str(tiny_world / "train.jsonl"),
                    "ds_type": "json",
                    "type": {
                        "field_instruction": "question",
                        "field_output": "answer",
                        "format": "{instruction} ",
                        "no_input_format": "{instruction} ",
                    },
                }
            ],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "dataset_num_proc": 1,
            "sequence_len": 128,
            "attn_implementation": "sdpa",
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 4,
            "optimizer": "adamw_torch",
            "learning_rate": 3e-3,
            "lr_scheduler": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "bf16": False,
            "fp16": False,
            "tf32": False,
            "logging_steps": 1,
            "save_steps": 2,
            "output_dir": str(tmp_path / "out"),
            **changes,
        }
        return {key: value for key, value in config.items() if value is not ...}

    return make
