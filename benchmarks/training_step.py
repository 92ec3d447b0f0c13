"""Whole training steps of SmolLM2-135M with and without the mask: the second mode of ``selection.py``.

The model has SmolLM2-135M's shapes, random weights and random tokens, none of which changes what is timed, and an
AdamW of PyTorch. Steps with and without the mask take turns, so that a busy machine slows both.
"""

import statistics
import time

import torch
from torchtune.models.llama3_2 import llama3_2

from gmt_tune import GradientMask

VOCAB_SIZE = 49152


def make_model(dtype: torch.dtype, device: torch.device, seq_len: int) -> torch.nn.Module:
    """SmolLM2-135M with random weights."""
    torch.manual_seed(0)
    with device:
        model = llama3_2(
            vocab_size=VOCAB_SIZE,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            embed_dim=576,
            intermediate_dim=1536,
            max_seq_len=seq_len,
            rope_base=100_000,
            norm_eps=1e-5,
            scale_factor=1,
        )
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.02)
    return model.to(dtype)


def measure_steps(
    dtype: torch.dtype, dtype_name: str, density: float, batch: int, seq_len: int, rounds: int, device: torch.device
) -> dict:
    """Medians of the steps' seconds: with the mask, without it, and of the mask's own part."""
    model = make_model(dtype, device, seq_len)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    mask = GradientMask(model.named_parameters(), density, dense=["*norm*", "*.scale"])
    masking: list[float] = []

    def mask_and_time(*_) -> None:
        start = _now(device)
        mask.mask_grads_()
        masking.append(_now(device) - start)

    def step() -> float:
        start = _now(device)
        tokens_BS = torch.randint(VOCAB_SIZE, (batch, seq_len), device=device)
        logits_BSV = model(tokens_BS)
        loss = torch.nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), tokens_BS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return _now(device) - start

    step()  # allocates the optimizer's state
    masked, plain = [], []
    for i in range(rounds + 1):
        handle = optimizer.register_step_pre_hook(mask_and_time)
        masked.append(step())
        handle.remove()
        plain.append(step())
        if i == 0:  # first use of everything
            masked.clear(), plain.clear(), masking.clear()
    return dict(
        model="smollm2_135m",
        dtype=dtype_name,
        batch_size=batch,
        seq_len=seq_len,
        rounds=rounds,
        plain_s=statistics.median(plain),
        masked_s=statistics.median(masked),
        mask_s=statistics.median(masking),
        mask_share=statistics.median(m / s for m, s in zip(masking, masked, strict=True)),
    )


def steps_table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| model | dtype | tokens in a step | step, s | step with mask, s | mask, s | mask's share of its step |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['dtype']} | {row['batch_size'] * row['seq_len']} | {row['plain_s']:.3g} "
            f"| {row['masked_s']:.3g} | {row['mask_s']:.3g} | {row['mask_share']:.2%} |"
        )
    return "\n".join(lines)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
