"""The config check meets the configs that torchtune ships: it takes them, or says why not in one sentence."""

from pathlib import Path

import pytest
import torchtune
from omegaconf import OmegaConf
from torchtune import _recipe_registry

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.config.check import check_config, check_keys
from gmt_tune.integrations.torchtune.run.preference import OWN_KEYS

FOLDER = Path(torchtune.__file__).parents[1] / "recipes" / "configs"
CONFIGS = {
    config.name: (recipe.name, FOLDER / config.file_path)
    for recipe in _recipe_registry._ALL_RECIPES
    for config in recipe.configs
    if not recipe.name.startswith("gmt_") and (FOLDER / config.file_path).is_file()
}
FULL = [name for name, (recipe, _) in CONFIGS.items() if recipe.startswith("full_finetune")]
DPO = [name for name, (recipe, _) in CONFIGS.items() if recipe == "full_dpo_distributed"]
# One of each other recipe, and what the sentence says of it
OTHERS = {
    "lora_finetune_single_device": "has LoRA adapters, and this recipe trains and saves all weights: take the model",
    "lora_dpo_distributed": "has LoRA adapters",
    "qat_distributed": "quantizer is no key of this recipe: the config is for a recipe of torchtune's for quantization",
    "knowledge_distillation_distributed": "teacher_model is no key of this recipe: .* for knowledge distillation; run",
    "ppo_full_finetune_single_device": "policy_model is no key of this recipe: .* for PPO; run it with that one",
    "generate": "dataset is missing in the config",
}
# A folder that is not there is the last thing that is looked for
GOOD = "checkpointer.checkpoint_dir .* does not exist: download the model first"
LACKING = "needs the package (bitsandbytes: pip install bitsandbytes, or take torchao.optim|torchvision: pip install)"


def load(name: str):
    return OmegaConf.load(CONFIGS[name][1])


@pytest.mark.parametrize("name", FULL)
def test_a_config_for_full_fine_tuning_is_taken(name):
    """But for a package that only some name; the model is built without memory for one of each family."""
    cfg = load(name)
    try:
        check_keys(cfg)
    except UserError as error:
        with pytest.raises(UserError, match=LACKING):
            raise error


@pytest.mark.parametrize("name", ["qwen2_5/0.5B_full", "llama3_2/1B_full", "gemma2/2B_full", "llama3_3/70B_full"])
def test_its_model_is_built_and_its_files_are_looked_for(name):
    with pytest.raises(UserError, match=GOOD):
        check_config(load(name))


@pytest.mark.parametrize("name", DPO)
def test_a_config_for_dpo_is_one_of_gmt_full_dpo(name):
    with pytest.raises(UserError, match="tune run gmt_full_dpo is the one for this config"):
        check_config(load(name))
    with pytest.raises(UserError, match=GOOD):
        check_config(load(name), OWN_KEYS)


@pytest.mark.parametrize("recipe", OTHERS)
def test_a_config_of_another_recipe_is_refused_in_a_sentence(recipe):
    name = next(name for name, (of, _) in CONFIGS.items() if of == recipe)
    with pytest.raises(UserError, match=OTHERS[recipe]):
        check_config(load(name), OWN_KEYS if "dpo" in recipe else ())
