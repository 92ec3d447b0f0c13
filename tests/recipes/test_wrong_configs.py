"""Wrong configs end before a model is loaded, with one sentence that names the key and what is right."""

import json
import os
import re
import shutil

import pytest
import torch
import yaml
from forked_run import ForkedRun
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.config.check import check_config, check_keys, check_machine
from gmt_tune.integrations.torchtune.config.files import _check_data_files
from gmt_tune.integrations.torchtune.config.reading import apply_overrides
from gmt_tune.integrations.torchtune.run.schedule import warn_of_long_warmup

MASK = {"_component_": "gmt_tune.GradientMask", "density": 0.2, "dense": []}
REMOVED = "(removed)"


def changed(config: dict, path: str, value) -> dict:
    """The config with the value at a dotted path replaced, or taken away."""
    *parents, last = path.split(".")
    section = config
    for key in parents:
        section = section[key]
    if value is REMOVED:
        del section[last]
    else:
        section[last] = value
    return config


WRONG = [
    # unknown keys
    ("bach_size", 4, r"bach_size \(4\) is no key of this recipe: did you mean batch_size\?"),
    ("gradient_accumulation_step", 2, r"did you mean gradient_accumulation_steps\?"),
    ("save_every_n_step", 2, r"did you mean save_every_n_steps\?"),
    ("optimizer.weigth_decay", 0.1, r"optimizer\.weigth_decay \(0\.1\) is no key of .*: did you mean weight_decay\?"),
    ("model.num_layer", 2, r"model\.num_layer \(2\) is no key of .*: did you mean num_layers\?"),
    ("tokenizer.max_len", 2, r"tokenizer\.max_len \(2\) is no key of .*: did you mean max_seq_len\?"),
    ("checkpointer.checkpoint_file", "x", r"checkpointer\.checkpoint_file .* did you mean checkpoint_files\?"),
    ("lr_scheduler.warmup", 2, r"lr_scheduler\.warmup \(2\) is no key of .*num_warmup_steps"),
    # missing keys
    ("epoch", 4, r"epoch \(4\) is no key of this recipe: did you mean epochs\?"),
    ("max_steps", 4, r"max_steps \(4\) is no key of this recipe: did you mean max_steps_per_epoch\?"),
    (
        "quantizer",
        {"_component_": "torch.nn.Linear"},
        r"quantizer is no key of this recipe: the config is for a recipe of torchtune's for quant",
    ),
    ("batch_size", REMOVED, r"batch_size is missing in the config"),
    ("optimizer", None, r"optimizer is null, but every run needs this section"),
    ("metric_logger", None, r"metric_logger is null, but every run needs this section"),
    ("optimizer", REMOVED, r"optimizer is missing in the config"),
    ("model._component_", REMOVED, r"model\._component_ is missing"),
    ("model.num_layers", REMOVED, r"model .*missing a required argument: 'num_layers'"),
    # wrong types and values
    ("batch_size", 0, r"batch_size must be a whole number from 1 on, got 0"),
    ("batch_size", "four", r"batch_size must be a whole number from 1 on, got 'four'"),
    ("epochs", 1.5, r"epochs must be a whole number from 1 on, got 1\.5"),
    ("gradient_accumulation_steps", None, r"gradient_accumulation_steps must be a whole number from 1 on, got None"),
    ("max_steps_per_epoch", -1, r"max_steps_per_epoch must be a whole number from 1 on or null, got -1"),
    ("save_every_n_steps", 0, r"save_every_n_steps must be a whole number from 1 on or null, got 0"),
    ("keep_last_n_checkpoints", "all", r"keep_last_n_checkpoints must be .* or null, got 'all'"),
    ("shuffle", "yes please", r"shuffle must be True or False, got 'yes please'"),
    ("resume_from_checkpoint", 1, r"resume_from_checkpoint must be True or False, got 1"),
    ("dtype", "fp16", r"dtype must be one of bf16, fp32, got 'fp16'"),
    ("dtype", "float32", r"dtype must be one of bf16, fp32, got 'float32'"),
    ("device", "gpu", r"device must be cuda, cpu, xpu or npu, got 'gpu'"),
    ("seed", "abc", r"seed must be a whole number from 0 to 4294967295, or null .*, got 'abc'"),
    ("seed", 2**64, r"seed must be a whole number from 0 to 4294967295, .* got 18446744073709551616"),
    ("device", "mps", r"device must be cuda, cpu, xpu or npu, got 'mps'"),
    ("enable_async_checkpointing", "maybe", r"enable_async_checkpointing must be True or False, got 'maybe'"),
    ("ac_mode", "some", r"ac_mode must be one of full, selective, or null, got 'some'"),
    ("cudnn_deterministic_mode", "on", r"cudnn_deterministic_mode must be one of default, .* or null, got 'on'"),
    ("clip_grad_norm", -1.0, r"clip_grad_norm must be a positive number, .* got -1\.0"),
    ("on_nonfinite", "ignore", r"on_nonfinite must be one of error, skip, got 'ignore'"),
    ("optimizer.lr", "1e-x", r"optimizer\.lr must be a number from 0 on, such as 2e-5, got '1e-x'"),
    ("optimizer", "torch.optim.AdamW", r"optimizer must be a section with _component_"),
    ("evaluation", {"_component_": False}, r"evaluation\._component_ must be a dotted path, got False"),
    ("clip_grad_norm", "None", r"clip_grad_norm must be a positive number, .*, or null, got 'None'"),
    # values that a component refuses
    ("optimizer.betas", [0.9], r"optimizer \(torch\.optim\.AdamW, .*betas: \[0\.9\]\) cannot be made: "),
    ("optimizer.weight_decay", "abc", r"optimizer \(.*weight_decay: abc\) cannot be made: "),
    ("lr_scheduler.num_warmup_steps", "two", r"lr_scheduler \(.*num_warmup_steps: two\) cannot be made: "),
    ("optimizer._component_", "torch.optim.LBFGS", r"optimizer \(torch\.optim\.LBFGS\) needs a closure"),
    ("model.num_heads", "four", r"model \(torchtune\.models\.llama3_2\.llama3_2\) cannot be built: "),
    # components that do not exist
    ("gradient_mask._component_", "gmt_tune.GradMask", r"gradient_mask\._component_ 'gmt_tune\.GradMask' cannot be"),
    ("collate_fn", "torchtune.data.nope", r"collate_fn 'torchtune\.data\.nope' cannot be imported"),
    (
        "metric_logger",
        {"_component_": "torchtune.training.metric_logging.WandBLogger", "project": "p"},
        r"metric_logger\._component_ WandBLogger needs the package wandb: pip install wandb",
    ),
    (
        "optimizer._component_",
        "torch.optim.AdamWW",
        r"optimizer\._component_ 'torch\.optim\.AdamWW' cannot be imported .*: did you mean torch\.optim\.AdamW\?",
    ),
    (
        "optimizer._component_",
        "torch.optim.Adamw",  # which is also nearer to Adam
        r"optimizer\._component_ 'torch\.optim\.Adamw' .*: did you mean torch\.optim\.AdamW\?",
    ),
    ("seed", "${oc.env:NO_SUCH_SEED}", r"seed cannot be resolved: Environment variable 'NO_SUCH_SEED' not found$"),
    ("model._component_", "torchtun.models.x", r"model\._component_ 'torchtun\.models\.x' cannot be imported"),
    # a module in place of what is in it
    ("gradient_mask", {"_component_": "gmt_tune", "density": 0.2}, r"'gmt_tune' is a module"),
    ("dataset._component_", "torchtune.datasets", r"dataset\._component_ 'torchtune\.datasets' is a module"),
    ("optimizer._component_", "torch.optim", r"optimizer\._component_ 'torch\.optim' is a module"),
    # the profiler, which torchtune makes after the model
    ("profiler", {"enabeld": True}, r"profiler\.enabeld \(True\) is no key of .*: did you mean enabled\?"),
    ("profiler", {"_component_": "torch.profiler.profile"}, r"profiler\._component_ must be torchtune"),
    ("profiler", True, r"profiler must be a section or null, got True"),
    # combinations
    ("enable_activation_offloading", True, r"enable_activation_offloading: True needs device: cuda"),
    ("run_val_every_n_steps", 5, r"run_val_every_n_steps is set, but dataset_val is not"),
    ("collate_fn", "torchtune.data.left_pad_sequence", r"collate_fn must not be left_pad_sequence"),
    ("tensor_parallel_dim", 2, r"tensor_parallel_dim: 2 needs tensor_parallel_plan"),
    ("tokenizer.max_seq_len", 1000, r"tokenizer\.max_seq_len is 1000, but the model takes at most 256 tokens"),
    # files
    ("checkpointer.output_dir", "/proc/no", r"checkpointer\.output_dir /proc/no cannot be written"),
    ("metric_logger.log_dir", "/proc/no", r"metric_logger\.log_dir /proc/no cannot be written"),
    ("checkpointer.checkpoint_files", "model.safetensors", r"checkpoint_files must be a list of file names, got 'mo"),
    ("checkpointer.checkpoint_files", ["config.json"], r"names config\.json, which is no file of weights"),
    ("output_dir", False, r"output_dir must be the path of a folder, got False"),
    ("checkpointer.checkpoint_dir", None, r"checkpointer\.checkpoint_dir must be the path of a folder, got None"),
    (
        "checkpointer.checkpoint_dir",
        "/no/such/dir",
        r"checkpointer\.checkpoint_dir /no/such/dir does not exist: download",
    ),
    ("checkpointer.checkpoint_files", ["a.safetensors"], r"names a\.safetensors, which is not in .*there: model\."),
    ("tokenizer.path", "/no/tokenizer.json", r"tokenizer\.path /no/tokenizer\.json does not exist"),
    ("dataset.data_files", "/no/train.jsonl", r"dataset\.data_files /no/train\.jsonl does not exist"),
    # another model than the checkpoint's
    ("checkpointer.model_type", "GEMMA", r"model_type is GEMMA, but .* holds a llama model"),
    ("model.embed_dim", 128, r"has hidden_size 64, but model .* builds 128"),
    ("model.num_layers", 3, r"has num_hidden_layers 2, but model .* builds 3"),
    ("model.num_kv_heads", 4, r"has num_key_value_heads 2, but model .* builds 4"),
    ("model.intermediate_dim", 64, r"has intermediate_size 128, but model .* builds 64"),
    ("model.vocab_size", 999, r"has vocab_size \d+, but model .* builds 999"),
    # the mask, whose name patterns are matched with the model's names before it is loaded
    (
        "gradient_mask",
        {"_component_": "gmt_tune.GradientMask", "density": 0},
        r"gradient_mask: density must be .*got 0",
    ),
    ("gradient_mask", {"_component_": "gmt_tune.GradientMask", "densty": 0.2}, r"did you mean gradient_mask\.density"),
    (
        "gradient_mask",
        {"_component_": "gmt_tune.GradientMask", "density": 0.2, "dense": ["*nrom*"]},
        r"gradient_mask: dense: the pattern '\*nrom\*' matches no parameter; names look like tok_embeddings\.weight",
    ),
    ("gradient_mask", {"density": 0.2}, r"gradient_mask\._component_ is missing"),
    ("gradient_mask", 0.2, r"gradient_mask must be a section with _component_ and density, got 0\.2"),
    # an interpolation that leads nowhere
    ("output_dir", "${no_such_key}/out", r"no_such_key"),
]


