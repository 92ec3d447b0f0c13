"""Packaged configs on tiny models of their families, and data in the configs' columns."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
from tiny_families import FAMILIES


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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, local_data):
    """Function from the name of a family's tiny model to a folder with model and tokenizer."""
    root = tmp_path_factory.mktemp("tiny_families")
    texts = [line for file in local_data.values() for line in file.read_text().splitlines()]

    def folder_of(name: str) -> Path:
        folder = root / name.replace(" ", "_")
        if not folder.exists():
            FAMILIES[name].hf().save_pretrained(folder)
            FAMILIES[name].write_tokenizer(folder, texts)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def on_tiny_model(tiny_model, local_data):
    """Function that turns a packaged config into one that trains two steps on a tiny model of its family."""
    from omegaconf import OmegaConf

    from gmt_tune.integrations.torchtune.plugin.registry import config_paths

    def make(name: str, output_dir: Path, **changes):
        cfg = OmegaConf.load(config_paths()[name])
        family = _family_of(name)
        folder = tiny_model(family)
        cfg.model = FAMILIES[family].section()
        cfg.tokenizer.path = str(folder / Path(cfg.tokenizer.path).name)
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


def _family_of(name: str) -> str:
    """The tiny model of a config; Qwen's models of less than 5B have tied embeddings."""
    family, _, size = name.partition("/")
    is_small = f"{family} tied" in FAMILIES and float(size.partition("B")[0]) < 5
    return f"{family} tied" if is_small else family
