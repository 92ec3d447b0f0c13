"""What the harness measures equals what an independent computation gives."""

import math

import pytest
import torch

from benchmarks.quality import evaluation
from benchmarks.quality.statistics import estimate, paired_difference, t95
from gmt_tune.data import ExactMatch
from gmt_tune.integrations.torchtune.plugin.assets import asset
from gmt_tune.models.chatml import ChatMLTokenizer


@pytest.fixture(scope="module")
def model():
    return evaluation.load_model(asset("quickstart"), "cpu", torch.float32)


@pytest.fixture(scope="module")
def torchtune_model():
    from safetensors.torch import load_file
    from torchtune.models.convert_weights import hf_to_tune

    from gmt_tune.models.tiny import EMBED_DIM, NUM_HEADS, tiny_llama

    weights = load_file(f"{asset('quickstart')}/model.safetensors")
    model = tiny_llama()
    weights = hf_to_tune(weights, num_heads=NUM_HEADS, num_kv_heads=NUM_HEADS, dim=EMBED_DIM)
    weights.pop("output.weight", None)
    model.load_state_dict(weights)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return ChatMLTokenizer(f"{asset('quickstart')}/tokenizer.json", max_seq_len=128)


def test_answer_loss_is_the_mean_over_the_tokens_that_training_sees(model, torchtune_model, tokenizer):
    from torchtune.data import Message

    rows = [("Where does Mimir live?", "The home of Mimir is in Oakheath."), ("Name the food of Mimir.", "Soup.")]
    losses = []
    for prompt, answer in rows:
        messages = [Message(role="user", content=prompt, masked=True), Message(role="assistant", content=answer)]
        tokens, masked = tokenizer.tokenize_messages(messages)
        with torch.no_grad():
            log_probs = torchtune_model(torch.tensor([tokens])).log_softmax(-1)[0]
        losses += [-log_probs[i - 1, tokens[i]].item() for i in range(1, len(tokens)) if not masked[i]]
    assert evaluation.answer_loss(model, tokenizer, rows, 2) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_text_loss_reads_windows_by_themselves(model, torchtune_model, tokenizer):
    text = "The home of Mimir is in Oakheath. In summer Mimir works as a potter. Above all Mimir likes soup."
    tokens = tokenizer.encode(text, add_eos=False)
    losses = []
    for start in (0, 8):
        window = tokens[start : start + 8]
        with torch.no_grad():
            log_probs = torchtune_model(torch.tensor([window])).log_softmax(-1)[0]
        losses += [-log_probs[i - 1, window[i]].item() for i in range(1, 8)]
    measured = evaluation.text_loss(model, tokenizer, " ".join([text]), windows=99, window=8, batch_size=3)
    whole = len(tokens) // 8
    assert whole >= 2
    first_two = evaluation.text_loss(
        model, tokenizer, tokenizer.decode(tokens[:16]), windows=99, window=8, batch_size=1
    )
    assert first_two == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert math.isfinite(measured)


def test_cached_generation_answers_as_generation_without_a_cache(model, torchtune_model, tokenizer):
    options = {"size": 24, "max_new_tokens": 6, "batch_size": 10}
    assert evaluation.CachedExactMatch(tokenizer, **options).answers(model) == ExactMatch(tokenizer, **options).answers(
        torchtune_model
    )


def test_numbers_compare_without_separators(tokenizer):
    asked = evaluation.CachedExactMatch(tokenizer, size=1)
    asked._extract = evaluation.ExactMatch(
        tokenizer, data_files=None, size=1
    )._extract  # None: answers are compared whole
    assert asked._extracted(" 1,200. ") == "1,200."
    import re

    asked._extract = re.compile(r"####\s*(-?[\d.,]+)")
    assert asked._extracted("so\n#### 7\n#### 1,200.") == "1200"
    assert asked._extracted("no number") is None


