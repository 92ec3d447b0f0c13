"""The SmolLM2 configs fit the model that ``gmt-tune fetch`` leaves, and training with one lowers its loss."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny_gguf import tiny_tokenizer
from word_problems import write_problems

CONFIGS = Path(__file__).parents[2] / "configs" / "smollm2"
EVAL_LOSS = Path(__file__).parents[2] / "benchmarks" / "eval_loss.py"
SMOLLM2_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "vocab_size": 49152,
    "rope_theta": 100000,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("name", ["135M_gmt_cpu", "135M_gmt_single_device"])
def test_config_fits_the_model_and_the_override_for_local_data_that_it_names(tmp_path, name):
    from safetensors.numpy import save_file

    from gmt_tune.integrations.torchtune.config.check import check_config

    text = (CONFIGS / f"{name}.yaml").read_text()
    overrides = re.search(r"#   (dataset\.source=json dataset\.data_files=\S+)\n", text).group(1).split()
    write_problems(tmp_path / "train.jsonl", 4, seed=0)
    overrides[-1] = f"dataset.data_files={tmp_path / 'train.jsonl'}"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMOLLM2_135M))
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    save_file({}, folder / "model.safetensors")
    cfg = OmegaConf.merge(
        OmegaConf.create(text),
        OmegaConf.from_dotlist([*overrides, f"checkpointer.checkpoint_dir={folder}", f"output_dir={tmp_path / 'out'}"]),
    )
    check_config(cfg)

    from torchtune import config

    tokenizer = config.instantiate(cfg.tokenizer)
    assert len(config.instantiate(cfg.dataset, tokenizer)) == 4
    assert cfg.tokenizer.max_seq_len <= cfg.model.max_seq_len
    assert f"tune run gmt_full_finetune --config smollm2/{name}\n" in text


@pytest.mark.slow
def test_fine_tuning_lowers_the_loss_and_transformers_loads_the_checkpoint(tmp_path, run_tune):
    from gmt_tune.cli.main import main

    model = tmp_path / "SmolLM2-135M-Instruct"
    assert main(["fetch", "smollm2-135m", str(model)]) == 0
    write_problems(tmp_path / "train.jsonl", 64, seed=0)
    write_problems(tmp_path / "test.jsonl", 8, seed=1)

    def measure(folder: Path) -> dict:
        command = [sys.executable, EVAL_LOSS, folder, "--data", tmp_path / "test.jsonl", "--json"]
        command += ["--ask", "What is the capital of France?", "--max-new-tokens", "12"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(result.stdout)

    run_tune(
        "run",
        "gmt_full_finetune",
        "--config",
        "smollm2/135M_gmt_cpu",
        f"checkpointer.checkpoint_dir={model}",
        "dataset.source=json",
        f"dataset.data_files={tmp_path / 'train.jsonl'}",
        f"output_dir={tmp_path / 'out'}",
        "max_steps_per_epoch=5",
        cwd=tmp_path,
        timeout=1800,
    )
    before, after = measure(model), measure(tmp_path / "out" / "epoch_0")
    assert after["loss"] < 0.9 * before["loss"]
    assert "Paris" in after["answer"]
