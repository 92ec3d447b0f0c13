"""The example, as its users run it, on a tiny model and two processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="deepspeed is not installed: requirements.txt beside this file says how")

EXAMPLE = Path(__file__).parents[3] / "examples" / "deepspeed_smollm2.py"


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_smollm2_runs_masks_each_step_and_saves(tiny_world, tmp_path, stage):
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    before = AutoModelForCausalLM.from_pretrained(tiny_world / "model")
    before.save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_world / "model" / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(tmp_path / "model")
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", EXAMPLE]
    given = ["--model", tmp_path / "model", "--data", tiny_world / "train.jsonl", "--stage", str(stage), "--steps", "8"]
    process = subprocess.run(
        [*launched, *given, "--output-dir", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-6000:]
    densities = [float(density) for density in re.findall(r"step \d+: loss [\d.]+, ([\d.]+)% of", process.stdout)]
    assert len(densities) == 8 and all(19 < density < 21 for density in densities)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not after.lm_head.weight.equal(before.lm_head.weight)
