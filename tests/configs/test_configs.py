"""Every config is well-formed, is what the script writes, and trains on a tiny model of its family."""

import math
import re

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from slow_cases import slow_where
from tiny_families import FAMILIES

from gmt_tune.integrations.torchtune.plugin.assets import register_resolver
from gmt_tune.integrations.torchtune.plugin.registry import config_paths, recipe_of

ALL = config_paths()
REMEDY = "run `python scripts/make_configs.py`"
NEWER = ("gemma2", "mistral_v0_3", "phi4", "qwen2_5", "qwen3")  # have every kind of config in every size
FULL_SIZE = [n for n in ALL if n.partition("/")[0] in FAMILIES]


def _has_smaller(name: str) -> bool:
    """Whether the same config is there for a smaller model of the family: both are tried on the same tiny model."""
    return _size(name) > min(_size(other) for other in ALL if _kind(other) == _kind(name))


def _size(name: str) -> float:
    return float(name.partition("/")[2].partition("B")[0])


def _kind(name: str) -> tuple[str, str]:
    """Family and variant of a config: ``("llama3_2", "_gmt_compact")``."""
    return name.partition("/")[0], name.partition("B")[2]


def _is_slow(name: str) -> bool:
    if name.endswith(("_compact", "_dpo")) and not name.startswith(("llama3_1/", "llama3_2/", "mistral/")):
        return True  # differs from these as the family's other configs do
    return _has_smaller(name) or f"{name}_single_device" in ALL


TRAINED = slow_where(_is_slow, FULL_SIZE)


@pytest.mark.parametrize("name", ALL)
def test_config_passes_tune_validate(name):
    from torchtune.config import validate

    register_resolver()  # as the package does in the `tune` command
    validate(OmegaConf.load(ALL[name]))


@pytest.mark.parametrize("name", TRAINED)
def test_config_trains_two_steps_on_a_tiny_model_of_its_family(
    name, on_tiny_model, recipe_classes, logged_metrics, tmp_path
):
    cfg = on_tiny_model(name, tmp_path / "out")
    density = cfg.gradient_mask.density
    with torch.compiler.set_stance("force_eager"):  # torchao's updates compile for 20 s a shape
        _train(recipe_classes[recipe_of(name)], cfg)
    steps = [step for step in logged_metrics(tmp_path / "out") if "loss" in step]
    assert len(steps) == 2
    for step in steps:
        # Of preferences, it begins at log 2
        assert math.isfinite(step["loss"]) and step["loss"] > (0.5 if recipe_of(name) == "gmt_full_dpo" else 1)
        # Less where a gradient is mostly zero (rows of unseen tokens), a little more where entries tie
        assert density / 4 < step["mask/density"] < density + 0.1
    assert list((tmp_path / "out").rglob("*.safetensors"))


def test_a_config_whose_norms_are_dense_freezes_whole_layers(on_tiny_model, recipe_classes, tmp_path):
    cfg = on_tiny_model("llama3_2/1B_gmt_single_device", tmp_path / "out")
    assert cfg.gradient_mask.dense == ["*norm*"]
    cfg.gradient_mask.frozen = ["layers.0.*"]
    cfg.optimizer.lr = 0.03  # enough for bf16
    with torch.compiler.set_stance("force_eager"):
        _train(recipe_classes["gmt_full_finetune"], cfg)
    before = load_file(f"{cfg.checkpointer.checkpoint_dir}/model.safetensors")
    (file,) = (tmp_path / "out").rglob("model-00001-of-00001.safetensors")
    after = load_file(file)
    same = {name for name, weight in after.items() if torch.equal(weight, before[name].to(weight.dtype))}
    assert same == {name for name in before if "layers.0." in name}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama2/13B_gmt_low_memory", "mistral/7B_gmt_low_memory"])
def test_low_bit_config_trains_with_its_update_compiled(name, on_tiny_model, recipe_classes, logged_metrics, tmp_path):
    _train(recipe_classes[recipe_of(name)], on_tiny_model(name, tmp_path / "out"))
    assert all(math.isfinite(step["loss"]) for step in logged_metrics(tmp_path / "out"))


