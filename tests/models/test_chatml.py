"""ChatMLTokenizer: the ids of the Hugging Face chat template, and a loss on the answers alone."""

import json
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_gguf import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_tokenizer

from gmt_tune.models.chatml import ChatMLTokenizer
from gmt_tune.models.smollm2 import smollm2_tokenizer

END_OF_TEXT, IM_START, IM_END = SPECIAL_TOKENS


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tiny_tokenizer().save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def hf_tokenizer(path):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=path, chat_template=CHAT_TEMPLATE, eos_token=IM_END, pad_token=IM_END, bos_token=IM_START
    )


def conversation(*pairs):
    """torchtune messages from (role, content); only the assistant's are in the loss."""
    from torchtune.data import Message

    return [Message(role=role, content=content, masked=role != "assistant") for role, content in pairs]


def as_dicts(messages):
    return [{"role": message.role, "content": message.text_content} for message in messages]


# Text that makes boundaries hard: white space that merges with the header's line break, bytes of which several
# make a character, and special tokens spelled out by a user.
content = st.lists(
    st.sampled_from(["\n", "\n\n", " ", "  ", "\t", "What", " is", "12", " 30?", "é", "→", "🙂", IM_END, IM_START])
    | st.text(max_size=4),
    max_size=8,
).map("".join)
messages_strategy = st.tuples(
    st.lists(content.map(lambda text: ("system", text)), max_size=1),
    st.lists(st.tuples(content, content), min_size=1, max_size=3),
).map(lambda parts: [*parts[0], *[turn for q, a in parts[1] for turn in (("user", q), ("assistant", a))]])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=messages_strategy)
def test_ids_equal_the_chat_template_of_transformers(path, hf_tokenizer, pairs):
    messages = conversation(*pairs)
    tokens, mask = smollm2_tokenizer(path).tokenize_messages(messages)
    assert tokens == hf_tokenizer.apply_chat_template(as_dicts(messages), return_dict=False)
    assert len(mask) == len(tokens)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=messages_strategy)
def test_prompt_ids_equal_the_chat_template_with_a_generation_prompt(path, hf_tokenizer, pairs):
    question = conversation(*pairs)[:-1]
    expected = hf_tokenizer.apply_chat_template(as_dicts(question), add_generation_prompt=True, return_dict=False)
    tokenizer = smollm2_tokenizer(path)
    assert tokenizer({"messages": question}, inference=True)["tokens"] == expected
    # As torchtune's generation recipe asks: with an empty answer at the end
    assert tokenizer({"messages": [*question, *conversation(("assistant", ""))]}, inference=True)["tokens"] == expected


def test_a_begun_answer_is_left_open(path):
    tokenizer = ChatMLTokenizer(path)
    tokens, _ = tokenizer.tokenize_messages(
        conversation(("user", "What?"), ("assistant", "That is")), add_end_tokens=False
    )
    assert tokenizer.decode(tokens, skip_special_tokens=False).endswith(f"{IM_START}assistant\nThat is")


def test_loss_is_on_answers_and_their_end_alone(path):
    tokenizer = smollm2_tokenizer(path)
    sample = tokenizer(
        {"messages": conversation(("user", "a"), ("assistant", "é 12"), ("user", "b"), ("assistant", "c"))}
    )
    assert "messages" not in sample
    kept = [token for token, masked in zip(sample["tokens"], sample["mask"], strict=True) if not masked]
    assert tokenizer.decode(kept, skip_special_tokens=False) == f"é 12{IM_END}c{IM_END}"


def test_messages_say_themselves_whether_they_are_masked(path):
    from torchtune.data import Message

    tokenizer = ChatMLTokenizer(path)
    messages = [
        Message(role="user", content="What?", masked=False),
        Message(role="assistant", content="x", masked=True),
    ]
    tokens, mask = tokenizer.tokenize_messages(messages)
    kept = [token for token, masked in zip(tokens, mask, strict=True) if not masked]
    assert tokenizer.decode(kept, skip_special_tokens=False) == f"What?{IM_END}"


