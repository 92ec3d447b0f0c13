"""A config as ``tune run`` gets it: what the command line changes, what it may leave out, and paths of the home."""

import shlex

import pytest
from omegaconf import OmegaConf
from torchtune.config._utils import _merge_yaml_and_cli_args

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.config.reading import apply_overrides, expand_home, read_file
from gmt_tune.integrations.torchtune.plugin.assets import register_resolver

FILE = {
    "gradient_mask": {"_component_": "gmt_tune.GradientMask", "density": 0.2, "dense": ["*norm*"]},
    "dataset_val": [{"_component_": "a.b"}, {"_component_": "a.c"}],
    "profiler": {"enabled": False},
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-4},
    "tokenizer": {"_component_": "a.T", "prompt": {"_component_": "a.P"}, "path": "/m/tokenizer.json"},
    "evaluation": {"_component_": "a.E", "batch_size": 8},
    "clip_grad_norm": None,
    "epochs": 1,
}


def read(*overrides):
    return OmegaConf.to_container(apply_overrides(OmegaConf.to_container(OmegaConf.create(FILE)), overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["epochs=3", "optimizer.lr=2e-5", "gradient_mask.dense=[a, b]", "new_key={a: 1}"],
        ["optimizer=torch.optim.SGD", "optimizer.momentum=0.9", "clip_grad_norm=None"],
        ["~gradient_mask.density", "~epochs", "tokenizer.max_filename=00002", "gradient_mask.seed=null"],
        [],
    ],
    ids=lambda overrides: " ".join(overrides) or "none",
)
def test_overrides_mean_what_they_mean_to_torchtune(overrides):
    from argparse import Namespace

    theirs = _merge_yaml_and_cli_args(Namespace(**OmegaConf.to_container(OmegaConf.create(FILE))), overrides)
    assert read(*overrides) == OmegaConf.to_container(theirs)


@pytest.mark.parametrize("section", ["gradient_mask", "dataset_val", "profiler", "optimizer"])
@pytest.mark.parametrize("form", ["~{}", "{}=null", "{}=None", "{}=~", "{}=NULL"])
def test_null_and_tilde_leave_a_section_out(section, form):
    assert read(form.format(section)) == {**FILE, section: None}


def test_the_last_override_of_a_section_decides():
    assert read("gradient_mask.density=0.5", "~gradient_mask")["gradient_mask"] is None
    back = read("gradient_mask=null", "gradient_mask.density=0.5")["gradient_mask"]
    assert back == {**FILE["gradient_mask"], "density": 0.5}


def test_a_value_may_hold_an_equals_sign_and_a_section_within_a_section_can_go():
    assert read("tokenizer.path=/a=b/c")["tokenizer"]["path"] == "/a=b/c"
    assert read("~tokenizer.prompt")["tokenizer"] == {k: v for k, v in FILE["tokenizer"].items() if k != "prompt"}


def test_the_text_none_is_null_in_a_file_too():
    cfg = apply_overrides({"clip_grad_norm": "None", "seed": 1}, [])
    assert cfg == {"clip_grad_norm": None, "seed": 1}


