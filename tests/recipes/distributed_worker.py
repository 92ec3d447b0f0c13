"""One process of the runs that ``test_distributed.py`` starts under torchrun: several recipes, one after the other.

    torchrun --standalone --nproc_per_node N distributed_worker.py JOBS_FILE

The file is a JSON list of jobs: ``config``, and ``base`` for torchtune's own distributed recipe.
"""

import faulthandler
import importlib.util
import json
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torchtune import training

from gmt_tune.integrations.torchtune.base_recipes import load_base_recipe
from gmt_tune.integrations.torchtune.process_group import no_memory_stats_on_cpu
from gmt_tune.integrations.torchtune.registry import recipe_path

TIMEOUT = 400  # seconds


def load_ours():
    spec = importlib.util.spec_from_file_location("recipe_gmt_full_finetune", recipe_path("gmt_full_finetune"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GMTFullFinetuneRecipe


def main(jobs_file: str) -> None:
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)  # ranks that wait for each other say where
    jobs = json.loads(Path(jobs_file).read_text())
    base = load_base_recipe("full_finetune_distributed")
    ours = load_ours()
    # Where there is no accelerator, torchtune's distributed recipe stops at its memory reports
    training.cleanup_before_training = lambda: None
    # All jobs in one process group: a second one cannot meet at torchrun's store
    torch.distributed.init_process_group("gloo")
    base.init_process_group = base.destroy_process_group = lambda *args, **kwargs: None
    for job in jobs:
        cfg = OmegaConf.create(job["config"])
        with no_memory_stats_on_cpu(torch.device("cpu")):
            recipe = (base.FullFinetuneRecipeDistributed if job.get("base") else ours)(cfg)
            recipe.setup(cfg)
            recipe.train()
            recipe.cleanup()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
