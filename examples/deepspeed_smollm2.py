"""SmolLM2-135M learns to solve GSM8K's problems: DeepSpeed's own training loop, ZeRO stage 2, ten steps.

    pip install "gmt-tune[transformers,fetch,deepspeed]" datasets
    gmt-tune fetch smollm2-135m /tmp/SmolLM2-135M-Instruct
    torchrun --nproc_per_node 2 examples/deepspeed_smollm2.py --model /tmp/SmolLM2-135M-Instruct

``deepspeed examples/deepspeed_smollm2.py ...`` starts it as well; on a CPU, with ``DS_ACCELERATOR=cpu`` before either.
What makes it Gradient-Mask Tuning are the two lines with ``mask``.
"""

import argparse

import deepspeed
import torch
import torch.distributed as dist
from datasets import load_dataset
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from gmt_tune import GradientMask
from gmt_tune.integrations.deepspeed import register

BATCH_SIZE, ACCUMULATE = 2, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder, or name on the hub")
    parser.add_argument("--data", help="GSM8K's train.jsonl; without it, openai/gsm8k from the hub")
    parser.add_argument("--output-dir", default="/tmp/smollm2_gsm8k_deepspeed")
    parser.add_argument("--density", type=float, default=0.2, help="fraction of gradient entries that stay")
    parser.add_argument("--stage", type=int, default=2, choices=(1, 2, 3), help="of ZeRO")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    args = parser.parse_args()
    deepspeed.init_distributed()
    torch.manual_seed(0)

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
    rows = min(len(data), args.steps * BATCH_SIZE * ACCUMULATE * dist.get_world_size())
    data = data.shuffle(seed=0).select(range(rows)).map(tokenize, remove_columns=data.column_names)
    collate = DataCollatorForSeq2Seq(tokenizer)
    batches = DataLoader(data, BATCH_SIZE, sampler=DistributedSampler(data), collate_fn=collate)

    model = AutoModelForCausalLM.from_pretrained(args.model).float()
    mask = GradientMask(model.named_parameters(), density=args.density)  # before initialize: it freezes what is frozen
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4),
        config={
            "train_micro_batch_size_per_gpu": BATCH_SIZE,
            "gradient_accumulation_steps": ACCUMULATE,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": args.stage, "stage3_gather_16bit_weights_on_model_save": True},
            "zero_allow_untested_optimizer": True,  # torch's AdamW, which compiles nothing
        },
    )
    register(mask, engine)

    for batch in batches:
        loss = engine(**batch.to(engine.device)).loss
        engine.backward(loss)
        changes_weights = engine.is_gradient_accumulation_boundary()
        engine.step()
        if changes_weights and dist.get_rank() == 0:
            density = mask.metrics()["mask/density"]
            print(f"step {mask.step}: loss {loss.item():.4f}, {density:.1%} of the gradient stayed")

    engine.save_16bit_model(args.output_dir, "pytorch_model.bin")
    if dist.get_rank() == 0:
        model.config.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
