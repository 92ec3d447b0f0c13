"""The SmolLM2 builders compute what transformers computes from the same checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from tiny_gguf import tiny_llama

from gmt_tune.models.smollm2 import smollm2_1_7b, smollm2_135m, smollm2_360m, smollm2_tokenizer
from gmt_tune.models.smollm2.model_builders import _smollm2

# The published configurations of the models
PUBLISHED = {
    smollm2_135m: (134_515_008, {"layers": 30, "heads": 9, "kv_heads": 3, "dim": 576, "ffn": 1536, "rope": 100_000}),
    smollm2_360m: (361_821_120, {"layers": 32, "heads": 15, "kv_heads": 5, "dim": 960, "ffn": 2560, "rope": 100_000}),
    smollm2_1_7b: (
        1_711_376_384,
        {"layers": 24, "heads": 32, "kv_heads": 32, "dim": 2048, "ffn": 8192, "rope": 130_000},
    ),
}


def load_weights(model, folder: Path, output_dir: Path) -> None:
    """Load a Hugging Face folder as the configs do."""
    from torchtune.training import FullModelHFCheckpointer

    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(folder),
        checkpoint_files=["model.safetensors"],
        model_type="LLAMA3_2",
        output_dir=str(output_dir),
    )
    model.load_state_dict(checkpointer.load_checkpoint()["model"])
    model.eval()


@pytest.mark.parametrize("builder", PUBLISHED, ids=lambda builder: builder.__name__)
def test_dimensions_are_the_published_ones(builder):
    with torch.device("meta"):
        model = builder()
    attention = model.layers[0].attn
    parameters, shape = PUBLISHED[builder]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert shape == {
        "layers": len(model.layers),
        "heads": attention.num_heads,
        "kv_heads": attention.num_kv_heads,
        "dim": attention.embed_dim,
        "ffn": model.layers[0].mlp.w1.out_features,
        "rope": attention.pos_embeddings.base,
    }
    assert model.max_seq_len == 8192
    assert model.norm.eps == 1e-5


def test_logits_equal_those_of_transformers_on_a_tiny_model(tmp_path):
    theirs = tiny_llama(49_152, rope_theta=100_000.0)
    theirs.save_pretrained(tmp_path / "model")
    ours = _smollm2(2, 4, 2, 64, 128, rope_base=100_000, max_seq_len=256)
    load_weights(ours, tmp_path / "model", tmp_path / "out")
    # The whole context: scaled rotary embeddings would differ at large positions
    tokens = torch.randint(0, 49_152, (2, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def real_model(tmp_path_factory) -> Path:
    """The model itself, got the way users get it."""
    from gmt_tune.cli.main import main

    folder = tmp_path_factory.mktemp("models") / "SmolLM2-135M-Instruct"
    assert main(["fetch", "smollm2-135m", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_logits_equal_those_of_transformers_on_the_real_weights(real_model, tmp_path):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32).eval()
    ours = smollm2_135m()
    load_weights(ours, real_model, tmp_path)
    tokens = torch.tensor([smollm2_tokenizer(str(real_model / "tokenizer.json")).encode("Once upon a time, " * 200)])
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_ids_equal_the_real_chat_template(real_model):
    from torchtune.data import Message
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(real_model)
    ours = smollm2_tokenizer(str(real_model / "tokenizer.json"))
    texts = ["\n\nIn 2024, 48 clips?", "  <<48/2=24>>24 clips.\n#### 72", "déjà vu →\n", "", "x"]
    for i, text in enumerate(texts):
        chat = [{"role": "system", "content": "Be brief."}] * (i % 2)
        chat += [{"role": "user", "content": text}, {"role": "assistant", "content": texts[i - 1]}]
        messages = [Message(role=turn["role"], content=turn["content"]) for turn in chat]
        assert ours.tokenize_messages(messages)[0] == theirs.apply_chat_template(chat, return_dict=False)
        prompt = theirs.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False)
        assert ours.tokenize_messages(messages[:-1], add_end_tokens=False)[0] == prompt


@pytest.mark.slow
def test_the_real_model_answers_in_plain_english(real_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert json.loads((real_model / "config.json").read_text())["model_type"] == "llama"
