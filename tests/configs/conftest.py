"""Tiny Llama 2, Llama 3 and Mistral models with tokenizers of their own kinds, and data in the configs' columns."""

import base64
import importlib.util
import json
import random
from pathlib import Path

import pytest

# One shape for all, so that the low-bit optimizers meet few different tensors.
SHAPE = {"num_layers": 2, "num_heads": 4, "embed_dim": 16, "max_seq_len": 4096}
KV_HEADS = 2
VOCAB = 512  # for Llama 3: 256 bytes, and as many special tokens


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: a second thread would only wait for the first, long on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def local_data(tmp_path_factory) -> dict[str, Path]:
    """Dataset name, as the configs name it, to a local file with that dataset's columns."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    rows = {"alpaca": [], "ise-uiuc/Magicoder-Evol-Instruct-110K": [], "meta-math/MetaMathQA": []}
    rows |= {"allenai/tulu-v2-sft-mixture": [], "HuggingFaceH4/ultrafeedback_binarized": []}
    for _ in range(96):
        a, b = rng.randint(0, 99), rng.randint(0, 99)
        question, answer = f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."
        rows["alpaca"].append({"instruction": question, "input": rng.choice(["", "Think."]), "output": answer})
        rows["ise-uiuc/Magicoder-Evol-Instruct-110K"].append({"instruction": question, "response": answer})
        rows["meta-math/MetaMathQA"].append({"type": "GSM", "query": question, "response": answer})
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if rng.random() < 0.3:
            messages.insert(0, {"role": "system", "content": "Be exact."})
        rows["allenai/tulu-v2-sft-mixture"].append({"dataset": "sums", "id": str(a), "messages": messages})
        chosen, rejected = ([*messages[-2:-1], {"role": "assistant", "content": c}] for c in (answer, "I do not know."))
        pair = {"prompt": question, "chosen": chosen, "rejected": rejected, "score_chosen": 8.5, "score_rejected": 1.0}
        rows["HuggingFaceH4/ultrafeedback_binarized"].append(pair)
    files = {}
    for name, lines in rows.items():
        files[name] = folder / f"{name.replace('/', '_')}.jsonl"
        files[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


def _rope(family: str) -> dict:
    """Rotary base and scaling of the family's releases, as its builder has them."""
    if not family.startswith("llama3"):
        return {"rope_theta": 10000.0}
    scaling = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"factor": 32.0 if family == "llama3_2" else 8.0, "original_max_position_embeddings": 8192}
    return {"rope_theta": 500000.0, "rope_scaling": None if family == "llama3" else scaling}


