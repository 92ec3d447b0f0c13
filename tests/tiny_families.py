"""A tiny random model of each family that the configs train, as transformers writes it, and the builder that reads it.

Norm scales and biases are random too: with ones and zeros, exchanged norms would go unseen. Weights are so large that
soft-capping and attention matter.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tiny_tokenizers import TINY
from torch import Tensor, nn
from torchtune import training
from torchtune.config._utils import _get_component_from_path

from gmt_tune.models import FullModelHFCheckpointer

VOCABULARY = 512
LENGTH = 24
# One shape for all, so that the low-bit optimizers meet few different tensors.
SHAPE = {"num_layers": 2, "num_heads": 4, "embed_dim": 16, "intermediate_dim": 16, "max_seq_len": 4096}
CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "phi3": "Phi3",
}


@dataclass(frozen=True)
class Family:
    """What a config of the family names, and what sets its models apart by the names of either side.

    Attributes:
        builder: path of the component builder.
        model_type: of the checkpointer: torchtune's or ours, by that.
        kind: "model_type" of config.json.
        values: of config.json, besides the shape.
        arguments: of the builder, besides the shape.
        write_tokenizer: puts the family's kind of tokenizer into a folder; texts to learn it from.
    """

    builder: str
    model_type: str
    kind: str
    values: Mapping[str, Any]
    write_tokenizer: Callable[[Path, list[str]], None]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    num_kv_heads: int = 2

    def hf(self, seed: int = 0, **changes: Any) -> nn.Module:
        """A random model of transformers, with attention in plain operations."""
        import transformers

        name = self.kind.capitalize()
        values: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": SHAPE["embed_dim"],
            "intermediate_size": SHAPE["intermediate_dim"],
            "num_hidden_layers": SHAPE["num_layers"],
            "num_attention_heads": SHAPE["num_heads"],
            "num_key_value_heads": self.num_kv_heads,
            "max_position_embeddings": SHAPE["max_seq_len"],
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        }
        config = getattr(transformers, f"{name}Config")(**values | self.values | changes, attn_implementation="eager")
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "norm" in name:
                    p.copy_((self.kind != "gemma2") + 0.4 * torch.randn_like(p))
                else:
                    p.copy_(torch.randn_like(p) * (0.5 if p.dim() == 1 else 1.5 * p.shape[1] ** -0.5))
        return model

    def section(self, **changes: Any) -> dict[str, Any]:
        """A config's section ``model``, of the same sizes."""
        sizes = {"vocab_size": VOCABULARY, "num_kv_heads": self.num_kv_heads}
        return {"_component_": self.builder, **sizes, **SHAPE, **self.arguments, **changes}

    def build(self, **changes: Any) -> nn.Module:
        """Our model of the same sizes, with random weights."""
        section = self.section(max_seq_len=64) | changes
        return _get_component_from_path(section.pop("_component_"))(**section).eval()

    @property
    def checkpointer(self) -> type:
        is_ours = "." in self.model_type
        return FullModelHFCheckpointer if is_ours else training.FullModelHFCheckpointer

    def reader(self, folder: Path, output_dir: Path) -> Any:
        """The checkpointer of the family's configs, of all files with weights in a folder."""
        files = sorted(file.name for file in folder.glob("*.safetensors"))
        return self.checkpointer(str(folder), files, self.model_type, str(output_dir))

    def load(self, folder: Path, output_dir: Path, **changes: Any) -> nn.Module:
        """Our model with the weights of a folder."""
        model = self.build(**changes)
        model.load_state_dict(self.reader(folder, output_dir).load_checkpoint()["model"])
        return model


def _tiktoken(folder: Path, texts: list[str]) -> None:
    """A byte-level vocabulary in tiktoken's format (base64 of the bytes, and their rank), and Llama 3's special tokens
    right behind it instead of from 128,000 on."""
    from torchtune.models.llama3._tokenizer import LLAMA3_SPECIAL_TOKENS

    lines = [f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256)]
    (folder / "tokenizer.model").write_text("".join(lines))
    special = [{"content": token, "id": 256 + i} for i, token in enumerate(LLAMA3_SPECIAL_TOKENS)]
    (folder / "special_tokens.json").write_text(json.dumps({"added_tokens": special}))


