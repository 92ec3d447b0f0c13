"""The plans of tensor parallelism compute what one process does, for every family that has one; else, a sentence."""

import pytest
import torch
from omegaconf import OmegaConf

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.config.check import check_config

PLAN = {"_component_": "torchtune.models.llama3.base_llama_tp_plan"}
ADAMW = {"_component_": "torch.optim.AdamW", "lr": 1e-2}


@pytest.fixture
def trained(on_tiny_model, run_tune, logged_metrics, final_weights, tmp_path):
    """Function that trains a config in fp32 on so many processes, which share each layer: losses, and weights after."""

    def train(name: str, processes: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        out = tmp_path / f"{processes}"
        cfg = on_tiny_model(name, out, optimizer=ADAMW, dtype="fp32", seed=0)
        cfg.tensor_parallel_dim = processes
        cfg.tensor_parallel_plan = cfg.get("tensor_parallel_plan", None) or PLAN
        OmegaConf.save(cfg, tmp_path / f"{processes}.yaml")
        run_tune(
            *("run", "--nproc_per_node", processes, "gmt_full_finetune", "--config", tmp_path / f"{processes}.yaml"),
            cwd=tmp_path,
        )
        return [step["loss"] for step in logged_metrics(out) if "loss" in step], final_weights(out)

    return train


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5/32B_gmt", "qwen3/32B_gmt", "phi4/14B_gmt", "mistral_v0_3/7B_gmt"])
def test_two_processes_that_share_each_layer_train_as_one_does(name, trained):
    losses, weights = trained(name, 1)
    of_two, weights_of_two = trained(name, 2)
    assert len(losses) == 2 and of_two == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(weights_of_two, weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen3/8B_gmt", "norms of queries and keys"),
        ("gemma2/2B_gmt", "an attention of its own"),
        ("qwen2_5/0.5B_gmt", "an output layer that uses the embeddings"),
    ],
)
def test_a_model_that_the_plan_does_not_fit_is_refused(name, reason, on_tiny_model, tmp_path):
    cfg = on_tiny_model(name, tmp_path, optimizer=ADAMW, tensor_parallel_dim=2)
    cfg.pop("tensor_parallel_plan", None)
    with pytest.raises(UserError, match="tensor_parallel_dim: 2 needs tensor_parallel_plan"):
        check_config(cfg)
    cfg.tensor_parallel_plan = PLAN
    with pytest.raises(UserError, match=f"does not fit this model, which has {reason}.*set tensor_parallel_dim: 1"):
        check_config(cfg)