def test_weight_change_counts_in_fp32_what_bf16_would_round_away(tmp_path):
    from safetensors.torch import save_file

    base = {"a.weight": torch.ones(4, 4, dtype=torch.bfloat16), "b.weight": torch.zeros(3, dtype=torch.bfloat16)}
    tuned = {name: tensor.float() for name, tensor in base.items()}
    tuned["a.weight"][0, :3] += 1e-5
    for folder, weights in (("base", base), ("tuned", tuned)):
        (tmp_path / folder).mkdir()
        save_file(weights, tmp_path / folder / "model.safetensors")
    change = evaluation.weight_change(tmp_path / "base", tmp_path / "tuned")
    assert change["entries"] == 19
    assert change["fraction_changed"] == 3 / 19
    assert change["relative_change"] == pytest.approx(math.sqrt(3 * 1e-10 / 16), rel=1e-2)


@pytest.mark.parametrize("degrees", [1, 2, 5, 9, 30])
def test_quantiles_of_students_t_hold_95_percent(degrees):
    def density(x):
        scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
        return scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)

    x = torch.linspace(-t95(degrees), t95(degrees), 20_001, dtype=torch.float64)
    inside = torch.trapezoid(torch.tensor([density(value) for value in x.tolist()], dtype=torch.float64), x)
    assert inside.item() == pytest.approx(0.95, abs=1e-4)


def test_differences_are_paired_by_seed():
    baseline = {0: 1.0, 1: 2.0, 2: 3.0, 9: 100.0}
    found = paired_difference({0: 0.9, 1: 1.9, 2: 2.9, 7: -50.0}, baseline)
    assert (found.count, found.mean) == (3, pytest.approx(-0.1))
    assert found.half_width == pytest.approx(0, abs=1e-12)
    known = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (known.mean, known.sd, known.half_width) == (
        3.0,
        pytest.approx(1.5811, abs=1e-4),
        pytest.approx(1.963, abs=1e-3),
    )
    assert estimate([0.3]) == (0.3, None, None, 1) and not estimate([0.3]).differs_from_zero
    assert estimate([0.25, 0.25]) == (0.25, 0.0, None, 2) and not estimate([0.25, 0.25]).differs_from_zero


def test_torchtunes_merge_of_adapters_leaves_the_model_that_trains_on_alone():
    from torchtune.modules.peft import get_merged_lora_ckpt

    from benchmarks.quality.models import lora_tiny_llama

    torch.manual_seed(0)
    model = lora_tiny_llama(["q_proj"], lora_rank=2, lora_alpha=4)
    layer = model.layers[1].attn.q_proj
    torch.nn.init.normal_(layer.lora_b.weight)
    before = layer.weight.detach().clone()
    merged = get_merged_lora_ckpt({k: v.cpu() for k, v in model.state_dict().items()}, rank=2, alpha=4)
    assert torch.equal(layer.weight, before)
    added = 2 * layer.lora_b.weight.detach() @ layer.lora_a.weight.detach()
    assert torch.allclose(merged["layers.1.attn.q_proj.weight"], before + added)


@pytest.mark.parametrize("ignored", [0.9, 0.0])
def test_loss_of_answers_alone_is_the_loss_with_the_same_gradients(ignored):
    from benchmarks.quality.models import AnswerLoss
    from gmt_tune.models.losses import LinearCrossEntropyLoss
    from gmt_tune.models.tiny import tiny_llama

    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 50, (2, 2, 24))
    labels[torch.rand(labels.shape) < ignored] = -100
    found = []
    for kind in (LinearCrossEntropyLoss, AnswerLoss):
        torch.manual_seed(1)
        model, loss_fn = tiny_llama(), kind(num_chunks=1)
        loss_fn.attach_(model)
        model.set_num_output_chunks(0)
        with loss_fn.of(labels):
            loss = model(tokens)
        loss.backward()
        found.append((loss.detach(), *(p.grad for p in model.parameters())))
    assert (labels != -100).any()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
