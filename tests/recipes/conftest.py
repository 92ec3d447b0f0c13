"""Runs recipes in this process: the same classes that ``tune run`` starts, without its start-up time."""

import importlib.util

import pytest


@pytest.fixture(scope="session")
def gmt_recipe():
    """The class of our recipe, loaded from its file as ``tune run`` does."""
    from gmt_tune.integrations.torchtune.registry import recipe_path

    spec = importlib.util.spec_from_file_location("gmt_full_finetune_recipe", recipe_path("gmt_full_finetune"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GMTFullFinetuneRecipe


@pytest.fixture(scope="session")
def run_recipe(gmt_recipe):
    """Function that trains by a recipe's class: ours, or torchtune's "single_device" or "distributed"."""
    import torch
    from omegaconf import OmegaConf
    from torchtune import training

    from gmt_tune.integrations.torchtune.base_recipes import load_base_recipe
    from gmt_tune.integrations.torchtune.process_group import ensure_rendezvous, no_memory_stats_on_cpu

    def run(config: dict, base: str | None = None):
        cfg = OmegaConf.create(config)
        if base is None:
            recipe_class = gmt_recipe
        elif base == "single_device":
            recipe_class = load_base_recipe("full_finetune_single_device").FullFinetuneRecipeSingleDevice
        else:
            recipe_class = load_base_recipe("full_finetune_distributed").FullFinetuneRecipeDistributed
            ensure_rendezvous()
        # Where there is no accelerator, torchtune's distributed recipe stops at its memory reports
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

    return run
