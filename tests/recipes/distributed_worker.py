"""One process of the runs that ``test_distributed.py`` starts under torchrun: recipes, one after the other.

    torchrun --standalone --nproc_per_node N distributed_worker.py JOBS_FILE

The file is a JSON list of jobs. ``ranks`` are the processes that form the world of a job; the others go on to
their next job meanwhile. So one start, which takes longer than such a run, serves several numbers of processes.
``config`` is the recipe's; ``base`` stands for torchtune's own distributed recipe; ``resume`` is a checkpoint
folder to go on from.
"""

import faulthandler
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torchtune import training

from gmt_tune.integrations.torchtune.plugin.registry import recipe_path
from gmt_tune.integrations.torchtune.process_group import no_memory_stats_on_cpu
from gmt_tune.integrations.torchtune.run.base_recipes import load_base_recipe

TIMEOUT = 240  # seconds


def load_ours():
    spec = importlib.util.spec_from_file_location("recipe_gmt_full_finetune", recipe_path("gmt_full_finetune"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GMTFullFinetuneRecipe


def main(jobs_file: str) -> None:
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)  # ranks that wait for each other say where
    me = int(os.environ["RANK"])
    base = load_base_recipe("full_finetune_distributed")
    ours = load_ours()
    # Where there is no accelerator, torchtune's distributed recipe stops at its memory reports
    training.cleanup_before_training = lambda: None
    base.init_process_group = lambda backend: None  # the job's world is there already
    torch.compiler.set_stance("force_eager")  # torchao's updates compile for 20 s a shape
    for i, job in enumerate(json.loads(Path(jobs_file).read_text())):
        if me not in job["ranks"]:
            continue
        world_size, rank = len(job["ranks"]), job["ranks"].index(me)
        # The processes of a job meet at a file of its own: torchrun's store knows only the world of all
        store = dist.FileStore(f"{jobs_file}.{i}", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        if "resume" in job and rank == 0:
            while not Path(job["resume"]).is_dir():  # other ranks may still be at the run that writes it
                time.sleep(0.05)
            shutil.copytree(job["resume"], Path(job["config"]["output_dir"]) / Path(job["resume"]).name)
        dist.barrier()
        cfg = OmegaConf.create(job["config"])
        with no_memory_stats_on_cpu(torch.device("cpu")):
            recipe = (base.FullFinetuneRecipeDistributed if job.get("base") else ours)(cfg)
            recipe.setup(cfg)
            recipe.train()
            recipe.cleanup()


if __name__ == "__main__":
    main(sys.argv[1])
