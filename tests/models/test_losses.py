"""LinearCrossEntropyLoss: the numbers of an ordinary cross-entropy, without all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TiedLinear

from gmt_tune.errors import UserError
from gmt_tune.models.gemma2.soft_capping import SoftCappedLinear
from gmt_tune.models.losses import LinearCrossEntropyLoss

VOCABULARY = 50


class Head(nn.Module):
    def __init__(self, is_tied: bool, dtype: torch.dtype = torch.float32, softcap: float | None = None) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, 8, dtype=dtype)
        self.output = TiedLinear(self.embeddings) if is_tied else nn.Linear(8, VOCABULARY, bias=False, dtype=dtype)
        if softcap is not None:
            self.output.linear = SoftCappedLinear(softcap)

    def forward(self, tokens):
        return self.output(self.embeddings(tokens)).float()


def both(model: Head, chunks: int, tokens, labels):
    """(loss, gradients) of an ordinary cross-entropy, times 3, and of this one; and what the latter made."""
    found, largest = [], _Largest()
    for fused in (False, True):
        model.zero_grad()
        if fused:
            loss_fn = LinearCrossEntropyLoss(chunks)
            loss_fn.attach_(model)
            with loss_fn.of(labels), largest:
                loss = model(tokens)
        else:
            loss = F.cross_entropy(model(tokens).view(-1, VOCABULARY), labels.view(-1))
        (loss * 3).backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    return *found, largest


class _Largest(TorchDispatchMode):
    """The most entries of a tensor of the vocabulary's width that was made."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() == 2 and result.shape[1] == VOCABULARY:
            self.rows = max(self.rows, result.shape[0])
        return result


@pytest.mark.parametrize(("is_tied", "softcap"), [(False, None), (True, None), (True, 2.0)])
@pytest.mark.parametrize("chunks", [1, 4, 100])
def test_equals_cross_entropy(is_tied, softcap, chunks):
    torch.manual_seed(0)
    model = Head(is_tied, softcap=softcap)
    tokens, labels = torch.randint(VOCABULARY, (2, 2, 11))
    labels[0, :7] = -100
    (wanted, wanted_grads), (loss, grads), largest = both(model, chunks, tokens, labels)
    assert torch.allclose(loss, wanted, rtol=1e-6)
    for grad, its in zip(grads, wanted_grads, strict=True):
        assert torch.allclose(grad, its, rtol=1e-5, atol=1e-7)
    assert largest.rows <= {1: 22, 4: 8, 100: 8}[chunks]  # 8: the weight's gradient, as [8, vocabulary]
    assert model(tokens).shape == (2, 11, VOCABULARY)  # outside, there are logits


def test_bfloat16_is_as_near_as_an_ordinary_one():
    torch.manual_seed(0)
    tokens, labels = torch.randint(VOCABULARY, (2, 4, 32))
    exact = Head(False)
    model = Head(False, torch.bfloat16)
    model.load_state_dict(exact.state_dict())
    exact.load_state_dict(model.state_dict())
    (_, wanted), *_ = both(exact, 1, tokens, labels)
    (_, ordinary), (_, fused), _ = both(model, 4, tokens, labels)
    for grad, other, right in zip(fused, ordinary, wanted, strict=True):
        assert (grad - right).norm() < 2 * (other - right).norm() + 1e-3 * right.norm()


def test_a_frozen_output_layer_gets_no_gradient_and_a_validation_none_at_all():
    torch.manual_seed(0)
    model = llama3_2(
        vocab_size=VOCABULARY,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        embed_dim=8,
        max_seq_len=16,
        intermediate_dim=8,
    )
    loss_fn = LinearCrossEntropyLoss()
    loss_fn.attach_(model)
    tokens = torch.randint(VOCABULARY, (2, 16))
    with torch.no_grad(), loss_fn.of(tokens):
        validated = model(tokens)
    model.tok_embeddings.requires_grad_(False)
    with loss_fn.of(tokens):
        loss = model(tokens)
    loss.backward()
    assert torch.equal(validated, loss.detach())
    assert model.tok_embeddings.weight.grad is None and model.norm.scale.grad.abs().sum() > 0


def test_a_wrong_number_of_chunks_is_named():
    with pytest.raises(UserError, match=r"loss\.num_chunks must be a whole number from 1 on, got 0"):
        LinearCrossEntropyLoss(0)
