"""The table of keys: every key of every config is in it, with the default that the recipe and the mask have."""

import importlib.util
import inspect
import shutil
import sys
from pathlib import Path

import pytest
from doc_fences import ROOT, _apply_diff, fences_of
from omegaconf import DictConfig, ListConfig, OmegaConf

from gmt_tune import GradientMask
from gmt_tune.integrations.torchtune.config import keys
from gmt_tune.integrations.torchtune.config.check import refers_to
from gmt_tune.integrations.torchtune.config.keys import GROUPS, KEYS, find, may_differ
from gmt_tune.integrations.torchtune.plugin.registry import config_paths

CONFIGS = config_paths()


def keys_of(cfg: DictConfig) -> set[str]:
    """Keys of a config and of its sections, without what users may name themselves."""
    text = OmegaConf.to_yaml(cfg)
    found = {str(name) for name in cfg if find(str(name)) is not None or not refers_to(text, str(name))}
    for name in cfg:
        sections = cfg[name] if isinstance(cfg[name], ListConfig) else [cfg[name]]
        parts = [part for part in sections if isinstance(part, DictConfig)]
        found |= {f"{name}.{key}" for part in parts for key in part if key != "_component_"}
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_of_a_config_is_in_the_table(name):
    assert [key for key in sorted(keys_of(OmegaConf.load(CONFIGS[name]))) if find(key) is None] == []


@pytest.mark.parametrize("key", ["brand_new_key", "dataset.brand_new_key", "dataset_val.brand_new_key"])
def test_a_key_that_the_table_lacks_is_found_in_a_config(key):
    cfg = OmegaConf.load(CONFIGS["llama2/7B_gmt_dpo"])
    OmegaConf.update(cfg, key, 1)
    assert [found for found in keys_of(cfg) if find(found) is None] == [key]


def test_a_new_key_is_one_entry_as_contributing_shows(tmp_path):
    (diff,) = (fence for fence in fences_of(ROOT / "CONTRIBUTING.md") if fence.language == "diff")
    for suffix in (".py", ".yaml"):
        shutil.copy(Path(keys.__file__).with_suffix(suffix), tmp_path)
    _apply_diff(diff, tmp_path / "keys.yaml")
    spec = importlib.util.spec_from_file_location("changed_keys", tmp_path / "keys.py")
    changed = sys.modules["changed_keys"] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(changed)
    (new,) = changed.KEYS.keys() - KEYS.keys()
    assert changed.may_differ(new) and changed.KEYS[new].shown and new in diff.text
    assert changed.KEYS[new].takes.allows(1) and not changed.KEYS[new].takes.allows(0)


def test_every_key_stands_once_and_says_what_it_does():
    assert len(KEYS) == sum(map(len, GROUPS.values()))
    assert [key.name for key in KEYS.values() if not key.comment or "\n" in key.comment] == []


def test_a_default_is_a_value_that_the_key_takes():
    optional = [key for key in KEYS.values() if "." not in key.name and not key.needed and not key.recipe]
    assert [key.name for key in optional if key.default == "" or not key.takes.allows(key.default)] == []


def test_the_masks_keys_and_defaults_are_those_of_gradient_mask():
    parameters = dict(inspect.signature(GradientMask).parameters)
    del parameters["named_parameters"], parameters["error_if_nonfinite"]  # which the recipe sets
    assert KEYS["gradient_mask.density"].needed and parameters.pop("density").default is inspect.Parameter.empty
    ours = {name: KEYS[f"gradient_mask.{name}"].default for name in parameters}
    theirs = {name: list(p.default) if isinstance(p.default, tuple) else p.default for name, p in parameters.items()}
    assert ours == theirs


@pytest.mark.parametrize(
    ("key", "is_free"),
    [
        ("output_dir", True),
        ("checkpointer.checkpoint_files[0]", True),
        ("dataset_val[1].source", True),
        ("ref_checkpointer.output_dir", True),
        ("ref_checkpointer.checkpoint_dir", False),
        ("dataset[0].split", False),
        ("optimizer.lr", False),
        ("gradient_mask.density", False),
        ("seed", False),
        ("my_variable", False),
    ],
)
def test_a_resumed_run_may_change_what_changes_no_number_of_the_training(key, is_free):
    assert may_differ(key) == is_free
