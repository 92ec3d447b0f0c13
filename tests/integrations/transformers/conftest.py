"""A tiny Llama, a tiny Mistral, their data, and Trainers on them: real ones, small enough for the CPU."""

import os

import pytest
import torch

os.environ.setdefault("WANDB_DISABLED", "true")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small gain nothing from threads, which then only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture
def make_trainer(make_model, rows, tmp_path):
    """Function that makes a Trainer over the rows, in their order; keywords go to its TrainingArguments."""
    from transformers import Trainer, TrainingArguments

    def make(callbacks=(), model=None, **changes):
        settings = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 5,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
            "optim": "adamw_torch",
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 1,
        }
        return Trainer(
            model=make_model() if model is None else model,
            args=TrainingArguments(**{**settings, **changes}),
            train_dataset=rows,
            callbacks=list(callbacks),
        )

    return make
