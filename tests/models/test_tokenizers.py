"""The families' tokenizers: the ids of their chat templates in transformers, and a loss on what the model writes."""

import json
import os
import pickle
import random
from pathlib import Path

import pytest
from tiny_tokenizers import TINY

from gmt_tune.models.gemma2 import gemma2_tokenizer
from gmt_tune.models.mistral import mistral_v0_3_tokenizer
from gmt_tune.models.phi4 import phi4_tokenizer
from gmt_tune.models.qwen2_5 import qwen2_5_tokenizer
from gmt_tune.models.qwen3 import qwen3_tokenizer

BUILDERS = {
    "qwen2_5": qwen2_5_tokenizer,
    "qwen3": qwen3_tokenizer,
    "gemma2": gemma2_tokenizer,
    "phi4": phi4_tokenizer,
    "mistral": mistral_v0_3_tokenizer,
}
ALTERNATE = {"gemma2", "mistral"}
MESSAGE_END = {"gemma2": "<end_of_turn>", "mistral": "</s>"}  # else <|im_end|>
# Say what the releases' templates say of conversations without tools, in the project's own words
PHI4_TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m.role in ['system', 'user', 'assistant'] -%}"
    "{{ '<|im_start|>' ~ m.role ~ '<|im_sep|>' ~ m.content ~ '<|im_end|>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant<|im_sep|>' }}{%- endif -%}"
)
MISTRAL_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- set begin = 1 if messages[0].role == 'system' else 0 -%}"
    "{%- for m in messages[begin:] -%}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('must alternate') }}{%- endif -%}"
    "{%- if m.role == 'user' and loop.last and begin -%}"
    "{{ '[INST] ' ~ messages[0].content ~ '\n\n' ~ m.content ~ '[/INST]' }}"
    "{%- elif m.role == 'user' -%}{{ '[INST] ' ~ m.content ~ '[/INST]' }}"
    "{%- else -%}{{ ' ' ~ (m.content | trim) ~ eos_token }}{%- endif -%}"
    "{%- endfor -%}"
)


