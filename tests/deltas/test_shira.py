"""A delta as an adapter that PEFT loads: the base with it gives the tuned model's logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_folders import changed
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gmt_tune.cli.main import main

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip


def save_pair(folder: Path, dtype: torch.dtype, tune, **options) -> tuple[Path, Path]:
    """Folders of a small Llama and of what ``tune`` makes of its weights; and their delta, d.safetensors."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**CONFIG.to_dict(), **options})).to(dtype)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tune(name, parameter))
    model.save_pretrained(folder / "tuned")
    assert main(["delta", *(str(folder / name) for name in ("base", "tuned", "d.safetensors"))]) == 0
    return folder / "base", folder / "tuned"


def adapter(folder: Path) -> int:
    return main(["apply", "--adapter", *(str(folder / name) for name in ("base", "d.safetensors", "adapter"))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_norms", [True, False])
def test_peft_gives_the_tuned_models_logits(with_norms, dtype, tmp_path):
    def tune(name: str, parameter: torch.Tensor) -> torch.Tensor:
        if "embed" in name or "layers.1.mlp" in name:
            return parameter
        if "norm" in name:
            return parameter + 0.125 * with_norms
        return changed(parameter, 0.15 if "q_proj" in name else 0.05)

    base, tuned = save_pair(tmp_path, dtype, tune)
    assert adapter(tmp_path) == 0
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        before = model(tokens).logits
        wanted = AutoModelForCausalLM.from_pretrained(tuned, dtype=dtype)(tokens).logits
        model = PeftModel.from_pretrained(model, tmp_path / "adapter")
        found = model(tokens).logits
    assert (before - wanted).abs().max() > 0.1
    torch.testing.assert_close(found, wanted)
    whole = AutoModelForCausalLM.from_pretrained(tuned, dtype=dtype).state_dict()
    for name, weight in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(weight, whole[name])


@pytest.mark.parametrize("is_tied", [True, False])
def test_embeddings_are_named_as_what_peft_cannot_hold(is_tied, tmp_path, capsys):
    def tune(name: str, parameter: torch.Tensor) -> torch.Tensor:
        return changed(parameter, 0.05) if "embed" in name else parameter

    save_pair(tmp_path, torch.float32, tune, tie_word_embeddings=is_tied)
    assert adapter(tmp_path) == 1
    said = capsys.readouterr().err
    assert "model.embed_tokens.weight, which changed, is no linear layer and no norm; train with it frozen" in said
    assert not (tmp_path / "adapter").exists()


def test_biases_of_linear_layers_are_named_too(tmp_path, capsys):
    save_pair(
        tmp_path, torch.float32, lambda name, p: p + 1 if name.endswith("q_proj.bias") else p, attention_bias=True
    )
    assert adapter(tmp_path) == 1
    assert "layers.0.self_attn.q_proj.bias, which changed, is the bias of a linear layer" in capsys.readouterr().err


def test_too_many_entries_for_a_small_layer(tmp_path, capsys):
    def tune(name: str, parameter: torch.Tensor) -> torch.Tensor:
        return changed(parameter, 0.99 if "up_proj" in name else 0.05) if "proj" in name else parameter

    save_pair(tmp_path, torch.float32, tune)
    assert adapter(tmp_path) == 1
    assert "its most changed layer needs r = 23, for which" in capsys.readouterr().err
