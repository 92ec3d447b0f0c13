"""SmolLM2-135M learns to solve GSM8K's problems: the Hugging Face Trainer with a compact optimizer, ten steps.

    pip install "gmt-tune[transformers,fetch]" datasets
    gmt-tune fetch smollm2-135m /tmp/SmolLM2-135M-Instruct
    python examples/compact_smollm2_trainer.py --model /tmp/SmolLM2-135M-Instruct

Gradients and optimizer states exist for a twentieth of the entries alone. All that makes it so is the last argument of
the Trainer; learning rate, schedule, weight decay and clipping are set as ever. Without ``--model`` and ``--data``,
both come from the Hugging Face hub.
"""

import argparse

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from gmt_tune.integrations.transformers import GradientMaskCallback

BATCH_SIZE, ACCUMULATE = 2, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder, or name on the hub")
    parser.add_argument("--data", help="GSM8K's train.jsonl; without it, openai/gsm8k from the hub")
    parser.add_argument("--output-dir", default="/tmp/smollm2_gsm8k_compact")
    parser.add_argument("--density", type=float, default=0.05, help="fraction of entries that are updated")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def tokenize(row: dict) -> dict:
        """The loss is that of the answer alone."""
        question = tokenizer(row["question"] + "\n")["input_ids"]
        answer = tokenizer(row["answer"])["input_ids"] + [tokenizer.eos_token_id]
        return {"input_ids": question + answer, "labels": [-100] * len(question) + answer}

    data = (
        load_dataset("json", data_files=args.data, split="train")
        if args.data
        else load_dataset("openai/gsm8k", "main", split="train")
    )
    rows = min(len(data), args.steps * BATCH_SIZE * ACCUMULATE)
    data = data.shuffle(seed=0).select(range(rows)).map(tokenize, remove_columns=data.column_names)

    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(args.model).float(),
        args=TrainingArguments(
            output_dir=args.output_dir,
            max_steps=args.steps,
            per_device_train_batch_size=BATCH_SIZE,
            gradient_accumulation_steps=ACCUMULATE,
            optim="adamw_torch_8bit",  # moments in 8 bits; adamw_torch: in 32
            learning_rate=3e-4,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,  # of selected entries and dense parameters: what CompactAdamW is about to apply
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=0,
        ),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        # Each layer gets a new selection every five steps, in turns; use 20 or so in a run of hundreds
        callbacks=[GradientMaskCallback(density=args.density, refresh_every=5, dense=["*norm*"], compact=True)],
    )
    trainer.train()

    held = sum(state[key].nbytes for state in trainer.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    print(f"moments take {held / trainer.model.num_parameters():.2f} bytes a parameter")


if __name__ == "__main__":
    main()