@pytest.mark.parametrize("path, value, message", WRONG, ids=[f"{path}={value}"[:60] for path, value, _ in WRONG])
def test_a_wrong_config_is_named_with_what_is_right(path, value, message, tmp_path, tiny_config):
    config = json.loads(json.dumps(tiny_config(tmp_path / "out", gradient_mask=MASK)))
    config = changed(config, path, value)
    with pytest.raises(UserError, match=message) as caught:
        check_config(OmegaConf.create(config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("profiler", [None, {"enabled": False}, {"_component_": None, "output_dir": "${output_dir}/x"}])
def test_the_profilers_section_need_not_name_it(profiler, tmp_path, tiny_config):
    check_config(OmegaConf.create(tiny_config(tmp_path / "out", profiler=profiler)))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(gradient_accumulation_steps=2, optimizer_in_bwd=True), "needs gradient_accumulation_steps: 1, got 2"),
        (dict(clip_grad_norm=1.0, optimizer_in_bwd=True), "needs clip_grad_norm: null, got 1.0"),
        (dict(on_nonfinite="skip", optimizer_in_bwd=True), "needs on_nonfinite: error"),
        (
            dict(gradient_mask={**MASK, "scope": "global"}, optimizer_in_bwd=True),
            "scope 'global' needs the gradients of all its tensors together, .*optimizer_in_bwd: False",
        ),
        (dict(track_selection_every_n_steps=1), "there is no gradient_mask whose selection could be tracked"),
    ],
)
def test_wrong_combinations_are_named(changes, message, tmp_path, tiny_config):
    with pytest.raises(UserError, match=message):
        check_config(OmegaConf.create(tiny_config(tmp_path / "out", **changes)))


