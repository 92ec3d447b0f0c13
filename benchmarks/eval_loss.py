"""Loss of a model on held-out questions, and what it answers: to compare a checkpoint with its base model.

The model is any Hugging Face folder with a chat template: a base model, or a folder that a recipe saved. It is
loaded with transformers, not with the code that trained it, so that this also shows that the checkpoint is whole.
The loss is the mean over the tokens of the answers (and of the end-of-turn token that closes each), in nats,
computed in fp32.

    python benchmarks/eval_loss.py /tmp/SmolLM2-135M-Instruct --data test.jsonl
    python benchmarks/eval_loss.py /tmp/SmolLM2-135M-Instruct --ask "What is the capital of France?"
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import transformers


def answer_loss(model, tokenizer, question: str, answer: str) -> tuple[float, int]:
    """
    Negative log-likelihood of an answer, given its question in the chat template of the tokenizer.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, with a chat template.
        question (str): what the user says.
        answer (str): what the assistant should say.

    Returns:
        tuple[float, int]: the sum over the answer's tokens, in nats, and their number.
    """
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    # What a template writes after the end-of-turn token is no part of the answer.
    text = tokenizer.apply_chat_template(chat, tokenize=False).rstrip()
    if not text.startswith(prompt):
        raise ValueError("the chat template writes a question differently when an answer follows it")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens_BS = torch.tensor([encoding["input_ids"]])
    num_answer_tokens = sum(end > len(prompt) for _, end in encoding["offset_mapping"])
    # The prediction of a token is at the position before it; logits are computed for these positions alone.
    logits_BSV = model(tokens_BS, logits_to_keep=num_answer_tokens + 1).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits_BSV[0].float(), tokens_BS[0, -num_answer_tokens:], reduction="sum")
    return loss.item(), num_answer_tokens


def ask(model, tokenizer, question: str, max_new_tokens: int) -> str:
    """The model's most likely answer to ``question`` (greedy decoding)."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens_BS = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(tokens_BS[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def read_problems(path: Path, count: int, question_key: str, answer_key: str) -> list[tuple[str, str]]:
    """The first ``count`` questions and answers of a file with one JSON object on each line."""
    problems = []
    with path.open(encoding="utf-8") as lines:
        for number, line in zip(range(1, count + 1), lines, strict=False):
            try:
                row = json.loads(line)
                problems.append((row[question_key], row[answer_key]))
            except (ValueError, KeyError, TypeError):
                sys.exit(f'{path}, line {number}: expected {{"{question_key}": ..., "{answer_key}": ...}}')
    if not problems:
        sys.exit(f"{path} is empty")
    return problems


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a Hugging Face folder: config.json, safetensors, tokenizer")
    parser.add_argument("--data", type=Path, help="held-out problems, one JSON object on each line")
    parser.add_argument("--problems", type=int, default=64, help="how many from the beginning (default 64)")
    parser.add_argument("--question-key", default="question")
    parser.add_argument("--answer-key", default="answer")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--ask", metavar="QUESTION", help="print the model's answer to this question")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer, in tokens (default 128)")
    args = parser.parse_args(argv)
    if args.data is None and args.ask is None:
        parser.error("nothing to do: give --data, --ask, or both")
    if not (args.folder / "config.json").is_file():
        parser.error(f"{args.folder} is not a Hugging Face folder: it has no config.json")
    if args.problems < 1:
        parser.error(f"--problems is {args.problems}, but must be at least 1")

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()

    result = {"folder": str(args.folder)}
    with torch.inference_mode():
        if args.data is not None:
            problems = read_problems(args.data, args.problems, args.question_key, args.answer_key)
            losses, counts = zip(*(answer_loss(model, tokenizer, q, a) for q, a in problems), strict=True)
            loss = sum(losses) / sum(counts)
            result |= {"data": str(args.data), "problems": len(problems), "tokens": sum(counts), "loss": loss}
        if args.ask is not None:
            result |= {"question": args.ask, "answer": ask(model, tokenizer, args.ask, args.max_new_tokens)}
    if args.json:
        print(json.dumps(result))
        return
    if args.data is not None:
        print(
            f"loss {loss:.4f} (perplexity {math.exp(loss):.2f}) on {result['tokens']} answer tokens "
            f"of {result['problems']} problems: {args.folder}"
        )
    if args.ask is not None:
        print(f"Q: {args.ask}\nA: {result['answer']}")


if __name__ == "__main__":
    main()
