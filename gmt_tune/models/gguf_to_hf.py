"""Turns a Llama-family GGUF file into an ordinary Hugging Face folder, with ``gguf`` and without ``transformers``.

GGUF keeps weights quantized, under names of its own, with the rows of the query and key projections in
another order, and the tokenizer as lists. Here each of these is undone. What is left to others: where the
file comes from.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

if TYPE_CHECKING:
    from gguf import GGUFReader

# GGUF's name -> Hugging Face's, for the tensors of one layer and for the others.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def convert_gguf(gguf_file: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """
    Write the model in ``gguf_file`` as a Hugging Face folder that ``transformers`` and torchtune load.

    Args:
        gguf_file (Path): a GGUF file of architecture ``llama`` whose tokenizer is of the kind ``smollm``
            (byte-level BPE in which every digit is a token).
        folder (Path): an existing folder; gets ``config.json``, ``generation_config.json``,
            ``model.safetensors``, ``tokenizer.json``, ``tokenizer_config.json`` (with the chat template) and
            ``special_tokens_map.json``.
        dtype (torch.dtype): of the weights; default bfloat16, in which SmolLM2 was published. Rounding to it
            is far finer than the four bits that a quantized file kept.

    Raises:
        ImportError: if ``gguf`` is not installed.
        ValueError: if the file is not GGUF, is damaged, or holds another kind of model or tokenizer.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf_file)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{gguf_file.name} is not a readable GGUF file: {error}") from error
    for key, supported in (("general.architecture", "llama"), ("tokenizer.ggml.pre", "smollm")):
        if _field(reader, key) != supported:
            raise ValueError(f"{gguf_file.name} has {key} {_field(reader, key)!r}, but only {supported!r} is supported")

    weights = _weights(reader, dtype)
    config = _model_config(reader, dtype, is_tied="lm_head.weight" not in weights)
    _write_json(folder / "config.json", config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # Newer safetensors write a file that only its owner may read.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    _write_json(
        folder / "generation_config.json",
        {"_from_model_config": True} | {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    _write_tokenizer(reader, folder)


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF file has no field {key}")
    return field.contents()


def _weights(reader: GGUFReader, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors by their Hugging Face names, dequantized, in Hugging Face's order of rows."""
    from gguf import dequantize

    num_heads = _field(reader, "llama.attention.head_count")
    num_kv_heads = _field(reader, "llama.attention.head_count_kv")
    weights = {}
    for tensor in reader.tensors:
        # The array covers the mapped file when the type needs no dequantization: copy before the file goes.
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name.endswith(".attn_q.weight"):
            weight = _undo_interleaving(weight, num_heads)
        elif tensor.name.endswith(".attn_k.weight"):
            weight = _undo_interleaving(weight, num_kv_heads)
        weights[_hf_name(tensor.name)] = weight.to(dtype)
    return weights


def _hf_name(gguf_name: str) -> str:
    if gguf_name in _OTHER_NAMES:
        return _OTHER_NAMES[gguf_name]
    match gguf_name.split("."):
        case ["blk", layer, kind, "weight"] if kind in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.weight"
    raise ValueError(f"the GGUF file has a tensor {gguf_name}, which a Llama model does not have")


def _undo_interleaving(weight_OI: torch.Tensor, num_heads: int) -> torch.Tensor:
    """
    Put a query or key projection's rows back in Hugging Face's order.

    Rotary embeddings turn pairs of a head's dimensions: GGUF stores the two of a pair next to each other,
    Hugging Face half a head apart.

    Args:
        weight_OI (torch.Tensor): shape [num_heads * head_dim, embed_dim].
        num_heads (int): number of query or key heads.

    Returns:
        torch.Tensor: same shape and dtype, contiguous.
    """
    out_dim, in_dim = weight_OI.shape
    return weight_OI.view(num_heads, out_dim // num_heads // 2, 2, in_dim).transpose(1, 2).reshape(out_dim, in_dim)


def _model_config(reader: GGUFReader, dtype: torch.dtype, is_tied: bool) -> dict[str, Any]:
    hidden_size, num_heads = _field(reader, "llama.embedding_length"), _field(reader, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": hidden_size**-0.5,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": num_heads,
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        # Stored as fp32: 1e-5 would come back as 9.999999747378752e-06.
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_scaling": None,
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        "tie_word_embeddings": is_tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "vocab_size": _field(reader, "llama.vocab_size"),
    }


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    control = [
        token
        for token, kind in zip(tokens, _field(reader, "tokenizer.ggml.token_type"), strict=True)
        if kind == _CONTROL_TOKEN
    ]
    tokenizer = Tokenizer(BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
    # What GGUF calls "smollm": each digit by itself, then the pattern and byte alphabet of GPT-2.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))

    special = {
        f"{name}_token": tokens[_field(reader, f"tokenizer.ggml.{gguf_name}_token_id")]
        for name, gguf_name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {
            # The class that takes tokenizer.json as it is; GPT2Tokenizer would not split digits.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": _field(reader, "llama.context_length"),
            "clean_up_tokenization_spaces": False,
            "chat_template": _field(reader, "tokenizer.chat_template"),
            **special,
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