@pytest.mark.parametrize("version, is_refused", [("2.6.0", True), ("2.12.1+cu130", True), ("2.13.0+cpu", False)])
def test_optimizer_in_backward_with_cpu_offload_needs_a_torch_that_waits(
    version, is_refused, tmp_path, tiny_config, monkeypatch
):
    monkeypatch.setattr(torch, "__version__", version)
    cfg = OmegaConf.create(tiny_config(tmp_path / "out", optimizer_in_bwd=True, fsdp_cpu_offload=True))
    if not is_refused:
        return check_config(cfg)
    with pytest.raises(UserError, match=rf"optimizer_in_bwd: True does not work with .* on torch {re.escape(version)}"):
        check_config(cfg)


@pytest.mark.parametrize(
    "key, value",
    [
        ("base_output_dir", "/runs"),
        ("checkpoint_dir", "/models/llama"),
        ("dataset_name", "gsm8k"),
        ("lr", 0.5),
        ("run_number", 3),
        ("run_name", "a"),
        ("date", "today"),
        ("model_dir", "/models"),
        ("dataset_size", 100),
        ("project", "x"),
        ("experiment", "x"),
        ("is_a_trial", True),
        ("note", None),
        ("shards", ["a.safetensors", "b.safetensors"]),
    ],
)
def test_a_users_own_variable_is_no_wrong_key(key, value, tmp_path, tiny_config, caplog):
    check_config(OmegaConf.create(tiny_config(tmp_path / "out", **{key: value})))  # an override replaced what used it
    assert (f"{key} has no effect" in caplog.text) == (value is not None)


