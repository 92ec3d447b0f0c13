"""Run folders with made-up numbers, in the shapes that real ones come in."""

import math
import random
from pathlib import Path

from gmt_tune.reporting.run_log import RunLog

MODULES = (
    "attn.q_proj.weight",
    "attn.k_proj.weight",
    "attn.v_proj.weight",
    "attn.output_proj.weight",
    "mlp.w1.weight",
    "mlp.w2.weight",
    "mlp.w3.weight",
)


def parameter_names(layers: int) -> list[str]:
    """Names as torchtune gives them."""
    return ["tok_embeddings.weight", *(f"layers.{i}.{module}" for i in range(layers) for module in MODULES)]


def write_run(
    folder: Path,
    steps: int = 200,
    layers: int = 30,
    *,
    density: float | None = 0.2,
    scope: str = "global",
    validation: bool = True,
    tracked: bool = True,
    nan_from: int | None = None,
    seed: int = 0,
    log_every: int = 1,
) -> Path:
    """Write a run log; density None is a run without a mask."""
    rng = random.Random(seed)
    config = {
        "model": {"_component_": "gmt_tune.models.smollm2.smollm2_135m"},
        "dataset": {"_component_": "torchtune.datasets.instruct_dataset", "source": "openai/gsm8k"},
        "checkpointer": {"checkpoint_dir": "/models/SmolLM2-135M-Instruct"},
        "optimizer": {"_component_": "torchao.optim.AdamW8bit", "lr": 2e-5},
        "batch_size": 2,
        "gradient_accumulation_steps": 8,
        "dtype": "bf16",
        "seed": seed,
    }
    if density is not None:
        config["gradient_mask"] = {"_component_": "gmt_tune.GradientMask", "density": density, "scope": scope}
        config["gradient_mask"] |= {"score": "magnitude", "refresh_every": 1, "dense": ["*norm*", "*.scale"]}
    log = RunLog(folder, config)
    log.truncate_after(0)
    names = parameter_names(layers)
    for step in range(log_every, steps + 1, log_every):
        loss = 0.6 + 1.8 * math.exp(-step / (0.2 * steps)) + rng.gauss(0, 0.06)
        if nan_from is not None and step >= nan_from:
            loss = math.nan
        metrics = {
            "loss": loss,
            "lr": 2e-5 * min(1, step / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps)),
            "tokens_per_second_per_gpu": 3100 + rng.gauss(0, 120),
            "grad_norm": 1.2 + 3 * math.exp(-step / (0.1 * steps)) + abs(rng.gauss(0, 0.2)),
            "peak_memory_active": 11.2,
            "peak_memory_alloc": 11.2,
            "peak_memory_reserved": 12.9,
        }
        thresholds = {name: 1e-4 * math.exp(rng.gauss(0, 0.2) + 0.03 * i / 7) for i, name in enumerate(names)}
        if density is not None:
            metrics["mask/density"] = density * (1 + abs(rng.gauss(0, 0.002)))
            metrics["mask/seconds"] = 0.011 + abs(rng.gauss(0, 0.0005))
            ordered = sorted(thresholds.values())
            metrics["mask/threshold_min"], metrics["mask/threshold_max"] = ordered[0], ordered[-1]
            metrics["mask/threshold_median"] = ordered[len(ordered) // 2]
            if tracked:
                metrics["mask/overlap"] = 0.35 + 0.1 * step / steps + rng.gauss(0, 0.01)
                metrics["mask/coverage"] = 1 - 0.8 * math.exp(-step / (0.15 * steps))
            spread = 0.0 if scope == "tensor" else 0.6
            densities = {
                name: min(1.0, density * math.exp(spread * math.sin(i / 20) + spread * rng.gauss(0, 0.4)))
                for i, name in enumerate(names)
            }
            detail = {"density": densities, "threshold": thresholds}
            if tracked:
                detail["overlap"] = {name: 0.3 + 0.2 * rng.random() for name in names}
                detail["coverage"] = {name: min(1.0, 0.5 + 0.5 * rng.random()) for name in names}
            log.log_mask(step, lambda detail=detail: detail)
        log.log(step, metrics)
        if validation and step % max(1, steps // 8) == 0:
            log.log(step, {"val_loss": 0.7 + 1.7 * math.exp(-step / (0.2 * steps))})
    log.log(steps, {"exact_match_after": 0.31})
    return folder
