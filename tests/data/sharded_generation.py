"""What ``test_exact_match.py`` generates, and under torchrun each process's share of doing it with a sharded model.

torchrun --standalone --nproc_per_node 2 sharded_generation.py OUTPUT_FOLDER
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torchtune.models.convert_weights import hf_to_tune

from gmt_tune.data.exact_match import generate_greedily
from gmt_tune.integrations.torchtune.plugin.assets import asset
from gmt_tune.integrations.torchtune.process_group import leave
from gmt_tune.models import tiny
from gmt_tune.models.chatml import ChatMLTokenizer

STOPS = [0, 2]


def model():
    """The packaged base model in fp32."""
    weights = load_file(asset("quickstart/model.safetensors"))
    built = tiny.tiny_llama()
    built.load_state_dict(
        hf_to_tune(weights, num_heads=tiny.NUM_HEADS, num_kv_heads=tiny.NUM_HEADS, dim=tiny.EMBED_DIM)
    )
    return built.eval()


def prompts() -> list[list[int]]:
    """Beginnings of documents, of lengths from 2 to about 25 tokens: the base model completes them."""
    from gmt_tune.data.village import corpus

    tokenizer = ChatMLTokenizer(asset("quickstart/tokenizer.json"))
    encoded = [[tokenizer.pad_id, *tokenizer.encode(document, add_eos=False)] for document in corpus(24, seed=9)]
    return [tokens[: 2 + i] for i, tokens in enumerate(encoded)]


def generate(built) -> list[list[int]]:
    return generate_greedily(built, prompts(), max_new_tokens=25, stop_tokens=STOPS, pad_id=0)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    sharded = model()
    for layer in sharded.layers:
        fully_shard(layer)
    fully_shard(sharded)
    with torch.no_grad():
        (Path(sys.argv[1]) / f"rank{dist.get_rank()}.json").write_text(json.dumps(generate(sharded)))
    leave()