@pytest.mark.parametrize("reference", ["${devices}", "${devices.base}", "${ devices.base }", "${devices[base]}"])
def test_a_variable_that_something_refers_to_may_have_any_name_and_kind(reference, tmp_path, tiny_config):
    value = {"base": str(tmp_path)} if "base" in reference else str(tmp_path)
    config = tiny_config(tmp_path / "out", devices=value)  # which looks like the key "device"
    check_config(OmegaConf.create(changed(config, "output_dir", f"{reference}/out")))
    config = changed({**config, "devices_2": str(tmp_path)}, "output_dir", "${devices_2}/out")
    with pytest.raises(UserError, match=r"devices \(.*\) is no key of this recipe: did you mean device\?"):
        check_config(OmegaConf.create(config))


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("grad_accumulation_steps", "gradient_accumulation_steps"),
        ("gradient_accumulations", "gradient_accumulation_steps"),
        ("micro_batch_size", "batch_size"),
        ("num_epochs", "epochs"),
        ("max_step", "max_steps_per_epoch"),
        ("max_grad_norm", "clip_grad_norm"),
        ("on_nan", "on_nonfinite"),
        ("scheduler", "lr_scheduler"),
        ("gradientmask", "gradient_mask"),
    ],
)
def test_a_key_of_another_name_is_refused_in_the_file_and_on_the_command_line(key, right, tmp_path, tiny_config):
    config = tiny_config(tmp_path / "out")
    for given, overrides in (({**config, key: 8}, []), (config, [f"{key}=8"])):
        with pytest.raises(UserError, match=rf"{key} \(8\) .*is no key of this recipe: did you mean {right}\?"):
            check_keys(apply_overrides(given, overrides))


