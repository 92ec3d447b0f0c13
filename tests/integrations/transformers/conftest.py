"""A tiny Llama, a tiny Mistral, their data, and Trainers on them: real ones, small enough for the CPU.

And the loop that does what these Trainers do, in plain PyTorch.
"""

import functools
import os
from unittest import mock

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from gmt_tune import CompactAdamW, GradientMask

os.environ.setdefault("WANDB_DISABLED", "true")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small gain nothing from threads, which then only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_environment():
    """transformers 4 passes bf16 and FSDP to accelerate in variables, which would last beyond a test."""
    with mock.patch.dict(os.environ):
        yield


def _tiny(config_class, model_class, **changes):
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(11)
    return model_class(config_class(**{**sizes, **changes}))


@pytest.fixture(scope="session")
def make_model():
    """Function that makes the same tiny "llama" or "mistral" at each call."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    classes = {"llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM)}
    return lambda family="llama", **changes: _tiny(*classes[family], **changes)


@pytest.fixture(scope="session")
def rows():
    """48 sequences of equal length, some of whose labels are not trained on."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length in torch.randint(3, 9, (48,), generator=generator).tolist():
        tokens = torch.randint(3, 97, (12,), generator=generator)
        rows.append({"input_ids": tokens, "labels": torch.where(torch.arange(12) < length, -100, tokens)})
    return rows


@pytest.fixture(scope="session")
def make_trainer_in(make_model, rows):
    """Function that makes a Trainer over the rows, in their order unless asked to shuffle.

    Keywords go to its TrainingArguments, and must name an output_dir.
    """
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.SequentialSampler(rows)

    def make(callbacks=(), model=None, shuffle=False, **changes):
        settings = {
            "max_steps": 5,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
            "optim": "adamw_torch",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 1,
        }
        return (Trainer if shuffle else InOrder)(
            model=make_model() if model is None else model,
            args=TrainingArguments(**{**settings, **changes}),
            train_dataset=rows,
            callbacks=list(callbacks),
        )

    return make


@pytest.fixture
def make_trainer(make_trainer_in, tmp_path):
    """The same, with the test's own output folder."""
    return functools.partial(make_trainer_in, output_dir=str(tmp_path / "out"))


@pytest.fixture(scope="session")
def train_plain_loop(rows):
    """Function that does what such a Trainer does, written out: the independent answer.

    It takes the model, the mask's policy, and the optimizer as a function of parameter groups; one that clips by itself
    is left to it. The loss and the optimizer's norm of each step are added to ``record``.
    """

    def adamw(groups):
        return torch.optim.AdamW(groups, lr=1e-2)

    def train(model, policy, make_optimizer=adamw, steps=5, micro_batch=4, accumulate=2, record=None):
        decayed = [p for name, p in model.named_parameters() if "norm" not in name]
        others = [p for name, p in model.named_parameters() if "norm" in name]
        mask = GradientMask(model.named_parameters(), **policy)
        optimizer = make_optimizer([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
        mask.register(optimizer)
        model.train()
        batches = [rows[i : i + micro_batch] for i in range(0, len(rows), micro_batch)]
        for step in range(steps):
            micro_batches = [
                {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
                for batch in batches[step * accumulate : (step + 1) * accumulate]
            ]
            targets = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches)
            losses = []
            for batch in micro_batches:
                losses.append(model(**batch, num_items_in_batch=targets).loss)
                losses[-1].backward()
            if not isinstance(optimizer, CompactAdamW):
                clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            if record is not None:
                record.append((sum(losses).item(), optimizer.grad_norm.item()))
            optimizer.zero_grad()
        return optimizer

    return train
