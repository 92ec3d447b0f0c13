"""What many tests share: a tiny Llama with its tokenizer and data on disk, and real ``tune`` commands."""

import json
import os
import random
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from reporting import chromium

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

TUNE = Path(sys.executable).parent / "tune"


def _can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode == 0
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)
    return mounted


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _has_cuda_build() -> bool:
    import torch

    return torch.version.cuda is not None


# By mark: whether what the test needs is there, and what to do where it is not.
NEEDS = {
    "needs_chromium": (
        lambda: chromium.EXECUTABLE is not None,
        "no Chromium is installed: apt-get install -y --no-install-recommends chromium",
    ),
    "fake_cuda": (_has_cuda_build, "this is no build of PyTorch for CUDA: tests/fake_cuda/requirements.txt"),
    "needs_gpu": (_has_gpu, "PyTorch sees no CUDA device"),
    "needs_mount": (_can_mount, "no tmpfs can be mounted here: run as root"),
    "needs_releases": (
        lambda: "GMT_TUNE_RELEASES" in os.environ,
        "GMT_TUNE_RELEASES names no folder of downloaded releases: see tests/models/test_tokenizers.py",
    ),
}


# Files that take a minute or about that by themselves. They come first, so that no worker is left with one at the end:
# files are given to workers in this order (`--dist loadfile --no-loadscope-reorder`).
LONG = (
    "recipes/test_interruptions.py",
    "recipes/test_quickstart.py",
    "docs/test_pages.py",
    "recipes/test_resume.py",
    "recipes/test_distributed.py",
    "recipes/test_parity.py",
    "configs/test_configs.py",
    "recipes/test_gmt_full_dpo.py",
    "recipes/test_gmt_full_finetune.py",
    "masking/test_sharded.py",
    "masking/test_triton.py",
    "masking/test_selection.py",
    "optim/test_kernels.py",
    "integrations/torchtune/test_versions.py",
    "integrations/torchtune/test_tune_cli.py",
)


def pytest_collection_modifyitems(items) -> None:
    rank = {Path(__file__).parent / file: number for number, file in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path, len(LONG)))
    for item in items:
        if item.get_closest_marker("slow") is not None:
            item.add_marker(pytest.mark.timeout(0))  # however long it takes


def pytest_runtest_setup(item) -> None:
    for mark, (is_there, remedy) in NEEDS.items():
        if item.get_closest_marker(mark) is not None and not is_there():
            pytest.skip(f"{mark}: {remedy}")


def _write_tokenizer(folder: Path, texts: list[str]) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> Path:
    """A folder with ``model/`` (Hugging Face format, torchtune's LLAMA3_2) and ``train.jsonl``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("tiny_world")
    rng = random.Random(0)
    rows = []
    for _ in range(64):
        a, b = rng.randint(0, 50), rng.randint(0, 50)
        rows.append({"question": f"What is {a} plus {b}?", "answer": f"{a} plus {b} is {a + b}. #### {a + b}"})
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    model_dir = root / "model"
    model_dir.mkdir()
    vocab_size = _write_tokenizer(model_dir, [text for row in rows for text in row.values()])
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            rope_theta=10000.0,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=2,
        )
    ).save_pretrained(model_dir)
    return root


@pytest.fixture(scope="session")
def tiny_config(tiny_world):
    """Function that gives the config of a run on the tiny world as a dict; keywords replace top-level keys."""
    vocab_size = json.loads((tiny_world / "model" / "config.json").read_text())["vocab_size"]

    def make(output_dir: Path, **changes) -> dict:
        config = {
            "output_dir": str(output_dir),
            "model": {
                "_component_": "torchtune.models.llama3_2.llama3_2",
                "vocab_size": vocab_size,
                "num_layers": 2,
                "num_heads": 4,
                "num_kv_heads": 2,
                "embed_dim": 64,
                "intermediate_dim": 128,
                "max_seq_len": 256,
                "rope_base": 10000,
                "norm_eps": 1e-5,
                "scale_factor": 1,
            },
            "tokenizer": {
                "_component_": "gmt_tune.models.chatml.ChatMLTokenizer",
                "path": str(tiny_world / "model" / "tokenizer.json"),
                "max_seq_len": 128,
            },
            "checkpointer": {
                "_component_": "torchtune.training.FullModelHFCheckpointer",
                "checkpoint_dir": str(tiny_world / "model"),
                "checkpoint_files": ["model.safetensors"],
                "recipe_checkpoint": None,
                "output_dir": str(output_dir),
                "model_type": "LLAMA3_2",
            },
            "resume_from_checkpoint": False,
            "dataset": {
                "_component_": "torchtune.datasets.instruct_dataset",
                "source": "json",
                "data_files": str(tiny_world / "train.jsonl"),
                "split": "train",
                "column_map": {"input": "question", "output": "answer"},
                "packed": False,
            },
            "seed": 5,
            "shuffle": True,
            "batch_size": 4,
            "epochs": 1,
            "max_steps_per_epoch": 4,
            "gradient_accumulation_steps": 1,
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
            "optimizer_in_bwd": False,
            "lr_scheduler": {
                "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
                "num_warmup_steps": 2,
            },
            "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
            "clip_grad_norm": None,
            "compile": False,
            "device": "cpu",
            "dtype": "fp32",
            "enable_activation_checkpointing": False,
            "enable_activation_offloading": False,
            "metric_logger": {
                "_component_": "torchtune.training.metric_logging.DiskLogger",
                "log_dir": str(output_dir / "logs"),
                "filename": "log.txt",
            },
            "log_every_n_steps": 1,
            "log_peak_memory_stats": False,
        }
        config.update(changes)
        return config

    return make


@pytest.fixture(scope="session")
def run_tune():
    """Function that runs the real ``tune`` command; returns the finished process with its output as text."""

    def run(*arguments, cwd, timeout=300, check=True, **environment) -> subprocess.CompletedProcess:
        process = subprocess.run(
            [str(TUNE), *map(str, arguments)],
            cwd=cwd,
            timeout=timeout,
            capture_output=True,
            text=True,
            env={**os.environ, "HF_DATASETS_OFFLINE": "1", **environment},
        )
        if check and process.returncode != 0:
            output = textwrap.indent(process.stdout[-3000:] + process.stderr[-5000:], "    ")
            pytest.fail(f"tune {' '.join(map(str, arguments))} ended with {process.returncode}:\n{output}")
        return process

    return run


@pytest.fixture(scope="session")
def logged_metrics():
    """Function that reads what torchtune's DiskLogger wrote: a dict of numbers for each logged step."""

    def read(output_dir: Path) -> list[dict[str, float]]:
        steps = []
        for line in (Path(output_dir) / "logs" / "log.txt").read_text().splitlines():
            fields = line.partition(" | ")[2].split()
            steps.append({name: float(value) for name, _, value in (f.rpartition(":") for f in fields)})
        assert steps, f"nothing was logged in {output_dir}"  # loops over it would pass
        return steps

    return read


@pytest.fixture(scope="session")
def final_weights():
    """Function that reads the weights of an output folder's checkpoint of one epoch."""
    from safetensors.torch import load_file

    def read(output_dir: Path, epoch: int = 0) -> dict:
        folder = Path(output_dir) / f"epoch_{epoch}"
        weights = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights.update(load_file(file))
        assert weights, f"no weights in {folder}"  # loops over them would pass
        return weights

    return read
