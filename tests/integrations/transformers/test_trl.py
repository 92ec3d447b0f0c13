"""SFTTrainer and DPOTrainer: the same callback, the same promises."""

import json

import pytest
import trl
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gmt_tune import CompactAdamW
from gmt_tune.integrations.transformers import GradientMaskCallback

SGD = {"optim": "sgd", "weight_decay": 0.0, "learning_rate": 10.0, "max_steps": 1}


@pytest.fixture
def make_sft_or_dpo(tiny_world, tmp_path):
    """Function that makes a trainer of the kind "sft" or "dpo" on the tiny Llama and sums; keywords: its config."""
    from datasets import Dataset

    lines = [json.loads(line) for line in (tiny_world / "train.jsonl").read_text().splitlines()]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_world / "model" / "tokenizer.json"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )

    def make(kind, callbacks=(), peft_config=None, **changes):
        settings = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            **changes,
        }
        if kind == "sft":
            rows = [{"prompt": line["question"], "completion": " " + line["answer"]} for line in lines]
            trainer_class, args = trl.SFTTrainer, trl.SFTConfig(**settings)
        else:
            rows = [
                {"prompt": line["question"], "chosen": " " + line["answer"], "rejected": " I do not know."}
                for line in lines
            ]
            trainer_class, args = trl.DPOTrainer, trl.DPOConfig(**settings)
        return trainer_class(
            model=AutoModelForCausalLM.from_pretrained(tiny_world / "model"),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=list(callbacks),
            peft_config=peft_config,
        )

    return make


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_step_moves_the_entries_that_a_full_sort_selects(make_sft_or_dpo, moves_only_selected, kind):
    callback = GradientMaskCallback(density=0.2, dense=[])
    moves_only_selected(lambda watch: make_sft_or_dpo(kind, [callback, watch], **SGD), density=0.2)
    assert callback.mask.step == 1


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_density_1_equals_the_trainer_without_callback(make_sft_or_dpo, same_bits, kind):
    without = make_sft_or_dpo(kind, max_steps=3)
    masked = make_sft_or_dpo(kind, [GradientMaskCallback(density=1.0)], max_steps=3)
    without.train(), masked.train()
    assert same_bits(without.model.state_dict(), masked.model.state_dict()) == []


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_loss_falls_and_metrics_join_trls_own(make_sft_or_dpo, kind):
    trainer = make_sft_or_dpo(kind, [GradientMaskCallback(density=0.2)])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 6 and logs[-1]["loss"] < logs[0]["loss"]
    trls_own = "mean_token_accuracy" if kind == "sft" else "rewards/margins"
    assert all(0.15 < log["mask/density"] < 0.25 and trls_own in log for log in logs)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_loss_falls_with_a_compact_optimizer(make_sft_or_dpo, kind):
    trainer = make_sft_or_dpo(kind, [GradientMaskCallback(density=0.2, refresh_every=3, compact=True)])
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert isinstance(optimizer, CompactAdamW) and logs[-1]["grad_norm"] == optimizer.grad_norm.item()
    assert len(logs) == 6 and logs[-1]["loss"] < logs[0]["loss"]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_with_a_peft_config_the_adapters_are_masked(make_sft_or_dpo, kind):
    import peft

    callback = GradientMaskCallback(density=0.2)
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    make_sft_or_dpo(kind, [callback], peft_config=adapters, max_steps=1).train()
    masked = callback.mask.statistics.numel
    assert masked and all("lora_" in name for name in masked)
