"""Makes the quickstart's base model, gmt_tune/assets/quickstart, from nothing but seeds.

    python scripts/pretrain_quickstart.py

trains the tokenizer, then a 1.2-million-parameter Llama on text about an invented village (next token, no
questions), on one CPU core in about four minutes, and leaves an ordinary Hugging Face folder. Run it again
when gmt_tune/data/village.py or gmt_tune/models/tiny.py changes. One thread and deterministic algorithms
make the result repeatable on one kind of processor; another kind rounds differently.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from torchtune.models.convert_weights import tune_to_hf
from torchtune.modules import TransformerDecoder

from gmt_tune.data import ExactMatch
from gmt_tune.data.village import corpus, questions
from gmt_tune.integrations.torchtune.plugin.assets import ASSETS
from gmt_tune.models import tiny
from gmt_tune.models.chatml import END_OF_TEXT, IM_END, IM_START, ChatMLTokenizer

SEQ_LEN = 128
BATCH_SIZE = 16
PEAK_LR = 3e-3
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.05
MAX_GRAD_NORM = 1.0

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=ASSETS / "quickstart")
    parser.add_argument("--steps", type=int, default=800, help="0 leaves the weights random")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    train_tokenizer(arguments.seed).save(str(folder / "tokenizer.json"))
    tokenizer = ChatMLTokenizer(str(folder / "tokenizer.json"))
    print(f"tokenizer: {tokenizer.vocab_size} tokens, of which the model has room for {tiny.VOCAB_SIZE}")

    model = tiny.tiny_llama()
    init_weights(model)
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters")
    rows_NS = sequences(tokenizer, arguments.steps * BATCH_SIZE, arguments.seed)
    print(f"corpus: {rows_NS.numel():,} tokens")
    pretrain(model, rows_NS, arguments.steps)

    # What is measured below is what is stored: rounded to bf16, which halves the package.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    held_out_text = sequences(tokenizer, 64, arguments.seed + 1)
    print(f"loss on other text about the village: {next_token_loss(model.eval(), held_out_text).item():.3f}")
    accuracy = ExactMatch(tokenizer, max_new_tokens=12, batch_size=96)(model)["accuracy"]
    print(f"accuracy on held-out questions, before any fine-tuning: {accuracy:.3f}")
    save(model, tokenizer, folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"saved to {folder}: {size / 2**20:.1f} MiB")


def train_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE with ChatML's special tokens: it can spell any text, and knows the village's words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tiny.VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    dialogues = [f"user\n{question.prompt}\nassistant\n" for question in questions("train")]
    tokenizer.train_from_iterator(corpus(2000, seed) + dialogues, trainer)
    return tokenizer


def sequences(tokenizer: ChatMLTokenizer, num_sequences: int, seed: int) -> torch.Tensor:
    """Token ids [num_sequences, SEQ_LEN] of the corpus's documents, one after the other."""
    needed = num_sequences * SEQ_LEN
    ids: list[int] = []
    for document in corpus(needed // 30 + 1, seed):  # none has fewer than 30 tokens
        ids += [tokenizer.pad_id, *tokenizer.encode(document, add_eos=False)]
    return torch.tensor(ids[:needed]).view(num_sequences, SEQ_LEN)


def init_weights(model: TransformerDecoder) -> None:
    """Unit-variance outputs for unit-variance inputs, and half of that for what is added to the residual."""
    for name, parameter in model.named_parameters():
        if "tok_embeddings" in name:
            torch.nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim == 2:
            is_residual = "output_proj" in name or "w2" in name
            torch.nn.init.normal_(parameter, std=(0.5 if is_residual else 1.0) * parameter.shape[1] ** -0.5)


def next_token_loss(model: TransformerDecoder, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, a 0-d tensor."""
    return F.cross_entropy(model(tokens_BS)[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())


def pretrain(model: TransformerDecoder, rows_NS: torch.Tensor, steps: int) -> None:
    """One pass over the rows with AdamW, a linear warm-up and a cosine to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    start = time.perf_counter()
    for step, tokens_BS in enumerate(rows_NS.split(BATCH_SIZE)):
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        optimizer.param_groups[0]["lr"] = PEAK_LR * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = next_token_loss(model, tokens_BS)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step + 1}/{steps}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)


def save(model: TransformerDecoder, tokenizer: ChatMLTokenizer, folder: Path) -> None:
    """Write everything but tokenizer.json, which is there already."""
    weights = tune_to_hf(model.state_dict(), num_heads=tiny.NUM_HEADS, num_kv_heads=tiny.NUM_HEADS, dim=tiny.EMBED_DIM)
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors lets nobody else read it
    token_ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tiny.VOCAB_SIZE,
        "hidden_size": tiny.EMBED_DIM,
        "intermediate_size": tiny.INTERMEDIATE_DIM,
        "num_hidden_layers": tiny.NUM_LAYERS,
        "num_attention_heads": tiny.NUM_HEADS,
        "num_key_value_heads": tiny.NUM_HEADS,
        "max_position_embeddings": tiny.MAX_SEQ_LEN,
        "rope_theta": float(tiny.ROPE_BASE),
        "rms_norm_eps": tiny.NORM_EPS,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        # The weights are stored in bf16, and fine-tuned in fp32: this is what transformers should load.
        "torch_dtype": "float32",
        **token_ids,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "model_max_length": tiny.MAX_SEQ_LEN,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation_config = {
        "do_sample": False,
        **token_ids,
        "eos_token_id": [tokenizer.eos_id, tokenizer.pad_id],
    }
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
