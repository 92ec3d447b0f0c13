"""The held-out loss is that of the answers alone, and equals what training would measure."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny_gguf import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "eval_loss.py"
PROBLEMS = [("What is 12 plus 30?", "42.\n\n"), ("\n\nIs it?", "  It is.\n#### 1"), ("x", "y")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_llama(tokenizer.get_vocab_size()).save_pretrained(folder)
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **tokens).save_pretrained(folder)
    rows = [{"question": question, "answer": answer} for question, answer in PROBLEMS]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(capsys):
    """Function that runs the script with the given command line; returns what it wrote to stdout."""
    spec = importlib.util.spec_from_file_location("eval_loss", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*args) -> str:
        capsys.readouterr()
        script.main([str(arg) for arg in args])
        return capsys.readouterr().out

    return run


def test_loss_equals_that_of_the_training_labels(folder, run):
    from torchtune.data import Message
    from transformers import AutoModelForCausalLM

    from gmt_tune.models.smollm2 import smollm2_tokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = smollm2_tokenizer(str(folder / "tokenizer.json"))
    losses = []
    for question, answer in PROBLEMS[:2]:
        messages = [Message(role="user", content=question, masked=True), Message(role="assistant", content=answer)]
        tokens, mask = tokenizer.tokenize_messages(messages)
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, :-1]
        every = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
        losses += every[~torch.tensor(mask[1:])].tolist()

    measured = json.loads(run(folder, "--data", folder / "test.jsonl", "--problems", 2, "--json"))
    assert (measured["problems"], measured["tokens"]) == (2, len(losses))
    assert measured["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_one_line_for_the_loss_and_the_answer_to_a_question(folder, run):
    lines = run(folder, "--data", folder / "test.jsonl", "--ask", "1 + 1?", "--max-new-tokens", 4).splitlines()
    assert lines[0].startswith("loss ") and "of 3 problems" in lines[0]
    assert lines[1] == "Q: 1 + 1?" and lines[2].startswith("A:")


def test_bad_input_is_named(folder, tmp_path, run, capsys):
    for args, sentence in [
        ((tmp_path, "--ask", "x"), "it has no config.json"),
        ((folder,), "nothing to do"),
        ((folder, "--ask", "x", "--problems", 0), "--problems is 0, but must be at least 1"),
    ]:
        with pytest.raises(SystemExit):
            run(*args)
        assert sentence in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text('{"q": 1}\n')
    with pytest.raises(SystemExit, match="bad.jsonl, line 1: expected"):
        run(folder, "--data", tmp_path / "bad.jsonl")
