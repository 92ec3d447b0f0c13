"""What CompactAdamW must do, on dense tensors with a boolean mask: a few lines of plain torch, in float64."""

import math

import torch
from torch import Tensor


class DenseOracle:
    """AdamW of selected entries alone, with an age for each.

    Args:
        parameters: by name; their values are copied.
        dense: names that are not masked.
        turns: step of each name's first turn.
        quantize: what a moment's selected entries, 1-d, become when they are stored.
        score: what the entries of a name are ranked by, of its gradient and weight.
        dtype: that weights are rounded to.
    """

    def __init__(
        self,
        parameters,
        density,
        refresh_every,
        turns,
        *,
        lr,
        betas,
        eps,
        weight_decay,
        dense=(),
        max_norm=None,
        quantize=lambda values, signed: values,
        score=lambda name, grad, weight: grad.abs(),
        dtype=None,
    ):
        self.p = {name: p.detach().double().clone() for name, p in parameters.items()}
        self.m = {name: torch.zeros_like(p) for name, p in self.p.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.p.items()}
        self.age = {name: torch.zeros_like(p) for name, p in self.p.items()}
        self.mask = {name: torch.full_like(p, name in dense).bool() for name, p in self.p.items()}
        self.density, self.every, self.turns, self.dense = density, refresh_every, turns, dense
        self.lr, self.betas, self.eps, self.decay, self.max_norm = lr, betas, eps, weight_decay, max_norm
        self.quantize, self.score, self.steps = quantize, score, 0
        self.dtype = dtype or torch.float64

    def is_due(self, name: str) -> bool:
        first = self.steps == self.turns[name]
        return first if self.every is None else self.steps % self.every == self.turns[name]

    def step(self, gradients: dict[str, Tensor]) -> None:
        for name, grad in gradients.items():
            if name not in self.dense and self.is_due(name):
                score = self.score(name, grad, self.p[name].to(grad.dtype)).reshape(-1).double()
                k = max(1, math.floor(self.density * score.numel()))
                order = torch.sort(score, descending=True, stable=True).indices[:k]
                selected = torch.zeros(score.numel(), dtype=torch.bool).index_fill_(0, order, True)
                selected &= (score > 0) | (self.density == 1)
                self.mask[name] = selected.view_as(grad)
                for state, signed in ((self.m, True), (self.v, False), (self.age, None)):
                    state[name] *= self.mask[name]
                    if signed is not None:
                        self._store(state, name, signed)
        applied = {name: grad.double() * self.mask[name] for name, grad in gradients.items()}
        if self.max_norm is not None:
            norm = sum(grad.square().sum() for grad in applied.values()).sqrt()
            factor = min(1.0, self.max_norm / (float(norm) + 1e-6))
            applied = {name: grad * factor for name, grad in applied.items()}
        beta1, beta2 = self.betas
        for name, grad in applied.items():
            mask = self.mask[name]
            self.age[name] += mask
            m = self.m[name] * beta1 + grad * (1 - beta1)
            v = self.v[name] * beta2 + grad.square() * (1 - beta2)
            age = self.age[name].clamp(min=1)
            update = m / (1 - beta1**age) / ((v / (1 - beta2**age)).sqrt() + self.eps)
            p = self.p[name]
            moved = (p - self.lr * self.decay * p - self.lr * update).to(self.dtype).double()
            self.p[name] = torch.where(mask, moved, p)
            self.m[name], self.v[name] = m * mask, v * mask
            self._store(self.m, name, True)
            self._store(self.v, name, False)
        self.steps += 1

    def _store(self, state: dict[str, Tensor], name: str, signed: bool) -> None:
        mask = self.mask[name]
        state[name][mask] = self.quantize(state[name][mask].float(), signed).double()