def test_a_token_across_header_and_answer_is_in_the_loss(path):
    tokenizer = ChatMLTokenizer(path)
    tokens, mask = tokenizer.tokenize_messages(conversation(("assistant", "\n")))
    across = tokenizer.encode("\n\n", add_eos=False)
    assert len(across) == 1, "the tiny tokenizer merges two line breaks"
    kept = [token for token, masked in zip(tokens, mask, strict=True) if not masked]
    assert kept == [*across, tokenizer.eos_id]


def test_default_system_message_is_smollm2s_and_can_be_changed(path):
    def text(**kwargs):
        tokenizer = smollm2_tokenizer(path, **kwargs)
        tokens, _ = tokenizer.tokenize_messages(conversation(("user", "a")))
        return tokenizer.decode(tokens, skip_special_tokens=False)

    user = f"{IM_START}user\na{IM_END}\n"
    assert text().startswith(f"{IM_START}system\nYou are a helpful AI assistant named SmolLM")
    assert text(system_prompt="Be brief.") == f"{IM_START}system\nBe brief.{IM_END}\n{user}"
    assert text(system_prompt=None) == user


def test_a_long_conversation_is_cut_and_ends_out_of_the_loss(path):
    messages = conversation(("user", "What is 12 plus 30?"), ("assistant", "12 plus 30 is 42." * 9))
    tokens, mask = ChatMLTokenizer(path).tokenize_messages(messages)
    cut_tokens, cut_mask = ChatMLTokenizer(path, max_seq_len=30).tokenize_messages(messages)
    assert cut_tokens == [*tokens[:29], ChatMLTokenizer(path).eos_id]
    assert cut_mask == [*mask[:29], True]
    open_tokens, _ = ChatMLTokenizer(path, max_seq_len=30).tokenize_messages(messages, add_end_tokens=False)
    assert open_tokens == tokens[:30]


def test_a_conversation_that_fits_is_not_changed(path):
    messages = conversation(("user", "a"), ("assistant", "b"))
    tokens, mask = ChatMLTokenizer(path).tokenize_messages(messages)
    assert ChatMLTokenizer(path, max_seq_len=len(tokens)).tokenize_messages(messages) == (tokens, mask)


def test_encode_and_decode(path):
    tokenizer = ChatMLTokenizer(path)
    assert tokenizer.encode("12 é")[-1] == tokenizer.eos_id == tokenizer.special_tokens[IM_END]
    assert tokenizer.decode(tokenizer.encode("12 é\n\n")) == "12 é\n\n"
    two = [*tokenizer.encode("a"), *tokenizer.encode("b")]
    assert tokenizer.decode(two, skip_special_tokens=False) == f"a{IM_END}b{IM_END}"
    assert tokenizer.decode(two, truncate_at_eos=True) == "a"
    assert (tokenizer.bos_id, tokenizer.pad_id) == (None, tokenizer.special_tokens[END_OF_TEXT])
    assert set(tokenizer.stop_tokens) == {tokenizer.eos_id, tokenizer.pad_id}
    assert tokenizer.vocab_size == tiny_tokenizer().get_vocab_size()