@pytest.fixture(scope="session")
def tiny_families(tmp_path_factory, local_data) -> dict[str, Path]:
    """Builder module of a family, such as ``torchtune.models.llama2``, to a folder with its model and tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    root = tmp_path_factory.mktemp("tiny_families")
    texts = [line for file in local_data.values() for line in file.read_text().splitlines()]
    folders = {}
    for family in ("llama2", "llama3", "llama3_1", "llama3_2", "llama3_3", "mistral"):
        folder = root / family
        folder.mkdir()
        if family.startswith("llama3"):
            _write_tiktoken(folder)
        else:
            _write_sentencepiece(folder / "tokenizer.model", texts)
        config, model = (LlamaConfig, LlamaForCausalLM)
        if family == "mistral":
            config, model = (MistralConfig, MistralForCausalLM)
        model(
            config(
                vocab_size=VOCAB,
                hidden_size=SHAPE["embed_dim"],
                intermediate_size=SHAPE["embed_dim"],
                num_hidden_layers=SHAPE["num_layers"],
                num_attention_heads=SHAPE["num_heads"],
                num_key_value_heads=_kv_heads(family),
                tie_word_embeddings=family == "llama3_2",
                rms_norm_eps=1e-5,
                **_rope(family),
            )
        ).save_pretrained(folder)
        folders[f"torchtune.models.{family}"] = folder
    return folders


@pytest.fixture(scope="session")
def on_tiny_model(tiny_families, local_data):
    """Function that turns a packaged config into one that trains two steps on a tiny model of its family."""
    from omegaconf import OmegaConf

    from gmt_tune.integrations.torchtune.plugin.registry import config_paths

    def make(name: str, output_dir: Path, **changes):
        cfg = OmegaConf.load(config_paths()[name])
        package = str(cfg.model._component_).rpartition(".")[0]  # torchtune.models.llama3_1
        family = package.rpartition(".")[2]
        folder = tiny_families[package]
        builder = "torchtune.models.llama3_1.llama3_1" if family == "llama3_3" else f"{package}.{family}"
        cfg.model = {
            "_component_": builder,
            "vocab_size": VOCAB,
            "intermediate_dim": SHAPE["embed_dim"],
            "num_kv_heads": _kv_heads(family),
            **SHAPE,
        }
        cfg.tokenizer.path = str(folder / "tokenizer.model")
        if family.startswith("llama3"):
            cfg.tokenizer.special_tokens_path = str(folder / "special_tokens.json")
        cfg.tokenizer.max_seq_len = 128  # of single bytes, mostly
        for section in ("dataset", "dataset_val"):
            if cfg.get(section) is not None:
                source = cfg[section].get("source", "alpaca")
                cfg[section].source = "json"
                cfg[section].data_files = str(local_data[source])
                if "split" in cfg[section]:
                    cfg[section].split = "train"  # the only one of a local file
        for section in ("checkpointer", "ref_checkpointer"):
            if section in cfg:
                cfg[section].checkpoint_dir = str(folder)
                cfg[section].checkpoint_files = ["model.safetensors"]
        cfg.output_dir = str(output_dir)
        cfg.device = "cpu"
        cfg.enable_activation_offloading = False  # needs CUDA
        cfg.max_steps_per_epoch = 2
        cfg.epochs = 1
        cfg.lr_scheduler.num_warmup_steps = 1
        cfg.metric_logger.filename = "log.txt"
        cfg.gradient_accumulation_steps = min(2, cfg.gradient_accumulation_steps)
        # Of two steps, so that with CompactAdamW all tensors have their turn
        cfg.gradient_mask.refresh_every = min(2, cfg.gradient_mask.refresh_every)
        for key, value in changes.items():
            cfg[key] = value
        return cfg

    return make


@pytest.fixture(scope="session")
def recipe_classes() -> dict[str, type]:
    """The classes of our recipes by their names, loaded from their files as ``tune run`` does."""
    from gmt_tune.integrations.torchtune.plugin.registry import recipe_path

    classes = {}
    for name, class_name in (("gmt_full_finetune", "GMTFullFinetuneRecipe"), ("gmt_full_dpo", "GMTFullDPORecipe")):
        spec = importlib.util.spec_from_file_location(f"{name}_recipe", recipe_path(name))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        classes[name] = getattr(module, class_name)
    return classes


@pytest.fixture(scope="session")
def make_configs():
    """The module scripts/make_configs.py."""
    scripts = Path(__file__).resolve().parents[2] / "scripts"
    spec = importlib.util.spec_from_file_location("make_configs", scripts / "make_configs.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(scripts))
        spec.loader.exec_module(module)
    return module


def _kv_heads(family: str) -> int:
    return SHAPE["num_heads"] if family == "llama2" else KV_HEADS


def _write_tiktoken(folder: Path) -> None:
    """A byte-level vocabulary in tiktoken's format (base64 of the bytes, and their rank), and Llama 3's special tokens
    right behind it instead of from 128,000 on."""
    from torchtune.models.llama3._tokenizer import LLAMA3_SPECIAL_TOKENS

    lines = [f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256)]
    (folder / "tokenizer.model").write_text("".join(lines))
    special = [{"content": token, "id": 256 + i} for i, token in enumerate(LLAMA3_SPECIAL_TOKENS)]
    (folder / "special_tokens.json").write_text(json.dumps({"added_tokens": special}))


def _write_sentencepiece(path: Path, texts: list[str]) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(path.with_suffix("")),
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
