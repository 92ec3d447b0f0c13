"""The folder made from a GGUF file holds the model and the tokenizer that were written into it."""

import pytest
import torch
from tiny_gguf import CHAT_TEMPLATE, TEXTS, tiny_llama, tiny_tokenizer, write_gguf

from gmt_tune.models.gguf_to_hf import convert_gguf


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_llama(tokenizer.get_vocab_size())


def logits(model, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokenizer.encode("".join(TEXTS)).ids])).logits


def test_unquantized_weights_come_back_bit_for_bit(tmp_path, model, tokenizer):
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    folder = tmp_path / "hf"
    folder.mkdir()
    convert_gguf(tmp_path / "tiny.gguf", folder, dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for (name, ours), (_, theirs) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    torch.testing.assert_close(logits(loaded, tokenizer), logits(model, tokenizer), rtol=0, atol=0)


@pytest.mark.parametrize("quantization", ["Q4_1", "Q8_0"])
def test_quantized_weights_equal_those_that_transformers_reads(tmp_path, model, tokenizer, quantization):
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "tiny.gguf", model, tokenizer, quantization)
    folder = tmp_path / "hf"
    folder.mkdir()
    convert_gguf(tmp_path / "tiny.gguf", folder, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(ours, tokenizer), logits(theirs, tokenizer), rtol=1e-5, atol=1e-5)
    assert (logits(ours, tokenizer) - logits(model, tokenizer)).abs().max() > 0  # it was quantized


def test_weights_are_bfloat16_unless_asked_otherwise(tmp_path, model, tokenizer):
    from safetensors.torch import load_file

    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


def test_tokenizer_and_chat_template_come_back(tmp_path, model, tokenizer):
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\n\n In 2024, 12 cafés: déjà vu!\n\n\n<|im_end|>\n"
    assert loaded.encode(text, add_special_tokens=False) == tokenizer.encode(text).ids
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.chat_template == CHAT_TEMPLATE
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")


def test_files_are_as_readable_as_others(tmp_path, model, tokenizer):
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_another_architecture_is_refused(tmp_path, model, tokenizer):
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer, architecture="qwen2")
    with pytest.raises(ValueError, match="general.architecture 'qwen2', but only 'llama' is supported"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path)


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"<html>404</html>" * 10)
    with pytest.raises(ValueError, match="x.gguf is not a readable GGUF file"):
        convert_gguf(tmp_path / "x.gguf", tmp_path)


def test_a_file_cut_short_is_refused(tmp_path, model, tokenizer):
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    whole = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="short.gguf is not a readable GGUF file"):
        convert_gguf(tmp_path / "short.gguf", tmp_path)