@pytest.mark.parametrize(
    ("override", "right", "value"),
    [
        ("gradient_mask.dense=[*norm*]", "'gradient_mask.dense=[\"*norm*\"]'", ["*norm*"]),
        ("gradient_mask.frozen=[a*,*b, !x]", '\'gradient_mask.frozen=["a*", "*b", "!x"]\'', ["a*", "*b", "!x"]),
        ("gradient_mask.dense=*norm*", "'gradient_mask.dense=[\"*norm*\"]'", ["*norm*"]),
        ("gradient_mask.dense=[h.[0-9].*]", "'gradient_mask.dense=[\"h.[0-9].*\"]'", ["h.[0-9].*"]),
        ("dataset.data_files=*.jsonl", "'dataset.data_files=\"*.jsonl\"'", "*.jsonl"),
        ("dataset.source=@me", "'dataset.source=\"@me\"'", "@me"),
    ],
)
def test_text_that_is_no_yaml_gets_the_quoting_that_works(override, right, value):
    with pytest.raises(UserError, match="on the command line cannot be read as YAML") as caught:
        read(override)
    assert str(caught.value).endswith(f": write {right}")
    (typed,) = shlex.split(right)  # as a shell gives it to the program
    assert OmegaConf.select(OmegaConf.create(read(typed)), override.partition("=")[0]) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nonsense", "nonsense on the command line must be in the form of key=value"),
        ("x=[a", r"x=\[a on the command line cannot be read as YAML \(.*\): check its brackets and quotes"),
        ("x=${a", r"x=\$\{a on the command line cannot be read as YAML \(.*\): check its brackets and quotes"),
        ("~no.such", "~no.such on the command line: the config has no key no.such that could be removed"),
    ],
)
def test_an_override_that_cannot_be_read_is_named(override, message):
    with pytest.raises(UserError, match=message):
        read(override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  dense: [*norm*]\n", r'line 3, .*: write "\*norm\*", with the quotes'),
        ("dense:\n  - *norm\n", r'line 2, .*: write "\*norm", with the quotes'),
        ("a: [1\nb: 2\n", r"cannot be read as YAML \(line 2, "),
        ("- 1\n", "is no config: it must be a YAML file of keys and values"),
        ("hello\n", "is no config: it must be a YAML file of keys and values"),
        ("", "is no config: it must be a YAML file of keys and values"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(text, message, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_file(tmp_path / "config.yaml")


def test_a_config_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no\.yaml cannot be read \(No such file or directory\)"):
        read_file(tmp_path / "no.yaml")


def test_tilde_is_the_home_folder_in_every_path_of_a_config(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = OmegaConf.create(
        {
            "output_dir": "~/runs/${name}",
            "name": "a~b",
            "models": {"base": "~/models", "all": ["~/first"]},
            "also_models": "${models.base}",
            "whole_section": "${others}",
            "others": {"x_of_no_path": "~/z"},
            "log_dir": "${whole_section.x_of_no_path}/logs",
            "metric_logger": {"log_dir": "${output_dir}/logs"},
            "checkpointer": {
                "checkpoint_dir": "${also_models}/a",
                "checkpoint_files": ["~/a", "b~"],
                "n": 3,
                "x": None,
            },
            "tokenizer": {"base": "~/tokens", "path": "${.base}/t.json", "merges_file": "${models[all][0]}"},
            "dataset": [{"data_files": {"train.v1": "~/one.jsonl"}}, {"source": "~/two"}],
        }
    )
    expand_home(cfg)
    assert OmegaConf.to_container(cfg, resolve=True) == {
        "output_dir": "/home/me/runs/a~b",
        "name": "a~b",
        "models": {"base": "/home/me/models", "all": ["/home/me/first"]},
        "also_models": "/home/me/models",
        "whole_section": {"x_of_no_path": "/home/me/z"},
        "others": {"x_of_no_path": "/home/me/z"},
        "log_dir": "/home/me/z/logs",
        "metric_logger": {"log_dir": "/home/me/runs/a~b/logs"},
        "checkpointer": {
            "checkpoint_dir": "/home/me/models/a",
            "checkpoint_files": ["/home/me/a", "b~"],
            "n": 3,
            "x": None,
        },
        "tokenizer": {"base": "/home/me/tokens", "path": "/home/me/tokens/t.json", "merges_file": "/home/me/first"},
        "dataset": [{"data_files": {"train.v1": "/home/me/one.jsonl"}}, {"source": "/home/me/two"}],
    }


def test_what_is_no_path_and_what_an_environment_variable_holds_stays_as_it_is_written(monkeypatch):
    monkeypatch.setenv("GIVEN_BY_A_JOB", "~/jobs")
    values = {
        "dataset": {"sep": "~", "prompt": ["~/x is home"], "source": "~", "data_dir": "???"},
        "metric_logger": {"log_dir": "${oc.env:GIVEN_BY_A_JOB}", "filename": "${oc.env:GIVEN_BY_A_JOB}/x"},
        "output_dir": "${metric_logger.log_dir}/y",
        "a_dir": "${b_dir}/in_a_circle",
        "b_dir": "${a_dir}",
        "c": "${d.e}",
        "d": "${c.e}",
        "c_dir": "${c.e}/in_a_circle_of_sections",
    }
    cfg = OmegaConf.create(values)
    expand_home(cfg)
    assert OmegaConf.to_container(cfg, resolve=False) == values


def test_an_interpolation_that_leads_nowhere_is_left_to_the_check():
    register_resolver()
    cfg = apply_overrides(
        {"a_dir": "${no.such_key}", "b_dir": "~/x", "c_dir": "${gmt_asset:none}"}, ["d_dir=${nothing}"]
    )
    expand_home(cfg)
    assert OmegaConf.to_container(cfg)["a_dir"] == "${no.such_key}" and "~" not in cfg.b_dir
