"""Real runs for the reporting tests, short: the quickstart, and a model of SmolLM2's depth and names."""

import fcntl
import importlib.util
import os
import shutil
from pathlib import Path

import pytest

FREQUENT = {"max_steps_per_epoch": 6, "run_val_every_n_steps": 3, "track_selection_every_n_steps": 1}


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Function that gives a folder of that name, which the first of pytest's workers to ask for it fills."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers
    root = root / "reported"

    def give(name: str, fill) -> Path:
        root.mkdir(exist_ok=True)
        folder, done = root / name, root / f"{name} is whole"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                fill(folder)
                done.touch()
        return folder

    return give


@pytest.fixture(scope="session")
def quickstart_run(made_once, run_tune) -> Path:
    """Output folder of ``tune run gmt_full_finetune --config quickstart``, cut to six steps. ``stdout.txt`` in it."""
    return made_once("quickstart", lambda folder: _run_quickstart(run_tune, folder))


def _run_quickstart(run_tune, folder: Path) -> None:
    process = run_tune(
        "run",
        "gmt_full_finetune",
        "--config",
        "quickstart",
        f"output_dir={folder}",
        "optimizer._component_=torch.optim.AdamW",
        "epochs=1",
        "dataset_val._component_=gmt_tune.data.quickstart_dataset",
        "dataset_val.split=held_out",
        "dataset_val.size=32",
        "evaluation.size=4",
        "evaluation.max_new_tokens=2",
        *(f"{key}={value}" for key, value in FREQUENT.items()),
        cwd=folder.parent,
        timeout=600,
        OMP_NUM_THREADS="1",
    )
    (folder / "stdout.txt").write_text(process.stdout + process.stderr)


@pytest.fixture(scope="session")
def train(tiny_config):
    """Function that trains by the recipe's class in this process; keywords are keys of the tiny config."""
    import torch
    from omegaconf import OmegaConf

    from gmt_tune.integrations.torchtune.plugin.registry import recipe_path

    spec = importlib.util.spec_from_file_location("recipe_of_reports", recipe_path("gmt_full_finetune"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(folder: Path, **changes) -> Path:
        cfg = OmegaConf.create(tiny_config(folder, **changes))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            recipe = module.GMTFullFinetuneRecipe(cfg)
            recipe.setup(cfg)
            recipe.train()
            recipe.cleanup()
        finally:
            torch.set_num_threads(threads)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        return folder

    return run


@pytest.fixture(scope="session")
def smollm2_shaped(tiny_world, tmp_path_factory) -> Path:
    """A Hugging Face folder with SmolLM2-135M's 30 layers and tensor names, each layer tiny."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("smollm2") / "base"
    shutil.copytree(tiny_world / "model", folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(folder)
    config.update(
        {
            "num_hidden_layers": 30,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "rope_theta": 100000.0,
        }
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_run(made_once, train, tiny_config, smollm2_shaped) -> Path:
    """Output folder of a run over :func:`smollm2_shaped`: SGD, one selection of density 0.2, frozen embeddings."""
    return made_once("smollm2", lambda folder: _train_smollm2(train, tiny_config, smollm2_shaped, folder))


def _train_smollm2(train, tiny_config, smollm2_shaped: Path, folder: Path) -> None:
    given = tiny_config(folder)
    model = given["model"] | {"num_layers": 30, "num_heads": 3, "num_kv_heads": 1, "embed_dim": 48}
    train(
        folder,
        model=model | {"intermediate_dim": 64, "rope_base": 100000},
        checkpointer=given["checkpointer"] | {"checkpoint_dir": str(smollm2_shaped)},
        optimizer={"_component_": "torch.optim.SGD", "lr": 1.0},
        lr_scheduler=None,
        clip_grad_norm=1.0,
        dataset_val=given["dataset"],
        gradient_mask={
            "_component_": "gmt_tune.GradientMask",
            "density": 0.2,
            "refresh_every": None,
            "dense": ["*norm*", "*.scale"],
            "frozen": ["tok_embeddings*"],
        },
        **FREQUENT,
    )
