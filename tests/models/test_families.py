"""Of every family with configs, our model computes what transformers computes from the same folder, and back."""

import json
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import FAMILIES, LENGTH, VOCABULARY, some_tokens
from torchtune.data import padded_collate_sft

from gmt_tune.integrations.torchtune.checkpoint.model import write_model, writes_one_by_one

# In float32, and of logits up to about 30.
TOLERANCE = {"rtol": 0, "atol": 1e-4}


# Parameters of the releases, a tied output layer counted once
PUBLISHED = {
    "gmt_tune.models.qwen3.qwen3_0_6b": 596_049_920,
    "gmt_tune.models.qwen3.qwen3_1_7b": 1_720_574_976,
    "gmt_tune.models.qwen3.qwen3_4b": 4_022_468_096,
    "gmt_tune.models.qwen3.qwen3_8b": 8_190_735_360,
    "gmt_tune.models.qwen3.qwen3_14b": 14_768_307_200,
    "gmt_tune.models.qwen3.qwen3_32b": 32_762_123_264,
    "gmt_tune.models.gemma2.gemma2_2b": 2_614_341_888,
    "gmt_tune.models.gemma2.gemma2_9b": 9_241_705_984,
    "gmt_tune.models.gemma2.gemma2_27b": 27_227_128_320,
    "gmt_tune.models.phi4.phi4_14b": 14_659_507_200,
    "gmt_tune.models.mistral.mistral_7b_v0_3": 7_248_023_552,
    "torchtune.models.qwen2_5.qwen2_5_0_5b": 494_032_768,
    "torchtune.models.qwen2_5.qwen2_5_1_5b_instruct": 1_543_714_304,
    "torchtune.models.qwen2_5.qwen2_5_3b": 3_085_938_688,
    "torchtune.models.qwen2_5.qwen2_5_7b_instruct": 7_615_616_512,
    "torchtune.models.qwen2_5.qwen2_5_14b_instruct": 14_770_033_664,
    "torchtune.models.qwen2_5.qwen2_5_32b_instruct": 32_763_876_352,
}


@pytest.mark.parametrize("builder", PUBLISHED)
def test_builders_have_as_many_parameters_as_the_releases(builder):
    module, _, name = builder.rpartition(".")
    build = getattr(import_module(module), name)
    with torch.device("meta"):
        model = build()
        if module.startswith("gmt_tune"):
            assert build(max_seq_len=128).max_seq_len == 128
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[builder]


OLDER = ("llama2", "llama3", "llama3_1", "llama3_2", "mistral")  # their tests are slow ones


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.slow if name in OLDER else ())
        for name in FAMILIES
        if name != "llama3_3"  # which is llama3_1
    ],
)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def theirs(family):
    return family.hf()


@pytest.fixture(scope="module")
def folder(family, theirs, tmp_path_factory):
    made = tmp_path_factory.mktemp("model") / "hf"
    theirs.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def ours(family, folder, tmp_path_factory):
    return family.load(folder, tmp_path_factory.mktemp("out"))


@torch.no_grad()
def test_logits_are_equal(ours, theirs):
    tokens = some_tokens()
    logits = theirs(tokens).logits
    assert 2 < logits.abs().max() < 60
    torch.testing.assert_close(ours(tokens), logits, **TOLERANCE)


@torch.no_grad()
def test_logits_are_equal_with_padding(ours, theirs):
    """As the recipe pads rows: on the right, with no mask, for nothing looks there; transformers gets a mask."""
    lengths = [LENGTH, 9, 1]
    rows = [{"tokens": some_tokens(1, n)[0].tolist(), "labels": [0] * n} for n in lengths]
    batch = padded_collate_sft(rows, padding_idx=0)
    is_token = torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(1)
    logits = theirs(batch["tokens"], attention_mask=is_token.long()).logits
    torch.testing.assert_close(ours(batch["tokens"])[is_token], logits[is_token], **TOLERANCE)
    # With padding in front and a mask that says so, as torchtune's generation has it
    tokens, is_token = batch["tokens"].flip(1), is_token.flip(1)
    positions = (is_token.cumsum(1) - 1).clamp(min=0)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & is_token.unsqueeze(1)
    mask |= torch.eye(LENGTH, dtype=torch.bool)  # padding sees itself
    logits = theirs(tokens, attention_mask=is_token.long(), position_ids=positions).logits
    torch.testing.assert_close(ours(tokens, mask=mask, input_pos=positions)[is_token], logits[is_token], **TOLERANCE)


@torch.no_grad()
def test_logits_of_packed_rows_are_those_of_each_row_by_itself(ours, theirs):
    lengths = [11, 8, 5]
    tokens = some_tokens(1)
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    mask = (document.unsqueeze(0) == document.unsqueeze(1)).tril().unsqueeze(0)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    packed = ours(tokens, mask=mask, input_pos=positions)
    apart = torch.cat([theirs(row).logits for row in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, apart, **TOLERANCE)


def test_gradients_are_equal(family, theirs, folder, tmp_path):
    ours, tokens = family.load(folder, tmp_path / "out"), some_tokens()
    theirs.zero_grad()
    for logits in (ours(tokens), theirs(tokens).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    reader = family.reader(folder, tmp_path / "out")
    reader.load_checkpoint()
    reader._output_dir = tmp_path
    reader.save_checkpoint({"model": gradients}, epoch=0)  # by their names and in their layout
    (file,) = (tmp_path / "epoch_0").glob("*.safetensors")
    found = load_file(file)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 + 1e-4 * float(gradient.abs().max()))


def test_what_is_saved_loads_in_transformers_with_the_same_logits(family, theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="40kB")
    files = {file.name for file in (tmp_path / "hf").glob("*.safetensors")}
    assert len(files) > 1
    reader = family.reader(tmp_path / "hf", tmp_path / "out")
    ours = family.build()
    ours.load_state_dict(reader.load_checkpoint()["model"])
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.05 * torch.randn_like(p))  # as training changes them
    assert writes_one_by_one(reader)
    (tmp_path / "saved").mkdir()
    write_model(reader, ours.state_dict(), tmp_path / "saved", tmp_path / "hf")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == len(files)
    loaded, info = type(theirs).from_pretrained(
        tmp_path / "saved", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = some_tokens()
    with torch.no_grad():
        trained = ours(tokens)
        torch.testing.assert_close(loaded.eval()(tokens).logits, trained, **TOLERANCE)
        assert not torch.allclose(theirs(tokens).logits, trained, atol=0.01)
        torch.testing.assert_close(family.load(tmp_path / "saved", tmp_path / "out")(tokens), trained)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["vocab_size"] == VOCABULARY
