"""The files that a config names are all there, and are of the model that it builds."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torchtune import config

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.checkpoint.tied_output import drop_tied_output
from gmt_tune.integrations.torchtune.config.files import _check_model_files
from gmt_tune.integrations.torchtune.config.release import check_release

LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# What the releases' own config.json say
LLAMA2 = {"model_type": "llama", "vocab_size": 32000, "rms_norm_eps": 1e-05, "tie_word_embeddings": False}
LLAMA3 = {**LLAMA2, "vocab_size": 128256, "rope_theta": 500000.0, "rope_scaling": None}
MISTRAL = {**LLAMA2, "model_type": "mistral", "rope_theta": 10000.0, "sliding_window": 4096}
SMOLLM2 = {**LLAMA2, "vocab_size": 49152, "tie_word_embeddings": True, "rope_scaling": None}
GEMMA = {"model_type": "gemma", "vocab_size": 256000, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "head_dim": 256}
QWEN2 = {
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "vocab_size": 151936,
    "sliding_window": 32768,
    "use_sliding_window": False,
}
QWEN3 = {
    **QWEN2,
    "model_type": "qwen3",
    "head_dim": 128,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": True,
}
GEMMA2 = {
    **GEMMA,
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
PHI3 = {"model_type": "phi3", "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False}


def sizes(hidden, layers, heads, kv_heads, intermediate):
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
    }


PUBLISHED = {
    "Llama-2-7b-hf": ("llama2.llama2_7b", "LLAMA2", LLAMA2 | sizes(4096, 32, 32, 32, 11008)),
    "Llama-2-13b-hf": ("llama2.llama2_13b", "LLAMA2", LLAMA2 | sizes(5120, 40, 40, 40, 13824)),
    "Llama-2-70b-hf": ("llama2.llama2_70b", "LLAMA2", LLAMA2 | sizes(8192, 80, 64, 8, 28672)),
    "CodeLlama-7b-hf": (
        "code_llama2.code_llama2_7b",
        "LLAMA2",
        LLAMA2 | sizes(4096, 32, 32, 32, 11008) | {"vocab_size": 32016, "rope_theta": 1000000},
    ),
    "Meta-Llama-3-8B": ("llama3.llama3_8b", "LLAMA3", LLAMA3 | sizes(4096, 32, 32, 8, 14336)),
    "Meta-Llama-3-70B": ("llama3.llama3_70b", "LLAMA3", LLAMA3 | sizes(8192, 80, 64, 8, 28672)),
    "Llama-3.1-8B": (
        "llama3_1.llama3_1_8b",
        "LLAMA3",
        LLAMA3 | sizes(4096, 32, 32, 8, 14336) | {"rope_scaling": LLAMA3_SCALING},
    ),
    "Llama-3.1-70B": (
        "llama3_1.llama3_1_70b",
        "LLAMA3",
        LLAMA3 | sizes(8192, 80, 64, 8, 28672) | {"rope_scaling": LLAMA3_SCALING},
    ),
    "Llama-3.3-70B-Instruct": (
        "llama3_3.llama3_3_70b",
        "LLAMA3",
        LLAMA3 | sizes(8192, 80, 64, 8, 28672) | {"rope_scaling": LLAMA3_SCALING, "head_dim": 128},
    ),
    "Llama-3.2-1B": (
        "llama3_2.llama3_2_1b",
        "LLAMA3_2",
        LLAMA3
        | sizes(2048, 16, 32, 8, 8192)
        | {"rope_scaling": {**LLAMA3_SCALING, "factor": 32.0}, "head_dim": 64, "tie_word_embeddings": True},
    ),
    "Llama-3.2-3B": (
        "llama3_2.llama3_2_3b",
        "LLAMA3_2",
        LLAMA3
        | sizes(3072, 28, 24, 8, 8192)
        | {"rope_scaling": {**LLAMA3_SCALING, "factor": 32.0}, "head_dim": 128, "tie_word_embeddings": True},
    ),
    "Mistral-7B-v0.1": ("mistral.mistral_7b", "MISTRAL", MISTRAL | sizes(4096, 32, 32, 8, 14336)),
    "gemma-2b": ("gemma.gemma_2b", "GEMMA", GEMMA | sizes(2048, 18, 8, 1, 16384)),
    "Qwen2.5-0.5B-Instruct": (
        "qwen2_5.qwen2_5_0_5b",
        "QWEN2",
        QWEN2 | sizes(896, 24, 14, 2, 4864) | {"tie_word_embeddings": True},
    ),
    "Phi-3-mini-4k-instruct": (
        "phi3.phi3_mini",
        "PHI3_MINI",
        PHI3 | sizes(3072, 32, 32, 32, 8192) | {"vocab_size": 32064, "rope_theta": 10000.0},
    ),
    "phi-4": (
        "gmt_tune.models.phi4.phi4_14b",
        "PHI4",
        PHI3 | sizes(5120, 40, 40, 10, 17920) | {"vocab_size": 100352, "rope_theta": 250000, "sliding_window": None},
    ),
    "Mistral-7B-Instruct-v0.3": (
        "gmt_tune.models.mistral.mistral_7b_v0_3",
        "MISTRAL",
        MISTRAL
        | sizes(4096, 32, 32, 8, 14336)
        | {"vocab_size": 32768, "rope_theta": 1000000.0, "sliding_window": None},
    ),
    "SmolLM2-135M": (
        "gmt_tune.models.smollm2.smollm2_135m",
        "LLAMA3_2",
        SMOLLM2 | sizes(576, 30, 9, 3, 1536) | {"rope_theta": 100000, "rope_interleaved": False},
    ),
    "SmolLM2-1.7B": (
        "gmt_tune.models.smollm2.smollm2_1_7b",
        "LLAMA3_2",
        SMOLLM2 | sizes(2048, 24, 32, 32, 8192) | {"rope_theta": 130000},
    ),
}
QWEN2_5 = {
    "1.5B": ("1_5b_instruct", sizes(1536, 28, 12, 2, 8960)),
    "3B": ("3b", sizes(2048, 36, 16, 2, 11008)),
    "7B": ("7b_instruct", sizes(3584, 28, 28, 4, 18944)),
    "14B": ("14b_instruct", sizes(5120, 48, 40, 8, 13824)),
    "32B": ("32b_instruct", sizes(5120, 64, 40, 8, 27648)),
}
for size, (builder, theirs) in QWEN2_5.items():
    is_small = size in ("1.5B", "3B")
    theirs = QWEN2 | theirs | {"tie_word_embeddings": is_small, "vocab_size": 151936 if is_small else 152064}
    PUBLISHED[f"Qwen2.5-{size}-Instruct"] = (f"qwen2_5.qwen2_5_{builder}", "QWEN2", theirs)
for size in ("14B", "32B"):
    *_, theirs = PUBLISHED[f"Qwen2.5-{size}-Instruct"]
    builder = f"qwen2_5.qwen2_5_{size.lower()}_base"
    PUBLISHED[f"Qwen2.5-{size}"] = (builder, "QWEN2", theirs | {"rms_norm_eps": 1e-05})
for size, theirs in {
    "0.6B": sizes(1024, 28, 16, 8, 3072),
    "1.7B": sizes(2048, 28, 16, 8, 6144),
    "4B": sizes(2560, 36, 32, 8, 9728),
    "8B": sizes(4096, 36, 32, 8, 12288) | {"tie_word_embeddings": False},
    "14B": sizes(5120, 40, 40, 8, 17408) | {"tie_word_embeddings": False},
    "32B": sizes(5120, 64, 64, 8, 25600) | {"tie_word_embeddings": False},
}.items():
    builder = f"gmt_tune.models.qwen3.qwen3_{size.lower().replace('.', '_')}"
    PUBLISHED[f"Qwen3-{size}"] = (builder, "gmt_tune.models.qwen3", QWEN3 | theirs)
for size, theirs in {
    "2b": sizes(2304, 26, 8, 4, 9216),
    "9b": sizes(3584, 42, 16, 8, 14336),
    "27b": sizes(4608, 46, 32, 16, 36864) | {"head_dim": 128, "query_pre_attn_scalar": 144},
}.items():
    PUBLISHED[f"gemma-2-{size}-it"] = (
        f"gmt_tune.models.gemma2.gemma2_{size}",
        "gmt_tune.models.gemma2",
        GEMMA2 | theirs,
    )
TINYLLAMA = {
    "_component_": "torchtune.models.llama2.llama2",
    "vocab_size": 32000,
    "num_layers": 22,
    "num_heads": 32,
    "num_kv_heads": 4,
    "embed_dim": 2048,
    "intermediate_dim": 5632,
    "max_seq_len": 2048,
    "norm_eps": 1e-5,
}


def check(builder: str | dict, model_type: str, theirs: dict, folder) -> None:
    """Compare a config.json with what a builder makes."""
    if isinstance(builder, str):
        builder = {"_component_": builder if builder.startswith("gmt_tune") else f"torchtune.models.{builder}"}
    section = {"checkpoint_dir": str(folder), "model_type": model_type}
    cfg = OmegaConf.create({"model": builder, "checkpointer": section})
    (folder / "config.json").write_text(json.dumps(theirs))
    with torch.device("meta"):
        model = config.instantiate(cfg.model)
    check_release(cfg, "checkpointer", model)


def as_transformers_5(theirs: dict) -> dict:
    """The same config.json as newer releases write it."""
    scaling = theirs.get("rope_scaling") or {"rope_type": "default"}
    rest = {key: value for key, value in theirs.items() if key not in ("rope_theta", "rope_scaling")}
    return {**rest, "rope_parameters": {"rope_theta": theirs.get("rope_theta", 10000.0), **scaling}}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_release_fits_the_builder_that_is_made_for_it(name, tmp_path):
    builder, model_type, theirs = PUBLISHED[name]
    check(builder, model_type, theirs, tmp_path)
    check(builder, model_type, as_transformers_5(theirs), tmp_path)


def test_tinyllama_fits_llama2s_builder_in_its_sizes(tmp_path):
    theirs = {**LLAMA2, **sizes(2048, 22, 32, 4, 5632), "rope_theta": 10000.0, "rope_scaling": None}
    check(TINYLLAMA, "LLAMA2", theirs, tmp_path)


@pytest.mark.parametrize("later", [False, True], ids=["as published", "as transformers 5 writes it"])
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Mistral-7B-v0.1", {"rope_theta": 1000000.0}, r"rope_theta 1000000\.0, .* builds 10000:"),  # v0.2
        ("Llama-2-7b-hf", {"rope_theta": 1e6}, r"rope_theta 1000000\.0"),  # Code Llama - Python
        ("CodeLlama-7b-hf", {"rope_theta": None}, r"rope_theta 10000\.0, .* builds 1000000"),  # as Llama 2
        ("Llama-3.1-8B", {"rope_scaling": None}, r"rope_scaling none, .* builds llama3 \(factor 8\.0"),  # 3
        (
            "Meta-Llama-3-8B",
            {"rope_scaling": LLAMA3_SCALING},
            r"rope_scaling llama3 \(factor 8\.0.* builds none",
        ),  # 3.1
        ("Llama-3.2-1B", {"rope_scaling": LLAMA3_SCALING}, r"factor 8\.0.* builds llama3 \(factor 32\.0"),
        ("Llama-3.1-8B", {"rope_scaling": {**LLAMA3_SCALING, "high_freq_factor": 2.0}}, r"high_freq_factor 2\.0"),
        ("Llama-2-7b-hf", {"rope_scaling": {"type": "linear", "factor": 4.0}}, r"linear \(factor 4\.0\), .* none"),
        ("Phi-3-mini-4k-instruct", {"rope_scaling": {"type": "longrope", "long_factor": [1.1]}}, r"longrope, .* none"),
        ("Llama-2-7b-hf", {"rms_norm_eps": 1e-06}, r"rms_norm_eps 1e-06, .* builds 1e-05"),
        ("Llama-3.2-1B", {"tie_word_embeddings": False}, r"tie_word_embeddings False, .* builds True"),
        ("Meta-Llama-3-8B", {"tie_word_embeddings": True}, r"tie_word_embeddings True, .* builds False"),
        ("Mistral-7B-v0.1", {"head_dim": 160}, r"head_dim 160, .* builds 128"),
        ("Mistral-7B-v0.1", {"vocab_size": 32768}, r"vocab_size 32768, .* builds 32000: .* gmt_tune\.models\.mistral"),
        ("Mistral-7B-Instruct-v0.3", {"vocab_size": 32000}, r"vocab_size 32000, .* builds 32768"),  # v0.2
        ("Qwen2.5-14B-Instruct", {"rms_norm_eps": 1e-05}, r"rms_norm_eps 1e-05, .* builds 1e-06"),  # not Instruct
        ("Qwen3-8B", {"tie_word_embeddings": True}, r"tie_word_embeddings True, .* builds False"),
        ("Qwen3-4B", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"yarn \(factor 4\.0\), .* none"),
        ("Qwen3-4B", {"rms_norm_eps": 1e-05}, r"builds 1e-06: choose the builder .* gmt_tune\.models\.qwen3,"),
        ("Qwen3-4B", {"rope_theta": 5000000}, r"rope_theta 5000000, "),  # of July 2025
        ("gemma-2-2b-it", {"attn_logit_softcapping": 30.0}, r"attn_logit_softcapping 30\.0, .* builds 50\.0"),
        ("gemma-2-2b-it", {"final_logit_softcapping": 50.0}, r"final_logit_softcapping 50\.0, .* builds 30\.0"),
        ("gemma-2-9b-it", {"query_pre_attn_scalar": 224}, r"query_pre_attn_scalar 224, .* builds 256"),
        ("gemma-2-9b-it", {"sliding_window": 1024}, r"sliding_window 1024, .* builds 4096"),
        ("gemma-2-9b-it", {"rms_norm_eps": 1e-05}, r"rms_norm_eps 1e-05, .* builds 1e-06"),
        ("phi-4", {"partial_rotary_factor": 0.75}, r"partial_rotary_factor 0\.75, .* builds 1\.0"),  # mini
    ],
)
def test_a_release_of_the_same_sizes_that_computes_otherwise_is_refused(name, changes, message, later, tmp_path):
    builder, model_type, theirs = PUBLISHED[name]
    theirs = {key: value for key, value in {**theirs, **changes}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        check(builder, model_type, as_transformers_5(theirs) if later else theirs, tmp_path)


def test_a_release_without_the_soft_capping_that_is_built_is_refused(tmp_path):
    builder, model_type, theirs = PUBLISHED["gemma-2-2b-it"]
    with pytest.raises(UserError, match=r"final_logit_softcapping none, .* builds 30\.0"):
        check(builder, model_type, theirs | {"final_logit_softcapping": None}, tmp_path)


@pytest.mark.parametrize(
    ("name", "builder", "model_type", "message"),
    [
        ("phi-4", "phi4.phi4_14b", "PHI4", r"rope_theta 250000, .* builds 10000: .* in gmt_tune\.models\.phi4"),
        (
            "gemma-2-2b-it",
            "gemma2.gemma2_2b",
            "gmt_tune.models.gemma2",
            r"attn_logit_softcapping 50\.0, .* builds 30\.0: choose the builder .* gmt_tune\.models\.gemma2",
        ),
        (
            "gemma-2-2b-it",
            "gemma2.gemma2_2b",
            "GEMMA2",
            r"set it to gmt_tune\.models\.gemma2 with checkpointer\._component_=gmt_tune\.models\.FullModelHF",
        ),
        (
            "Qwen3-8B",
            "qwen2_5.qwen2_5_7b_base",
            "QWEN2",
            r"holds a qwen3 model: set it to gmt_tune\.models\.qwen3 with",
        ),
    ],
)
def test_a_builder_of_torchtunes_that_computes_otherwise_is_refused(name, builder, model_type, message, tmp_path):
    with pytest.raises(UserError, match=message):
        check(builder, model_type, PUBLISHED[name][2], tmp_path)


def test_torchtunes_gemma_2_with_the_right_values_caps_no_logits(tmp_path):
    sizes_of_2b = {"num_layers": 26, "num_heads": 8, "num_kv_heads": 4, "head_dim": 256, "embed_dim": 2304}
    builder = {"_component_": "torchtune.models.gemma2.gemma2", "vocab_size": 256000, **sizes_of_2b}
    builder |= {"intermediate_dim": 9216, "max_seq_len": 8192}
    with pytest.raises(UserError, match=r"final_logit_softcapping 30\.0, .* builds none"):
        check(builder, "gmt_tune.models.gemma2", PUBLISHED["gemma-2-2b-it"][2], tmp_path)


def test_a_users_own_family_is_taken_for_any_release(tmp_path):
    builder, _, theirs = PUBLISHED["gemma-2-2b-it"]
    check(builder, "my_gemma", theirs, tmp_path)


@pytest.mark.parametrize(
    ("builder", "way_out"),
    [
        (TINYLLAMA, r"set model\.rope_base: 250000, or choose another checkpointer\.checkpoint_dir"),
        ("llama2.llama2_7b", r"choose torchtune's builder of this release, if it has one, or .*checkpoint_dir"),
    ],
)
def test_another_rotary_base_names_the_key_where_the_builder_takes_it(builder, way_out, tmp_path):
    with pytest.raises(UserError, match=rf"rope_theta 250000, .* builds 10000\.0: {way_out}"):
        check(builder, "LLAMA2", {"model_type": "llama", "rope_theta": 250000}, tmp_path)


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"type": "linear", "factor": 1.0}, {"type": "dynamic"}])
def test_scaling_that_changes_nothing_within_the_trained_positions_is_none(scaling, tmp_path):
    builder, model_type, theirs = PUBLISHED["Llama-2-7b-hf"]
    check(builder, model_type, {**theirs, "rope_scaling": scaling}, tmp_path)


def test_a_scale_factor_of_one_is_no_scaling(tmp_path):
    llama = {**TINYLLAMA, "_component_": "torchtune.models.llama3_2.llama3_2", "scale_factor": 1, "rope_base": 10000}
    tied = {**LLAMA2, **sizes(2048, 22, 32, 4, 5632), "tie_word_embeddings": True, "rope_theta": 10000.0}
    check(llama, "LLAMA3_2", tied, tmp_path)
    with pytest.raises(UserError, match="builds llama3"):
        check({**llama, "scale_factor": 2}, "LLAMA3_2", tied, tmp_path)


@pytest.mark.parametrize("text", ["[1]", "[" * 100_000, "{", '"text"'], ids=["list", "deep", "broken", "text"])
def test_a_config_json_that_is_none_is_named(text, tmp_path):
    cfg = OmegaConf.create({"checkpointer": {"checkpoint_dir": str(tmp_path)}})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is no valid JSON"):
        check_release(cfg, "checkpointer", torch.nn.Linear(1, 1))


# ---------------------------------------------------------------------------- shards


def given(folder, files) -> None:
    section = {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(folder),
        "output_dir": str(folder),
        "checkpoint_files": files,
    }
    (folder / "config.json").write_text("{}")
    _check_model_files("checkpointer", OmegaConf.create(section))


def shards(folder, *names: str) -> list[str]:
    for name in names:
        save_file({"x": torch.zeros(1)}, folder / name)
    return list(names)


@pytest.mark.parametrize("has_index", [True, False])
def test_a_missing_shard_is_named(has_index, tmp_path):
    files = shards(tmp_path, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    if has_index:
        index = {"weight_map": {"a": files[0], "b": files[1]}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    given(tmp_path, files)
    for i in (0, 1):
        with pytest.raises(UserError, match=rf"names 1 of the 2 files .* also {files[1 - i]}"):
            given(tmp_path, [files[i]])


def test_the_index_knows_shards_of_any_name_and_an_index_of_other_files_does_not_matter(tmp_path):
    files = shards(tmp_path, "left.safetensors", "right.safetensors", "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": files[0], "b": files[1]}}))
    given(tmp_path, files[:2])
    given(tmp_path, files[2:])
    with pytest.raises(UserError, match=r"also right\.safetensors"):
        given(tmp_path, files[:1])
    for broken in ("[]", "{", '{"weight_map": 3}'):
        index.write_text(broken)
        given(tmp_path, files[:1])


def test_a_range_of_shards_is_checked_like_a_list(tmp_path):
    files = shards(tmp_path, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    given(tmp_path, {"filename_format": "model-{}-of-{}.safetensors", "max_filename": "00002"})
    with pytest.raises(UserError, match=r"names model-00001-of-00003\.safetensors, which is not in"):
        given(tmp_path, {"filename_format": "model-{}-of-{}.safetensors", "max_filename": "00003"})
    with pytest.raises(UserError, match="checkpoint_files: `max_filename` must be a string"):
        given(tmp_path, {"filename_format": "model-{}-of-{}.safetensors", "max_filename": 2})
    assert len(files) == 2


# ---------------------------------------------------------------------------- model types


@pytest.mark.parametrize(
    ("component", "model_type", "message"),
    [
        ("torchtune.training", "LLAMA", r"is no model type of torchtune and no module .*: did you mean LLAMA\d\?"),
        ("torchtune.training", "gmt_tune.models.qwen3", r"set ref_checkpointer\._component_=gmt_tune\.models\.Full"),
        ("gmt_tune.models", "gmt_tune.models.qwen2", r"did you mean gmt_tune\.models\.qwen3\?"),
    ],
)
def test_a_model_type_that_the_checkpointer_does_not_know_is_named(component, model_type, message, tmp_path):
    section = {"_component_": f"{component}.FullModelHFCheckpointer", "checkpoint_dir": str(tmp_path)}
    section |= {"output_dir": str(tmp_path), "checkpoint_files": shards(tmp_path, "model.safetensors")}
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        _check_model_files("ref_checkpointer", OmegaConf.create({**section, "model_type": model_type}))
    known = {"torchtune.training": "LLAMA3", "gmt_tune.models": "gmt_tune.models.qwen3"}[component]
    _check_model_files("ref_checkpointer", OmegaConf.create({**section, "model_type": known}))


# ---------------------------------------------------------------------------- tied embeddings


def test_a_copy_of_the_embeddings_is_dropped_for_a_tied_model_alone():
    tied = {**TINYLLAMA, "_component_": "torchtune.models.llama3_2.llama3_2"}
    embeddings = torch.randn(4, 3)
    for component, is_kept in ((tied, False), (TINYLLAMA, True)):
        state_dict = {"tok_embeddings.weight": embeddings, "output.weight": embeddings.clone()}
        drop_tied_output(state_dict, OmegaConf.create(component))
        assert ("output.weight" in state_dict) == is_kept
    state_dict = {"tok_embeddings.weight": embeddings}
    drop_tied_output(state_dict, OmegaConf.create(tied))
    assert list(state_dict) == ["tok_embeddings.weight"]


def test_an_output_layer_of_its_own_is_refused_for_a_tied_model():
    tied = OmegaConf.create({**TINYLLAMA, "_component_": "torchtune.models.llama3_2.llama3_2"})
    embeddings = torch.randn(4, 3)
    for output in (embeddings + 1, embeddings[:2]):
        with pytest.raises(UserError, match="uses its embeddings as the output layer, but the files"):
            drop_tied_output({"tok_embeddings.weight": embeddings, "output.weight": output}, tied)