# Tied and untied output layers, and every kind of optimizer, of each family; but no 4-bit one, whose compiled update
# fails on sharded weights of some shapes on a CPU
ON_TWO = [
    *("gemma2/2B_gmt", "gemma2/2B_gmt_compact", "gemma2/9B_gmt_dpo", "gemma2/9B_gmt_low_memory"),
    *("llama2/7B_gmt_tulu", "llama3_1/8B_gmt", "llama3_1/70B_gmt_compact", "llama3_2/3B_gmt"),
    *("mistral/7B_gmt_dpo", "mistral_v0_3/7B_gmt", "mistral_v0_3/7B_gmt_compact", "mistral_v0_3/7B_gmt_dpo"),
    *("phi4/14B_gmt", "phi4/14B_gmt_compact", "phi4/14B_gmt_low_memory"),
    *("qwen2_5/0.5B_gmt", "qwen2_5/1.5B_gmt_compact", "qwen2_5/7B_gmt_dpo"),
    *("qwen2_5/32B_gmt", "qwen2_5/32B_gmt_compact", "qwen2_5/14B_gmt_low_memory"),
    *("qwen3/0.6B_gmt", "qwen3/1.7B_gmt_compact", "qwen3/8B_gmt_dpo"),
    *("qwen3/32B_gmt", "qwen3/32B_gmt_compact", "qwen3/14B_gmt_low_memory"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_TWO)
def test_config_for_several_devices_trains_on_two(name, on_tiny_model, run_tune, logged_metrics, tmp_path):
    config = tmp_path / "config.yaml"
    OmegaConf.save(on_tiny_model(name, tmp_path / "out"), config)
    run_tune("run", "--nproc_per_node", 2, recipe_of(name), "--config", config, cwd=tmp_path)
    assert len([step for step in logged_metrics(tmp_path / "out") if "loss" in step]) == 2


@pytest.mark.parametrize("name", FULL_SIZE)
def test_config_opens_with_its_download_and_run_lines_and_comments_its_knobs(name):
    text = ALL[name].read_text()
    header = text[: text.index("output_dir:")]
    cfg = OmegaConf.load(ALL[name])
    assert re.search(rf"tune download \S+ --output-dir {cfg.checkpointer.checkpoint_dir}( .|$)", header, re.MULTILINE)
    assert re.search(rf"tune run .*{recipe_of(name)} --config {name}$", header, re.MULTILINE)
    assert "checkpointer.checkpoint_dir=<YOUR_CHECKPOINT_DIR>" in header
    assert re.search(r"Needs about \d+ GiB.*: fits cards of \d+ GB or more", header)
    assert str(cfg.tokenizer.path).startswith(str(cfg.checkpointer.checkpoint_dir))
    for key in ("density", "score", "scope", "refresh_every", "dense", "frozen", "batch_size", "max_seq_len"):
        assert re.search(rf"^ *{key}: [^#\n]+  # \w", text, re.MULTILINE), f"{key} has no comment"


@pytest.mark.parametrize("name", [n for n in ALL if "_compact" in n])
def test_compact_config_accumulates_clips_and_takes_turns(name):
    cfg = OmegaConf.load(ALL[name])
    assert cfg.optimizer._component_ == "gmt_tune.CompactAdamW"
    assert cfg.gradient_accumulation_steps > 1 and cfg.clip_grad_norm > 0
    assert cfg.gradient_mask.refresh_every > 1 and not cfg.optimizer_in_bwd


def test_every_model_has_a_config_for_several_devices_and_one_device_where_it_fits():
    sizes_of = {
        "gemma2": ["2B", "9B", "27B"],
        "llama2": ["7B", "13B", "70B"],
        "llama3": ["8B", "70B"],
        "llama3_1": ["8B", "70B"],
        "llama3_2": ["1B", "3B"],
        "llama3_3": ["70B"],
        "mistral": ["7B"],
        "mistral_v0_3": ["7B"],
        "phi4": ["14B"],
        "qwen2_5": ["0.5B", "1.5B", "3B", "7B", "14B", "32B"],
        "qwen3": ["0.6B", "1.7B", "4B", "8B", "14B", "32B"],
    }
    assert sizes_of.keys() == {name for name in FAMILIES if not name.endswith(" tied")}
    for family, size in [(family, size) for family, sizes in sizes_of.items() for size in sizes]:
        billions = float(size[:-1])
        assert f"{family}/{size}_gmt" in ALL
        assert billions > 20 or f"{family}/{size}_gmt_single_device" in ALL
        if family in NEWER and billions >= 1.5:
            assert {f"{family}/{size}_gmt_low_memory", f"{family}/{size}_gmt_compact"} <= ALL.keys()
        if family in NEWER and 7 <= billions <= 9:
            assert f"{family}/{size}_gmt_dpo" in ALL


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_configs_and_their_tables_are_what_the_script_writes(every, make_configs):
    """Of all configs but for their memory; that is counted of every eighth, or with all tables in the slow case."""
    made = make_configs.build(list(make_configs.CONFIGS)[::every])
    for name, config in make_configs.CONFIGS.items():
        text = ALL[name].read_text()
        assert make_configs.without_memory(text) == make_configs.render(name, config, ""), REMEDY
        assert made.get(name, text) == text, REMEDY
    if every == 1:
        for path, text in make_configs.build_docs().items():
            assert path.read_text() == text, REMEDY


def test_the_figure_of_a_steps_memory_shows_the_totals_of_its_table(make_configs):
    table = make_configs.COMPACT_DOCS.read_text().partition(make_configs.BESIDE_TABLE[0])[2]
    totals = re.search(r"\| total \| (.+) \| (.+) \|", table).groups()
    drawn = re.findall(r">([\d.]+) GiB<", (make_configs.ROOT / "docs" / "images" / "compact_memory.svg").read_text())
    assert drawn == list(totals), "run `python scripts/make_memory_figure.py`"


def _train(recipe_class, cfg) -> None:
    from gmt_tune.integrations.torchtune.config.check import check_config
    from gmt_tune.integrations.torchtune.run.preference import OWN_KEYS, check_preference_config

    is_dpo = recipe_class.__name__ == "GMTFullDPORecipe"
    check_config(cfg, OWN_KEYS if is_dpo else ())
    if is_dpo:
        check_preference_config(cfg)
    try:
        recipe = recipe_class(cfg)
        recipe.setup(cfg)
        recipe.train()
        recipe.cleanup()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
