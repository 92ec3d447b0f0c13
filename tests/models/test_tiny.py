"""The quickstart's base model is an ordinary Hugging Face folder, the same in torchtune and in transformers."""

import pytest
import torch

from gmt_tune.data.village import corpus, people, questions
from gmt_tune.integrations.torchtune.plugin.assets import ASSETS, asset
from gmt_tune.models.chatml import ChatMLTokenizer
from gmt_tune.models.tiny import tiny_llama


@pytest.fixture(scope="module")
def tokenizer():
    return ChatMLTokenizer(asset("quickstart/tokenizer.json"))


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    from torchtune.training import FullModelHFCheckpointer

    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=asset("quickstart"),
        checkpoint_files=["model.safetensors"],
        model_type="LLAMA3_2",
        output_dir=str(tmp_path_factory.mktemp("out")),
    )
    model = tiny_llama()
    model.load_state_dict(checkpointer.load_checkpoint()["model"])
    return model.eval()


@pytest.fixture(scope="module")
def theirs():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(asset("quickstart"))


def test_logits_equal_those_of_transformers(ours, theirs):
    assert theirs.dtype == torch.float32
    # The whole context: other rotary embeddings would differ at large positions
    tokens = torch.randint(0, 832, (2, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_chat_template_writes_the_tokens_that_training_sees(tokenizer):
    from torchtune.data import Message
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(asset("quickstart"))
    question = questions("held_out")[0]
    user = [{"role": "user", "content": question.prompt}]
    whole = [*user, {"role": "assistant", "content": question.answer}]

    def encoded(messages, **keys):
        return theirs(theirs.apply_chat_template(messages, tokenize=False, **keys))["input_ids"]

    def as_messages(dialogue):
        return [Message(role=turn["role"], content=turn["content"]) for turn in dialogue]

    assert encoded(whole) == tokenizer.tokenize_messages(as_messages(whole))[0]
    asked = tokenizer.tokenize_messages(as_messages(user), add_end_tokens=False)[0]
    assert encoded(user, add_generation_prompt=True) == asked
    assert theirs.eos_token_id == tokenizer.eos_id and theirs.pad_token_id == tokenizer.pad_id


def test_any_text_survives_the_tokenizer(tokenizer):
    text = "Ünïcode, 123 – and\n\ttabs 🙂"
    assert tokenizer.decode(tokenizer.encode(text, add_eos=False)) == text


def test_every_name_and_every_fact_is_one_token(tokenizer):
    village = people()
    words = {*village, *(value for known in village.values() for value in known.values())}
    assert all(len(tokenizer.encode(f" {word}", add_eos=False)) == 1 for word in words)


def test_has_read_about_everyone(ours, tokenizer):
    """The facts of the held-out people too: otherwise no fine-tuning could bring them out."""
    right = total = 0
    documents = corpus(96, seed=7)
    for document in documents:
        tokens = torch.tensor([[tokenizer.pad_id, *tokenizer.encode(document, add_eos=False)]])
        with torch.no_grad():
            predicted = ours(tokens)[0, :-1].argmax(dim=-1)
        (known,) = (known for name, known in people().items() if f" {name}" in document)
        facts = {tokenizer.encode(f" {value}", add_eos=False)[0] for value in known.values()}
        for wanted, found in zip(tokens[0, 1:].tolist(), predicted.tolist(), strict=True):
            if wanted in facts:
                total += 1
                right += wanted == found
    assert total >= 4 * len(documents)
    assert right / total > 0.98


def test_package_stays_small():
    assert sum(file.stat().st_size for file in (ASSETS / "quickstart").iterdir()) < 3 * 2**20
