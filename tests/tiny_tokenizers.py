"""Tiny tokenizers that split, normalize and decode text as those of the model families' releases do."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "user\n\nWhat is 12 plus 30?\n\n",
    "assistant\n  12 plus 30 is 42.\n\nThat is the answer.\n#### 42",
    "system\nYou are a helpful assistant. Déjà vu, naïve café.\n\n\n",
    "<think>\nAdd them.\n</think>\n\n",
] * 4
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(digits: str, special_tokens: list[AddedToken], others: list[str], normalizer=None) -> Tokenizer:
    """A BPE of bytes, as Qwen's and Phi-4's; so many ``digits`` make a word. ``others`` are added, but not special."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT % digits), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(special_tokens)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in others])
    return tokenizer


def _byte_fallback(special_tokens: list[str], **pipeline) -> Tokenizer:
    """A BPE of characters that spells those it does not know in bytes, as Gemma's and Mistral's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    for name, part in pipeline.items():
        setattr(tokenizer, name, part)
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special_tokens + BYTES, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(saved))


def _special(*tokens: str, **kwargs) -> list[AddedToken]:
    return [AddedToken(token, normalized=False, special=True, **kwargs) for token in tokens]


def tiny_qwen2_5() -> Tokenizer:
    return _byte_level("", _special("<|endoftext|>", "<|im_start|>", "<|im_end|>"), [], normalizers.NFC())


def tiny_qwen3() -> Tokenizer:
    marks = ["<tool_response>", "</tool_response>", "<think>", "</think>"]
    return _byte_level("", _special("<|endoftext|>", "<|im_start|>", "<|im_end|>"), marks, normalizers.NFC())


def tiny_phi4() -> Tokenizer:
    tokens = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|dummy_85|>")
    return _byte_level("{1,3}", _special(*tokens, lstrip=True, rstrip=True), [])


def tiny_gemma2() -> Tokenizer:
    return _byte_fallback(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
        normalizer=normalizers.Replace(" ", "▁"),
        pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous"),
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    )


def tiny_mistral() -> Tokenizer:
    return _byte_fallback(
        ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"],
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
        decoder=decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )


TINY = {
    "qwen2_5": tiny_qwen2_5,
    "qwen3": tiny_qwen3,
    "gemma2": tiny_gemma2,
    "phi4": tiny_phi4,
    "mistral": tiny_mistral,
}