def _sentencepiece(folder: Path, texts: list[str]) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )


def _hugging_face(name: str) -> Callable[[Path, list[str]], None]:
    return lambda folder, texts: TINY[name]().save(str(folder / "tokenizer.json"))


def _llama(version: str, rope_theta: float, factor: float | None = None, **more: Any) -> Family:
    scaling = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"factor": factor, "original_max_position_embeddings": 8192}
    values = {"rope_theta": rope_theta, "rope_scaling": scaling if factor else None, "rms_norm_eps": 1e-5}
    values["tie_word_embeddings"] = version == "llama3_2"
    model_type = {"llama2": "LLAMA2", "llama3_2": "LLAMA3_2"}.get(version, "LLAMA3")
    builder = f"torchtune.models.{version}.{version}"
    return Family(builder, model_type, "llama", values, _sentencepiece if version == "llama2" else _tiktoken, **more)


def _tied(family: Family) -> Family:
    tied = {"tie_word_embeddings": True}
    return replace(family, values=family.values | tied, arguments={**family.arguments, **tied})


# By the folder of its configs; rotary base and scaling, and the norms' epsilon, are those of its releases.
FAMILIES = {
    "llama2": _llama("llama2", 1e4, num_kv_heads=SHAPE["num_heads"]),
    "llama3": _llama("llama3", 5e5),
    "llama3_1": _llama("llama3_1", 5e5, 8.0),
    "llama3_2": _llama("llama3_2", 5e5, 32.0),
    "mistral": Family(
        "torchtune.models.mistral.mistral",
        "MISTRAL",
        "mistral",
        {"rope_theta": 1e4, "rms_norm_eps": 1e-5},
        _sentencepiece,
    ),
    "mistral_v0_3": Family(
        "torchtune.models.mistral.mistral",
        "MISTRAL",
        "mistral",
        {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": None},
        _hugging_face("mistral"),
        {"rope_base": 1_000_000},
    ),
    "qwen2_5": Family(
        "torchtune.models.qwen2.qwen2",
        "QWEN2",
        "qwen2",
        {"rope_theta": 1e6, "rms_norm_eps": 1e-6},
        _hugging_face("qwen2_5"),
        {"norm_eps": 1e-6},
    ),
    "qwen3": Family(
        "gmt_tune.models.qwen3.qwen3",
        "gmt_tune.models.qwen3",
        "qwen3",
        {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "head_dim": 8},
        _hugging_face("qwen3"),
        {"head_dim": 8},
    ),
    "gemma2": Family(
        "gmt_tune.models.gemma2.gemma2",
        "gmt_tune.models.gemma2",
        "gemma2",
        {
            "rope_theta": 1e4,
            "rms_norm_eps": 1e-6,
            "head_dim": 8,
            "query_pre_attn_scalar": 20,
            "sliding_window": 5,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 7.0,
            "tie_word_embeddings": True,
        },
        _hugging_face("gemma2"),
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 20,
            "sliding_window_size": 5,
            "hidden_capping_value": 3.0,
            "final_capping_value": 7.0,
        },
    ),
    "phi4": Family(
        "torchtune.models.phi3.phi3",
        "PHI4",
        "phi3",
        {"rope_theta": 250_000.0, "rms_norm_eps": 1e-5, "sliding_window": None},
        _hugging_face("phi4"),
        {"norm_eps": 1e-5, "rope_base": 250_000},
    ),
}
FAMILIES["llama3_3"] = FAMILIES["llama3_1"]
FAMILIES |= {f"{name} tied": _tied(FAMILIES[name]) for name in ("qwen2_5", "qwen3")}


def some_tokens(rows: int = 2, length: int = LENGTH) -> Tensor:
    """Token ids [rows, length] without padding."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
