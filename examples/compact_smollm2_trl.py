"""SmolLM2-135M learns to solve GSM8K's problems: TRL's SFTTrainer with a compact optimizer, ten steps.

    pip install "gmt-tune[transformers,fetch]" trl
    gmt-tune fetch smollm2-135m /tmp/SmolLM2-135M-Instruct
    python examples/compact_smollm2_trl.py --model /tmp/SmolLM2-135M-Instruct

Like ``sft_smollm2_trl.py``, and gradients and optimizer states exist for a twentieth of the entries alone. DPOTrainer
and the others of TRL take the same callback.
"""

import argparse

from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from gmt_tune.integrations.transformers import GradientMaskCallback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder, or name on the hub")
    parser.add_argument("--data", help="GSM8K's train.jsonl; without it, openai/gsm8k from the hub")
    parser.add_argument("--output-dir", default="/tmp/smollm2_gsm8k_compact_trl")
    args = parser.parse_args()

    data = (
        load_dataset("json", data_files=args.data, split="train")
        if args.data
        else load_dataset("openai/gsm8k", "main", split="train")
    )
    data = data.shuffle(seed=0).select(range(min(len(data), 40)))
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model).float(),
        args=SFTConfig(
            output_dir=args.output_dir,
            max_steps=10,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_length=256,
            optim="adamw_torch_8bit",  # moments in 8 bits; adamw_torch: in 32
            learning_rate=3e-4,
            max_grad_norm=1.0,  # of selected entries and dense parameters: what CompactAdamW is about to apply
            bf16=False,  # True on a GPU
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=0,
        ),
        train_dataset=data.rename_columns({"question": "prompt", "answer": "completion"}),
        # Each layer gets a new selection every five steps, in turns; use 20 or so in a run of hundreds
        callbacks=[GradientMaskCallback(density=0.05, refresh_every=5, dense=["*norm*"], compact=True)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
