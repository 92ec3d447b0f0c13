"""The example script, as its users run it, on a tiny model."""

import os
import re
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

SCRIPT = Path(__file__).parents[3] / "examples" / "sft_smollm2_trl.py"
CHATML = """{% for turn in messages %}<|im_start|>{{ turn.role }}
{{ turn.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_sft_smollm2_trl_runs_and_masks_each_step(tiny_world, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_world / "model").save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_world / "model" / "tokenizer.json"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    ).save_pretrained(tmp_path / "model")
    process = subprocess.run(
        [sys.executable, SCRIPT, "--model", tmp_path / "model", "--data", tiny_world / "train.jsonl"]
        + ["--output-dir", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert process.returncode == 0, process.stderr[-5000:]
    densities = [float(density) for density in re.findall(r"'mask/density': '?([\d.]+)", process.stdout)]
    assert len(densities) == 10 and all(0.19 < density < 0.21 for density in densities)
    assert re.search(r"loss of the first 3 steps [\d.]+, of the last 3 steps [\d.]+", process.stdout)