def chat_template(family: str) -> str:
    import trl

    if family in ("phi4", "mistral"):
        return {"phi4": PHI4_TEMPLATE, "mistral": MISTRAL_TEMPLATE}[family]
    name = {"gemma2": "gemma"}.get(family, family)
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the families' tiny tokenizers, such as ``qwen3/tokenizer.json``."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for family, tiny in TINY.items():
        (folder / family).mkdir()
        tiny().save(str(folder / family / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    """Function that builds a family's tokenizer."""

    def build(family, *args, **kwargs):
        return BUILDERS[family](str(folder / family / "tokenizer.json"), *args, **kwargs)

    return build


@pytest.fixture(scope="module")
def theirs(folder):
    """Function that gives transformers' tokenizer of a family."""
    from transformers import PreTrainedTokenizerFast

    def build(family):
        bos, eos = {"gemma2": ("<bos>", "<eos>"), "mistral": ("<s>", "</s>")}.get(family, (None, "<|im_end|>"))
        path = str(folder / family / "tokenizer.json")
        template = chat_template(family)
        return PreTrainedTokenizerFast(tokenizer_file=path, chat_template=template, bos_token=bos, eos_token=eos)

    return build


def conversation(*pairs):
    """torchtune messages from (role, content); only the assistant's are in the loss."""
    from torchtune.data import Message

    return [Message(role=role, content=content, masked=role != "assistant") for role, content in pairs]


def as_dicts(pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def learnt(tokenizer, tokens, mask):
    """The text that is in the loss."""
    kept = [token for token, masked in zip(tokens, mask, strict=True) if not masked]
    return tokenizer.decode(kept, skip_special_tokens=False)


# What makes boundaries hard: white space of all kinds, characters of several bytes, those that a normalizer joins, and
# text that looks like a special token or a thought.
PIECES = [
    *("\n", "\n\n", " ", "  ", "\t", "\r\n", "\xa0", "\u3000", "What", " is", "12", " 30?", "é", "e\u0301", "\u0301"),
    *("→", "🙂", "日本", "<|im_end|>", "<|im_start|>", "<|im_sep|>", "<end_of_turn>", "<bos>", "</s>", "[INST]", "\0"),
    *("<think>", "</think>", "<think>\nAdd them.\n</think>\n\n", "<tool_response>", "</tool_response>", "▁", "<0x0A>"),
]


def random_conversations(family, number, seed=0):
    """Conversations that the family's template accepts, as (role, content) pairs."""
    rng = random.Random(seed)
    for _ in range(number):
        roles = ["system"] * (family != "gemma2" and rng.random() < 0.4)
        if family in ALTERNATE or rng.random() < 0.7:
            roles += ["user", "assistant"] * rng.randint(1, 3)
            roles = roles[: len(roles) - rng.randint(0, 1)]
        else:
            roles += rng.choices(["user", "assistant", "system"], [3, 3, 1], k=rng.randint(1, 5))
        yield [(role, "".join(rng.choices(PIECES, k=rng.randint(0, 8)))) for role in roles]


def check_ids(family, tokenizer, template, number):
    """Compare the ids of random conversations, closed ones and prompts, with transformers'; how many were compared."""
    compared = 0
    for i, pairs in enumerate(random_conversations(family, number)):
        if family == "mistral" and (pairs[0][0], pairs[-1][0]) == ("system", "assistant"):
            continue  # the template drops the system message: see the tests of Mistral below
        keys = {}
        if family == "qwen3":
            keys = {"enable_thinking": bool(i % 2)}
            tokenizer.enable_thinking = keys["enable_thinking"]
        is_prompt = pairs[-1][0] != "assistant" and i % 3 > 0
        expected = template.apply_chat_template(
            as_dicts(pairs), add_generation_prompt=is_prompt, return_dict=False, **keys
        )
        tokens, mask = tokenizer.tokenize_messages(conversation(*pairs), add_end_tokens=not is_prompt)
        assert tokens == expected and len(mask) == len(tokens), (pairs, is_prompt)
        if is_prompt:  # as torchtune's generation recipe asks: with an empty answer at the end
            sample = {"messages": conversation(*pairs, ("assistant", ""))}
            assert tokenizer(sample, inference=True)["tokens"] == expected
        compared += 1
    return compared


@pytest.mark.parametrize("family", BUILDERS)
def test_ids_equal_the_chat_template_of_transformers(family, ours, theirs):
    assert check_ids(family, ours(family), theirs(family), 400) > 250


@pytest.mark.needs_releases
@pytest.mark.parametrize("family", BUILDERS)
def test_ids_equal_those_of_the_release(family):
    """``GMT_TUNE_RELEASES`` names a folder with the downloaded releases' config and tokenizer, one in ``qwen3``, ..."""
    from transformers import AutoTokenizer

    release = Path(os.environ["GMT_TUNE_RELEASES"]) / family
    template = AutoTokenizer.from_pretrained(release)
    tokenizer = BUILDERS[family](str(release / "tokenizer.json"))
    assert check_ids(family, tokenizer, template, 3000) > 2000
    assert tokenizer.eos_id == template.eos_token_id
    if family != "mistral":  # whose release names no padding
        assert tokenizer.pad_id == template.pad_token_id
    ids = {
        "qwen2_5": (None, 151645, 151643, [151645, 151643]),
        "qwen3": (None, 151645, 151643, [151645, 151643]),
        "gemma2": (2, 1, 0, [107, 1]),
        "phi4": (None, 100265, 100349, [100265, 100257]),
        "mistral": (1, 2, 0, [2]),
    }
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_tokens) == ids[family]


LEARNT = {
    "qwen2_5": " é 12 <|im_end|>c\n<|im_end|>",
    "qwen3": " é 12 <|im_end|>c\n<|im_end|>",
    "gemma2": "é 12<end_of_turn>c<end_of_turn>",
    "phi4": "é 12<|im_end|>c<|im_end|>",
    "mistral": "é 12</s> c</s>",  # the first of its two spaces is what a decoder of SentencePiece strips
}


@pytest.mark.parametrize("family", BUILDERS)
def test_loss_is_on_answers_and_their_end_alone(family, ours):
    system = [] if family == "gemma2" else [("system", "Be brief.")]
    messages = conversation(*system, ("user", " a "), ("assistant", " é 12 "), ("user", "b"), ("assistant", "c\n"))
    tokenizer = ours(family)
    sample = tokenizer({"messages": messages})
    assert "messages" not in sample
    assert learnt(tokenizer, sample["tokens"], sample["mask"]) == LEARNT[family]


@pytest.mark.parametrize("family", BUILDERS)
def test_what_the_prompt_holds_is_no_part_of_the_loss(family, ours):
    # What is asked in generation is out of the loss in training, and everything behind it is learnt
    question, answer = [("user", "What?")], ("assistant", "12 plus 30 is 42.")
    tokenizer = ours(family, enable_thinking=False) if family == "qwen3" else ours(family)
    prompt, _ = tokenizer.tokenize_messages(conversation(*question), add_end_tokens=False)
    tokens, mask = tokenizer.tokenize_messages(conversation(*question, answer))
    end = tokens.index(tokenizer.stop_tokens[0], len(prompt)) + 1
    assert tokens[: len(prompt)] == prompt
    assert mask == [i < len(prompt) or i >= end for i in range(len(tokens))]


@pytest.mark.parametrize("family", BUILDERS)
def test_a_begun_answer_is_left_open(family, ours):
    tokenizer = ours(family)
    question = ("user", "What?")
    prompt, _ = tokenizer.tokenize_messages(conversation(question), add_end_tokens=False)
    tokens, _ = tokenizer.tokenize_messages(conversation(question, ("assistant", "That is")), add_end_tokens=False)
    assert tokens[: len(prompt)] == prompt
    assert tokenizer.decode(tokens[len(prompt) :]) == "That is"


@pytest.mark.parametrize("family", BUILDERS)
def test_a_long_conversation_is_cut_and_ends_out_of_the_loss(family, ours):
    messages = conversation(("user", "What is 12 plus 30?"), ("assistant", "12 plus 30 is 42." * 9))
    tokens, mask = ours(family).tokenize_messages(messages)
    cut_tokens, cut_mask = ours(family, max_seq_len=30).tokenize_messages(messages)
    end = ours(family).special_tokens[MESSAGE_END.get(family, "<|im_end|>")]
    assert (cut_tokens, cut_mask) == ([*tokens[:29], end], [*mask[:29], True])
    open_tokens, _ = ours(family, max_seq_len=30).tokenize_messages(messages[:1], add_end_tokens=False)
    assert open_tokens == ours(family).tokenize_messages(messages[:1], add_end_tokens=False)[0][:30]
    whole = ours(family, max_seq_len=len(tokens))
    assert whole.tokenize_messages(messages) == (tokens, mask)


@pytest.mark.parametrize("family", BUILDERS)
def test_plain_text_and_the_ids_that_torchtune_asks_for(family, ours, theirs):
    tokenizer, template = ours(family), theirs(family)
    names = {
        "gemma2": ("<bos>", "<eos>", "<pad>", ["<end_of_turn>", "<eos>"]),
        "phi4": (None, "<|im_end|>", "<|dummy_85|>", ["<|im_end|>", "<|endoftext|>"]),
        "mistral": ("<s>", "</s>", "<unk>", ["</s>"]),
    }
    bos, eos, pad, stops = names.get(family, (None, "<|im_end|>", "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"]))
    id_of = template.convert_tokens_to_ids
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (bos and id_of(bos), id_of(eos), id_of(pad))
    assert tokenizer.stop_tokens == [id_of(token) for token in stops]
    assert tokenizer.vocab_size == len(template)

    plain = template("12 é", add_special_tokens=False)["input_ids"]
    begin = [] if bos is None else [tokenizer.bos_id]
    assert tokenizer.encode("12 é") == [*begin, *plain, tokenizer.eos_id]
    assert tokenizer.encode("12 é", add_bos=False, add_eos=False) == plain
    assert tokenizer.decode([*begin, *plain, tokenizer.eos_id]) == "12 é"
    end = id_of(MESSAGE_END.get(family, "<|im_end|>"))
    for stop in (tokenizer.eos_id, end):
        assert tokenizer.decode([*plain, stop, *plain, end], truncate_at_eos=True) == "12 é"


@pytest.mark.parametrize("family", BUILDERS)
def test_torchtune_builds_it_and_its_datasets_take_it(family, folder, tmp_path):
    from omegaconf import OmegaConf
    from torchtune import config
    from torchtune.datasets import chat_dataset, instruct_dataset, preference_dataset

    builder = BUILDERS[family]
    section = {
        "_component_": f"gmt_tune.models.{family}.{builder.__name__}",
        "path": str(folder / family / "tokenizer.json"),
        "max_seq_len": 128,
    }
    tokenizer = config.instantiate(OmegaConf.create(section))
    assert pickle.loads(pickle.dumps(tokenizer)).max_seq_len == 128  # a loader's workers have it so

    chat = [{"role": "user", "content": "1 + 1?"}]
    rows = {
        "instruct": {"input": "1 + 1?", "output": "2"},
        "chat": {"messages": [*chat, {"role": "assistant", "content": "2"}]},
        "pairs": {name: [*chat, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")},
    }
    keys = {}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        keys[name] = {"source": "json", "data_files": str(tmp_path / f"{name}.jsonl"), "split": "train"}
    openai = {"conversation_column": "messages", "conversation_style": "openai"}
    dpo = preference_dataset(tokenizer, **keys["pairs"])[0]
    found = [
        instruct_dataset(tokenizer, **keys["instruct"])[0]["labels"],
        chat_dataset(tokenizer, **openai, **keys["chat"])[0]["labels"],
        dpo["chosen_labels"],
        dpo["rejected_labels"],
    ]
    texts = [tokenizer.decode([label for label in labels if label != -100], False, False) for labels in found]
    end = MESSAGE_END.get(family, "<|im_end|>")
    assert texts == [f"2{end}", f"2{end}", f"chosen{end}", f"rejected{end}"]


@pytest.mark.parametrize("family", BUILDERS)
def test_what_the_template_does_not_take_is_refused(family, ours):
    tokenizer = ours(family)
    tool = [("user", "a"), ("ipython", "b"), ("assistant", "c")]
    with pytest.raises(ValueError, match="message 1 has the role ipython: write what a tool returned as a user"):
        tokenizer.tokenize_messages(conversation(*tool))
    twice = conversation(("user", "a"), ("user", "b"), ("assistant", "c"))
    if family in ALTERNATE:
        with pytest.raises(ValueError, match="message 1 has the role user, not assistant: join messages of the same"):
            tokenizer.tokenize_messages(twice)
        with pytest.raises(ValueError, match="message 0 has the role assistant, not user"):
            tokenizer.tokenize_messages(conversation(("assistant", "a")), add_end_tokens=False)
    else:
        tokenizer.tokenize_messages(twice)


def test_a_file_of_another_family_is_refused(folder):
    with pytest.raises(
        ValueError, match=r"no special token <start_of_turn>, <bos>, .*: Gemma 2 needs <start_of_turn>, .* and <pad>"
    ):
        gemma2_tokenizer(str(folder / "qwen3" / "tokenizer.json"))


def test_gemma_data_with_system_messages_is_refused_before_training(folder, tmp_path):
    from omegaconf import OmegaConf

    from gmt_tune.errors import UserError
    from gmt_tune.integrations.torchtune.run.data import build_dataset

    messages = as_dicts([("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2")])
    rows = [{"messages": messages[1:]}, {"messages": messages}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {
        "_component_": "torchtune.datasets.chat_dataset",
        "conversation_column": "messages",
        "conversation_style": "openai",
        "source": "json",
        "data_files": str(tmp_path / "rows.jsonl"),
        "split": "train",
    }
    tokenizer = gemma2_tokenizer(str(folder / "gemma2" / "tokenizer.json"))
    fault = "Gemma 2 takes messages of user and assistant alone, but message 0 has the role system: put its text at"
    with pytest.raises(UserError, match=rf"^row 1 of dataset .*: {fault} the beginning of the user's first message"):
        build_dataset(OmegaConf.create(section), tokenizer)


def test_qwen2_5_has_its_default_system_message_or_another(ours):
    def text(**kwargs):
        tokenizer = ours("qwen2_5", **kwargs)
        tokens, _ = tokenizer.tokenize_messages(conversation(("user", "a")))
        return tokenizer.decode(tokens, skip_special_tokens=False)

    user = "<|im_start|>user\na<|im_end|>\n"
    assert text().startswith("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.")
    assert text(system_prompt="Be brief.") == f"<|im_start|>system\nBe brief.<|im_end|>\n{user}"
    assert text(system_prompt=None) == user


THOUGHT = "<think>\nAdd them.\n</think>\n\n"


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["42"], "42<|im_end|>"),  # the empty marks are the prompt's
        ([f"{THOUGHT}42"], f"{THOUGHT}42<|im_end|>"),
        (["<think>\n\n</think>\n\n42"], "42<|im_end|>"),
        (["<think>\n\n\nAdd them.</think>42"], f"{THOUGHT}42<|im_end|>"),
        ([f"{THOUGHT}41", f"{THOUGHT}42"], f"41<|im_end|>{THOUGHT}42<|im_end|>"),  # earlier reasoning is gone
        ([f"{THOUGHT}41", "42"], "41<|im_end|>42<|im_end|>"),
    ],
)
@pytest.mark.parametrize("enable_thinking", [True, False])
def test_qwen3_learns_reasoning_but_no_empty_marks(enable_thinking, answers, expected, ours):
    tokenizer = ours("qwen3", enable_thinking=enable_thinking)
    messages = conversation(*[turn for answer in answers for turn in (("user", "q"), ("assistant", answer))])
    tokens, mask = tokenizer.tokenize_messages(messages)
    assert learnt(tokenizer, tokens, mask) == expected


def test_qwen3_keeps_reasoning_before_a_tools_answer(ours):
    call, answer = "<tool_call>\n{}\n</tool_call>", f"{THOUGHT}42"
    tokenizer = ours("qwen3")
    turns = [("user", "q"), ("assistant", THOUGHT + call), ("user", "<tool_response>\n42\n</tool_response>")]
    tokens, mask = tokenizer.tokenize_messages(conversation(*turns, ("assistant", answer)))
    assert learnt(tokenizer, tokens, mask) == f"{THOUGHT}{call}<|im_end|>{answer}<|im_end|>"


def test_mistrals_system_message_stands_in_the_last_question_with_and_without_its_answer(ours, theirs):
    tokenizer, template = ours("mistral"), theirs("mistral")
    compared = 0
    for pairs in random_conversations("mistral", 200):
        if (pairs[0][0], pairs[-1][0]) != ("system", "assistant"):
            continue
        prompt = template.apply_chat_template(as_dicts(pairs[:-1]), return_dict=False)
        begin, _ = tokenizer.tokenize_messages(conversation(*pairs[:-1]), add_end_tokens=False)
        tokens, mask = tokenizer.tokenize_messages(conversation(*pairs))
        answer = template(f" {pairs[-1][1].strip()}</s>", add_special_tokens=False)["input_ids"]
        assert begin == prompt and tokens[: len(prompt)] == prompt
        assert template.decode(tokens[len(prompt) :]) == template.decode(answer)
        assert not any(mask[len(prompt) :])
        compared += 1
    assert compared > 20


def test_phi4s_special_tokens_take_white_space_that_is_not_learnt_with_them(ours):
    tokenizer = ours("phi4")
    tokens, mask = tokenizer.tokenize_messages(conversation(("user", "q"), ("assistant", "\n  a \n")))
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    assert text == "<|im_start|>user<|im_sep|>q<|im_end|><|im_start|>assistant<|im_sep|>a<|im_end|>"
    assert learnt(tokenizer, tokens, mask) == "a<|im_end|>"


def test_a_message_learnt_or_not_says_so_itself(ours):
    from torchtune.data import Message

    messages = [
        Message(role="system", content="Be brief.", masked=False),
        Message(role="user", content="What?", masked=False),
        Message(role="assistant", content="x", masked=True),
    ]
    texts = {
        "qwen2_5": "Be brief.<|im_end|>What?<|im_end|>",
        "qwen3": "Be brief.<|im_end|>What?<|im_end|>",
        "phi4": "Be brief.<|im_end|>What?<|im_end|>",
        "mistral": "Be brief.\n\nWhat?[/INST]",
    }
    found = {family: learnt(ours(family), *ours(family).tokenize_messages(messages)) for family in texts}
    assert found == texts
