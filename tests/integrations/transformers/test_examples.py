"""The example scripts, as their users run them, on a tiny model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[3] / "examples"
CHATML = """{% for turn in messages %}<|im_start|>{{ turn.role }}
{{ turn.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture
def run(tiny_world, tmp_path):
    """Function that runs an example, and gives what it printed."""
    AutoModelForCausalLM.from_pretrained(tiny_world / "model").save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_world / "model" / "tokenizer.json"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    ).save_pretrained(tmp_path / "model")

    def run(name):
        process = subprocess.run(
            [sys.executable, EXAMPLES / name, "--model", tmp_path / "model", "--data", tiny_world / "train.jsonl"]
            + ["--output-dir", tmp_path / "out"],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        assert process.returncode == 0, process.stderr[-5000:]
        return process.stdout

    return run


def test_sft_smollm2_trl_runs_and_masks_each_step(run):
    output = run("sft_smollm2_trl.py")
    densities = [float(density) for density in re.findall(r"'mask/density': '?([\d.]+)", output)]
    assert len(densities) == 10 and all(0.19 < density < 0.21 for density in densities)
    assert re.search(r"loss of the first 3 steps [\d.]+, of the last 3 steps [\d.]+", output)


@pytest.mark.parametrize(
    "name", ["compact_smollm2_trainer.py", pytest.param("compact_smollm2_trl.py", marks=pytest.mark.slow)]
)
def test_compact_examples_run_and_log_the_norm_that_they_clip_by(run, name):
    output = run(name)
    assert len(re.findall(r"'grad_norm': '?[\d.]+", output)) == 10
    if "trainer" in name:
        (size,) = re.findall(r"moments take ([\d.]+) bytes a parameter", output)
        assert 0.3 < float(size) < 0.6  # 32 bits, as all tensors are small: 8 bytes times 0.05
