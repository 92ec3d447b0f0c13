"""ExactMatch counts right answers, generates what transformers generates, and leaves the model as it was."""

import json
import random
import runpy
from pathlib import Path

import launch
import pytest
import torch
from torch import nn

from gmt_tune.data import ExactMatch
from gmt_tune.data.exact_match import generate_greedily
from gmt_tune.data.village import people, questions
from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.plugin.assets import asset
from gmt_tune.models.chatml import ChatMLTokenizer

WORKER = Path(__file__).with_name("sharded_generation.py")


@pytest.fixture(scope="module")
def tokenizer():
    return ChatMLTokenizer(asset("quickstart/tokenizer.json"), max_seq_len=128)


@pytest.fixture(scope="module")
def worker():
    return runpy.run_path(str(WORKER))


class Oracle(nn.Module):
    """Knows what follows each token sequence that begins like one of ``texts``, as a language model that is always
    right would; goes on with token 5 elsewhere."""

    def __init__(self, texts: list[list[int]], vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.follows = {tuple(text[:i]): text[i] for text in texts for i in range(1, len(text))}
        self.vocab_size = vocab_size

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, self.vocab_size)
        for b, row in enumerate(tokens.tolist()):
            for s in range(len(row)):
                logits[b, s, self.follows.get(tuple(row[: s + 1]), 5)] = 1.0
        return logits


def dialogue(tokenizer, prompt: str, answer: str) -> list[int]:
    from torchtune.data import Message

    messages = [Message(role="user", content=prompt), Message(role="assistant", content=answer)]
    return tokenizer.tokenize_messages(messages)[0]


def test_accuracy_is_the_share_of_right_answers(tokenizer):
    asked = questions("held_out")
    texts = [dialogue(tokenizer, q.prompt, q.answer) for q in asked[:10]]
    texts += [dialogue(tokenizer, q.prompt, q.answer + " And more.") for q in asked[10:20]]
    texts += [dialogue(tokenizer, q.prompt, q.answer[:-1]) for q in asked[20:30]]
    evaluate = ExactMatch(tokenizer, size=40, max_new_tokens=20, batch_size=7)
    assert evaluate(Oracle(texts, 832)) == {"accuracy": 0.25}


def test_an_answer_longer_than_max_new_tokens_is_wrong(tokenizer):
    asked = questions("held_out")[:4]
    oracle = Oracle([dialogue(tokenizer, q.prompt, q.answer) for q in asked], 832)
    longest = max(len(tokenizer.encode(q.answer, add_eos=False)) for q in asked)
    assert ExactMatch(tokenizer, size=4, max_new_tokens=longest)(oracle)["accuracy"] == 1.0
    assert ExactMatch(tokenizer, size=4, max_new_tokens=3)(oracle)["accuracy"] == 0.0


def test_own_rows_are_compared_by_what_is_extracted(tokenizer, tmp_path):
    rows = [
        {"question": "2 + 3?", "answer": "2 and 3 #### 4 no #### 5"},
        {"question": "2 + 4?", "answer": "2 and 4 #### 6"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    evaluate = ExactMatch(
        tokenizer,
        data_files=str(tmp_path / "rows.jsonl"),
        prompt_column="question",
        extract=r"#### (-?\d+)",
        max_new_tokens=40,
    )
    answers = ["Other words #### 5", "2 and 4 is 6"]
    texts = [dialogue(tokenizer, row["question"], answer) for row, answer in zip(rows, answers, strict=True)]
    assert evaluate(Oracle(texts, 832)) == {"accuracy": 0.5}


def test_generates_what_transformers_generates(worker):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(asset("quickstart"))
    prompts, stops = worker["prompts"](), worker["STOPS"]
    ours = generate_greedily(worker["model"](), prompts, max_new_tokens=30, stop_tokens=stops, pad_id=0)
    for prompt, generated in zip(prompts, ours, strict=True):
        expected = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30, eos_token_id=stops)
        expected = expected[0, len(prompt) :].tolist()
        assert generated == (expected[:-1] if expected[-1] in stops else expected)
    # The comparison means little unless answers end at different lengths
    assert len({len(generated) for generated in ours}) > 5


def test_chunked_outputs_give_the_same_answers(worker):
    model, prompts = worker["model"](), worker["prompts"]()
    whole = generate_greedily(model, prompts, max_new_tokens=10, stop_tokens=worker["STOPS"], pad_id=0)
    model.set_num_output_chunks(4)
    assert generate_greedily(model, prompts, max_new_tokens=10, stop_tokens=worker["STOPS"], pad_id=0) == whole


def test_a_sharded_model_gives_the_same_answers_on_every_rank(worker, tmp_path):
    launch.torchrun(WORKER, tmp_path, processes=2, log_dir=tmp_path)
    alone = worker["generate"](worker["model"]())
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == alone


def test_model_modes_gradients_and_random_state_stay_as_they_were(tokenizer, worker):
    model = worker["model"]().train()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    ExactMatch(tokenizer, size=5, max_new_tokens=2)(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_new_tokens": 0}, "evaluation.max_new_tokens must be a whole number from 1 on, got 0"),
        ({"batch_size": -1}, "evaluation.batch_size must be a whole number from 1 on, got -1"),
        ({"split": "test"}, "split is 'test', but must be train or held_out"),
        ({"extract": "#### .*"}, "must have one group"),
        ({"extract": "(#### "}, "is no regular expression"),
        ({"extract": "#### (.*)"}, "finds nothing in the answer"),
        ({"data_files": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"data_files": "rows.jsonl"}, "has no 'prompt' in line 1: .* two of question, answer"),
        ({"data_files": "broken.jsonl"}, "line 2 of broken.jsonl is no valid JSON"),
        ({"data_files": "empty.jsonl"}, "empty.jsonl is empty"),
        ({"data_files": "null.jsonl"}, "has in line 2 the answer null: fill it in or delete it"),
        ({"data_files": "number.jsonl"}, "line 1 of number.jsonl is 5, not an object with the row's columns"),
        ({"data_files": "latin.jsonl"}, "line 1 of latin.jsonl is not UTF-8"),
    ],
)
def test_wrong_keys_are_refused_by_name(tokenizer, tmp_path, monkeypatch, keys, message):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    Path("broken.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt"\n')
    Path("empty.jsonl").write_text("\n")
    Path("null.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": null}\n')
    Path("number.jsonl").write_text("5\n")
    Path("latin.jsonl").write_bytes('{"prompt": "é", "answer": "b"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        ExactMatch(tokenizer, **keys)


def test_shown_answers_name_what_was_expected(tokenizer, worker, caplog):
    import logging

    with caplog.at_level(logging.INFO):
        ExactMatch(tokenizer, size=5, max_new_tokens=2, show=1)(worker["model"]())
    assert "0 of 5 held_out questions were answered word for word" in caplog.text
    assert any(name in caplog.text for name in people()) and "expected: " in caplog.text
