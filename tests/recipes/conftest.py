"""Runs recipes in this process: the same classes that ``tune run`` starts, without its start-up time."""

import importlib.util

import pytest


@pytest.fixture
def eager():
    """torchao's updates as plain torch: compiled, which slow tests have, each takes 20 s to begin with."""
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="session")
def gmt_recipe():
    """The class of our recipe, loaded from its file as ``tune run`` does."""
    from gmt_tune.integrations.torchtune.plugin.registry import recipe_path

    spec = importlib.util.spec_from_file_location("gmt_full_finetune_recipe", recipe_path("gmt_full_finetune"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GMTFullFinetuneRecipe


@pytest.fixture(scope="session")
def train_by():
    """Function that trains by a recipe's class. torchtune's are guarded where there is no accelerator."""
    import torch
    from omegaconf import OmegaConf
    from torchtune import training

    from gmt_tune.integrations.torchtune.process_group import no_memory_stats_on_cpu

    def train(recipe_class, config: dict):
        cfg = OmegaConf.create(config)
        # Where there is no accelerator, torchtune's distributed recipes stop at their memory reports
        with no_memory_stats_on_cpu(torch.device("cpu")), pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "cleanup_before_training", lambda: None)
            try:
                recipe = recipe_class(cfg)
                recipe.setup(cfg)
                recipe.train()
                recipe.cleanup()
            finally:
                if torch.distributed.is_initialized():
                    torch.distributed.destroy_process_group()
        return recipe

    return train


@pytest.fixture(scope="session")
def run_recipe(gmt_recipe, train_by):
    """Function that trains by a recipe's class: ours, or torchtune's "single_device" or "distributed"."""
    from gmt_tune.integrations.torchtune.process_group import ensure_rendezvous
    from gmt_tune.integrations.torchtune.run.base_recipes import load_base_recipe

    def run(config: dict, base: str | None = None):
        if base is None:
            return train_by(gmt_recipe, config)
        if base == "single_device":
            return train_by(load_base_recipe("full_finetune_single_device").FullFinetuneRecipeSingleDevice, config)
        ensure_rendezvous()
        return train_by(load_base_recipe("full_finetune_distributed").FullFinetuneRecipeDistributed, config)

    return run