@pytest.mark.parametrize(
    ("override", "right"),
    [
        ("density=0.01", r"gradient_mask\.density"),
        ("densty=0.01", r"gradient_mask\.density"),
        ("lr=1e-3", r"optimizer\.lr"),
        ("batch_sise=2", "batch_size"),
        ("warmup_steps=10", r"lr_scheduler\.num_warmup_steps"),
        ("output_directory=x", "output_dir"),
        ("model_dir=x", "model"),
        ("my_key={a: 1}", ""),
    ],
)
def test_a_new_key_on_the_command_line_is_a_known_one_or_a_variable(override, right, tmp_path, tiny_config):
    config = tiny_config(tmp_path / "out", gradient_mask=MASK)
    config["profiler"] = {"enabled": False, "warmup_steps": 1}
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"{key} \(.*\) on the command line is no key of this recipe: .*{right}"):
        check_keys(apply_overrides(config, [override]))
    check_keys(apply_overrides(config, [override]), own_keys=[key])  # of a customised recipe
    check_keys(apply_overrides(config, [override, f"metric_logger.filename=${{{key}}}"]))


def test_a_variable_without_effect_names_the_key_that_may_be_meant(tmp_path, tiny_config, caplog):
    check_config(OmegaConf.create(tiny_config(tmp_path / "out", lr=0.1)))
    assert "lr has no effect: it is no key of this recipe, and no value refers to it: did you mean optimizer.lr?" in (
        caplog.text
    )


OPTIONAL_SECTIONS = ("gradient_mask", "evaluation", "lr_scheduler", "dataset_val", "profiler", "tensor_parallel_plan")


def test_null_leaves_every_optional_section_out(tmp_path, tiny_config, run_recipe):
    null = dict.fromkeys(OPTIONAL_SECTIONS)
    goes_with = {"track_selection_every_n_steps": 1, "run_val_every_n_steps": 1, "max_steps_per_epoch": 1}
    config = tiny_config(tmp_path / "out", **null, **goes_with)
    check_config(OmegaConf.create(config))
    assert run_recipe(config).global_step == 1