def test_lengths_saved_in_the_file_do_not_apply(path, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    messages = conversation(("user", "What is 12 plus 30?"))
    saved = ChatMLTokenizer(str(tmp_path / "tokenizer.json")).tokenize_messages(messages)
    assert saved == ChatMLTokenizer(path).tokenize_messages(messages)


POST_PROCESSORS = {
    "GPT-2": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "RoBERTa": {
        "type": "RobertaProcessing",
        "sep": [IM_END, 2],
        "cls": [IM_START, 1],
        "trim_offsets": True,
        "add_prefix_space": False,
    },
}
POST_PROCESSORS["a sequence, as Llama 3 has"] = {"type": "Sequence", "processors": [POST_PROCESSORS["GPT-2"]]}


@pytest.mark.parametrize("answer", ["def f():\n    return 1\n\n    x = 2", "  indented", "a  b\n\n", " \t", "é  🙂 "])
@pytest.mark.parametrize("model", POST_PROCESSORS)
def test_white_space_of_an_answer_is_in_the_loss_whatever_trims_offsets(model, answer, path, tmp_path):
    saved = json.loads(tiny_tokenizer().to_str())
    saved["post_processor"] = POST_PROCESSORS[model]
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer = ChatMLTokenizer(str(tmp_path / "tokenizer.json"))
    messages = conversation(("user", " q "), ("assistant", answer))
    tokens, mask = tokenizer.tokenize_messages(messages)
    kept = [token for token, masked in zip(tokens, mask, strict=True) if not masked]
    # A line break of the header may share a token with the answer's beginning
    assert tokenizer.decode(kept, skip_special_tokens=False).removeprefix("\n") == answer + IM_END
    assert (tokens, mask) == ChatMLTokenizer(path).tokenize_messages(messages)


def test_workers_can_have_it(path):
    messages = conversation(("user", "a"), ("assistant", "b"))
    tokenizer = ChatMLTokenizer(path, max_seq_len=9)
    assert pickle.loads(pickle.dumps(tokenizer)).tokenize_messages(messages) == tokenizer.tokenize_messages(messages)


def test_torchtune_datasets_take_it(path, tmp_path):
    from torchtune.datasets import instruct_dataset, preference_dataset

    rows = [{"question": "What is 1 plus 1?", "answer": "2"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = ChatMLTokenizer(path, max_seq_len=64)
    sft = instruct_dataset(
        tokenizer,
        source="json",
        data_files=str(tmp_path / "train.jsonl"),
        column_map={"input": "question", "output": "answer"},
    )[0]
    labels = [label for label in sft["labels"] if label != -100]
    assert tokenizer.decode(labels, skip_special_tokens=False) == f"2{IM_END}"

    chat = [{"role": "user", "content": "1 + 1?"}]
    pair = {which: [*chat, {"role": "assistant", "content": which}] for which in ("chosen", "rejected")}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    dpo = preference_dataset(tokenizer, source="json", data_files=str(tmp_path / "pairs.jsonl"))[0]
    labels = [label for label in dpo["rejected_labels"] if label != -100]
    assert tokenizer.decode(labels, skip_special_tokens=False) == f"rejected{IM_END}"


def test_torchtune_config_builds_it(path):
    from omegaconf import OmegaConf
    from torchtune import config

    section = {"_component_": "gmt_tune.models.smollm2.smollm2_tokenizer", "path": path, "max_seq_len": 8}
    tokenizer = config.instantiate(OmegaConf.create(section))
    assert isinstance(tokenizer, ChatMLTokenizer) and tokenizer.max_seq_len == 8


def test_bad_files_and_lengths_are_named(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.json does not exist"):
        ChatMLTokenizer(str(tmp_path / "nowhere.json"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json is not a Hugging Face tokenizer.json"):
        ChatMLTokenizer(str(tmp_path / "config.json"))
    plain = json.loads(tiny_tokenizer().to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["content"] == END_OF_TEXT]
    (tmp_path / "gpt2.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"gpt2.json has no special token <\|im_start\|>, <\|im_end\|>"):
        ChatMLTokenizer(str(tmp_path / "gpt2.json"))
    with pytest.raises(ValueError, match="max_seq_len is 0"):
        ChatMLTokenizer(path, max_seq_len=0)


def test_content_that_is_not_text_is_refused(path):
    from torchtune.data import Message

    message = Message(role="user", content=[{"type": "image", "content": None}])
    with pytest.raises(ValueError, match="content of type image, but ChatML takes only text"):
        ChatMLTokenizer(path).tokenize_messages([message])