@pytest.mark.parametrize("key", ["optimizer._component_", "gradient_mask._component_", "collate_fn"])
def test_a_module_that_cannot_be_imported_and_says_nothing_is_named(key, tmp_path, tiny_config, monkeypatch):
    (tmp_path / "silent_module.py").write_text("raise RuntimeError\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = changed(tiny_config(tmp_path / "out", gradient_mask=dict(MASK)), key, "silent_module.Thing")
    with pytest.raises(UserError, match=rf"{key} 'silent_module\.Thing' cannot be imported \(RuntimeError\)"):
        check_config(OmegaConf.create(config))


@pytest.mark.parametrize("steps, is_said", [(2, True), (3, False)])
def test_a_warmup_that_outlasts_the_run_is_said_with_both_numbers(steps, is_said, caplog):
    warmup = OmegaConf.create({"_component_": "torchtune.training.get_lr", "num_warmup_steps": 2})
    warn_of_long_warmup(warmup, steps)
    assert ("num_warmup_steps is 2, but the run has 2 optimizer steps" in caplog.text) == is_said
    for without in (None, OmegaConf.create({"_component_": "torchtune.training.get_lr"})):
        caplog.clear()
        warn_of_long_warmup(without, 1)
        assert not caplog.text


def test_a_run_whose_warmup_outlasts_it_says_so(tmp_path, tiny_config, run_recipe, caplog):
    run_recipe(tiny_config(tmp_path / "out", max_steps_per_epoch=1))
    assert "lr_scheduler.num_warmup_steps is 2, but the run has 1 optimizer step:" in caplog.text


def test_the_index_of_a_device_reaches_torchtune_as_it_takes_it(tmp_path, tiny_config, gmt_recipe, monkeypatch):
    class Reached(Exception):
        pass

    def stop(self, cfg):
        raise Reached(cfg.device, os.environ.get("LOCAL_RANK"), cfg.seed)

    monkeypatch.setattr(gmt_recipe.__mro__[3], "__init__", stop)
    for device, local_rank, reached in [
        ("cuda:1", None, ("cuda", "1")),
        ("cuda", None, ("cuda", None)),
        ("cpu", None, ("cpu", None)),
        ("cuda:0", "0", ("cuda", "0")),
        ("xpu:3", None, ("xpu", "3")),
    ]:
        for key in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(key, local_rank or "")  # so that it is as before after the test
            if local_rank is None:
                monkeypatch.delenv(key)
        with pytest.raises(Reached) as caught:
            gmt_recipe(OmegaConf.create(tiny_config(tmp_path / "out", device=device)))
        assert caught.value.args == (*reached, 5)


def test_an_index_under_torchrun_is_named(tmp_path, tiny_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local_rank, device, is_refused in [("0", "cuda:1", True), ("1", "cuda:1", False), ("1", "cuda", False)]:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        monkeypatch.delenv("GMT_TUNE_SINGLE_PROCESS", raising=False)  # of a test before
        cfg = OmegaConf.create(tiny_config(tmp_path / "out", device=device))
        if not is_refused:
            check_machine(cfg)
            continue
        with pytest.raises(UserError, match="device is cuda:1, but under torchrun each process takes the device of"):
            check_machine(cfg)


def test_a_tied_model_whose_files_hold_the_embeddings_twice_trains_as_without(
    tmp_path, tiny_world, tiny_config, run_recipe, final_weights
):
    shutil.copytree(tiny_world / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    copy = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file({**weights, **copy}, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    for name, folder in (("once", tiny_world / "model"), ("twice", tmp_path / "model")):
        config = tiny_config(tmp_path / name, max_steps_per_epoch=1, lr_scheduler=None)
        run_recipe(changed(config, "checkpointer.checkpoint_dir", str(folder)))
    once, twice = final_weights(tmp_path / "once"), final_weights(tmp_path / "twice")
    assert once and once.keys() == twice.keys() and "lm_head.weight" not in once
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert not torch.equal(once["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])

    save_file({**weights, "lm_head.weight": copy["lm_head.weight"] + 1}, tmp_path / "model" / "model.safetensors")
    config = changed(tiny_config(tmp_path / "other"), "checkpointer.checkpoint_dir", str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"uses its embeddings as the output layer, but .*lm_head\.weight"):
        run_recipe(config)


def test_truncated_weights_are_named_before_loading(tmp_path, tiny_world, tiny_config):
    shutil.copytree(tiny_world / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config = changed(tiny_config(tmp_path / "out"), "checkpointer.checkpoint_dir", str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"model\.safetensors is truncated or no safetensors file"):
        check_config(OmegaConf.create(config))


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path, tiny_config):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"output_dir .*/file/out cannot be written \(Not a directory\)"):
        check_config(OmegaConf.create(tiny_config(tmp_path / "file" / "out")))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"column_map": {"input": "prompt", "output": "answer"}}, r"dataset.*(column|prompt)"),
        ({"data_files": "{tmp}/broken.jsonl"}, r"dataset: .*broken\.jsonl is no valid JSON"),
        ({"data_files": "{tmp}/short.jsonl"}, r"dataset has 2 rows, but one optimizer step takes 4"),
    ],
    ids=["columns", "broken file", "too few rows"],
)
def test_wrong_data_is_named_before_the_model_is_loaded(change, message, tmp_path, tiny_config, run_recipe, caplog):
    (tmp_path / "broken.jsonl").write_text('{"question": "a"\n{]')
    (tmp_path / "short.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 2)
    config = tiny_config(tmp_path / "out")
    config["dataset"].update({k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in change.items()})
    caplog.set_level("INFO")
    with pytest.raises(UserError, match=message):
        run_recipe(config)
    assert "Instantiating model" not in caplog.text


# As a user types them at the end of the command line: (overrides, what the one line says, processes)
TYPED = [
    (["gradient_mask.density=20"], "density must be a number above 0 and at most 1 (0.2 keeps a fifth", 1),
    (["gradient_mask.density='0,2'"], "got '0,2'", 1),
    (["gradient_mask.densty=0.2"], "did you mean gradient_mask.density?", 1),
    (["gradient_mask=0.2"], "gradient_mask._component_ must be a dotted path, got 0.2", 1),
    (["optimizer.lr=abc"], "optimizer.lr must be a number from 0 on, such as 2e-5, got 'abc'", 2),
    (["batch_size=0"], "batch_size must be a whole number from 1 on, got 0", 1),
    (["nonsense"], "nonsense on the command line must be in the form of key=value", 2),
    (["gradient_mask.dense=[*norm*]"], "write 'gradient_mask.dense=[\"*norm*\"]'", 1),
    (["output_dir=~/runs", "batch_size=0"], "batch_size must be a whole number", 1),
    (["~no_such_key"], "no_such_key", 1),
    (["device=cuda"], "device is cuda, but torch", 1),
    (["tokenizer.path={root}/train.jsonl"], "is not a Hugging Face tokenizer.json", 1),
    (["tokenizer.max_seq_len=0"], "max_seq_len is 0, but must be a positive number", 1),
    (["dataset.split=held_out"], "dataset cannot be loaded: Unknown split", 1),
    (["dataset.data_files=[/no/such.jsonl]"], "dataset cannot be loaded: Unable to find '/no/such.jsonl'", 1),
    (["dataset.column_map.input=prompt"], "its rows have no column 'prompt'", 1),
    (["batch_size=1000"], "dataset has 64 rows, but one optimizer step takes 2000", 2),
    (["evaluation._component_=gmt_tune.data.ExactMatch", "evaluation.split=x"], "split is 'x', but must be", 1),
    (["profiler.enabled=True", "profiler.no_such=1"], "profiler.no_such (1) is no key of", 1),
    (["checkpointer.output_dir={out}/of_rank_${{oc.env:RANK}}"], "is not the same folder for all processes: rank 1", 2),
    # what nothing foresees: the last line of the traceback, and where the rest is
    (["loss._component_=torch.nn.MSELoss"], "(its traceback is in {out}/error_of_rank0.txt)", 1),
]


def test_data_files_are_looked_for_where_datasets_does(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    for right in (
        {"source": "json", "data_files": str(tmp_path / "rows.jsonl")},
        {"source": str(tmp_path), "data_files": "rows.jsonl"},
        {"source": "json", "data_dir": str(tmp_path), "data_files": "rows.jsonl"},
        {"source": "some/repository", "data_files": "data/rows.jsonl"},
    ):
        _check_data_files("dataset", OmegaConf.create(right))
    for wrong in ({"source": "json", "data_files": "rows.jsonl"}, {"source": str(tmp_path), "data_files": "row.jsonl"}):
        with pytest.raises(UserError, match=r"dataset\.data_files rows?\.jsonl does not exist"):
            _check_data_files("dataset", OmegaConf.create(wrong))


@pytest.mark.parametrize("overrides, said, processes", TYPED, ids=[" ".join(o) for o, _, _ in TYPED])
def test_a_run_with_a_wrong_config_says_one_line_and_shows_no_traceback(
    overrides, said, processes, tmp_path, tiny_world, tiny_config
):
    places = {"root": tiny_world, "out": tmp_path / "out"}
    config = tiny_config(tmp_path / "out", gradient_mask=MASK, max_steps_per_epoch=1)
    config["profiler"] = {"_component_": "torchtune.training.setup_torch_profiler", "enabled": False}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    run = ForkedRun(file, *[override.format(**places) for override in overrides], processes=processes)
    assert run.wait(120) == [1] * processes
    shown = run.log.read_text()
    errors = [line for line in shown.splitlines() if line.startswith("Error: ")]
    assert "Traceback" not in shown
    assert len(errors) == 1 and said.format(**places) in errors[0], shown


def test_tune_shows_one_line_and_the_traceback_on_request(run_tune, tmp_path, tiny_config):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tiny_config(tmp_path / "out", gradient_mask={**MASK, "density": 20})))
    debug = ForkedRun(file, environment={"GMT_TUNE_DEBUG": "1"})
    shown = run_tune("run", "gmt_full_finetune", "--config", "config.yaml", cwd=tmp_path, check=False)
    assert shown.returncode == 1 and "Traceback" not in shown.stderr
    assert [line for line in shown.stderr.splitlines() if line.startswith("Error: ")] == [
        "Error: gradient_mask: density must be a number above 0 and at most 1 (0.2 keeps a fifth of the gradient's "
        "entries), got 20; for 20 percent write 0.2"
    ]
    assert debug.wait(60) == [1] and "Traceback" in debug.log.read_text()
