"""The comments beside ``dataset`` that say what to write for a file of one's own: uncommented, they are right."""

import json
import re

import pytest
import yaml
from omegaconf import OmegaConf
from torchtune.config import validate

from gmt_tune.integrations.torchtune.config.check import check_keys
from gmt_tune.integrations.torchtune.plugin.assets import asset, register_resolver
from gmt_tune.integrations.torchtune.plugin.registry import config_paths, recipe_of
from gmt_tune.integrations.torchtune.run.data import build_dataset
from gmt_tune.integrations.torchtune.run.preference import OWN_KEYS, check_preference_config
from gmt_tune.models.chatml import ChatMLTokenizer

QUESTION, ANSWER = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
ROWS = {
    "chat_dataset": {"messages": [QUESTION, ANSWER]},
    "instruct_dataset": {"question": "1 + 1?", "answer": "2"},
    "text_completion_dataset": {"text": "1 + 1 is 2"},
    "preference_dataset": {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, {**ANSWER, "content": "3"}]},
}
SFT = ["chat_dataset", "instruct_dataset", "text_completion_dataset"]
# Configs whose data sets have other keys than a component, and none
BLOCKS = [(name, component) for name in ("llama3_1/8B_gmt", "llama3/8B_gmt_metamath") for component in SFT]
BLOCKS += [("llama3_1/8B_gmt_dpo", "preference_dataset")]


def uncommented(text: str, component: str) -> str:
    """A config's text with a block in place of what ``dataset`` was, as an editor uncomments it."""
    section = re.search(r"^dataset:.*\n((?:  .*\n)+)", text, re.MULTILINE)
    lines = section[1].splitlines()
    first = lines.index(f"  # _component_: torchtune.datasets.{component}")
    block = []
    while first + len(block) < len(lines) and re.match("  # [a-z_]+: ", lines[first + len(block)]):
        block.append(lines[first + len(block)].replace("# ", "", 1))
    return text.replace(section[1], "".join(f"{line}\n" for line in block))


@pytest.mark.parametrize(("name", "component"), BLOCKS)
def test_a_block_for_ones_own_file_is_a_dataset_when_uncommented(name, component, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = OmegaConf.create(uncommented(config_paths()[name].read_text(), component))
    assert cfg.dataset._component_ == f"torchtune.datasets.{component}"
    register_resolver()
    validate(cfg)  # instantiates nothing: names and arguments
    check_keys(cfg, OWN_KEYS if recipe_of(name) == "gmt_full_dpo" else ())
    if recipe_of(name) == "gmt_full_dpo":
        check_preference_config(cfg)
    with open(cfg.dataset.data_files, "w") as file:
        file.write(f"{json.dumps(ROWS[component])}\n" * 2)
    rows, _ = build_dataset(cfg.dataset, ChatMLTokenizer(asset("quickstart/tokenizer.json"), max_seq_len=64))
    assert len(rows) == 2 and len(rows[0].get("tokens") or rows[0]["chosen_input_ids"]) > 2


def test_every_config_of_a_released_model_has_the_blocks():
    for name, path in config_paths().items():
        text = path.read_text()
        own = {
            yaml.safe_load(line.replace("# ", "", 1))["_component_"].rpartition(".")[2]
            for line in re.findall(r"^  # _component_: .*", text, re.MULTILINE)
        }
        if name.startswith(("quickstart", "smollm2")):
            assert "docs/data.md" in text, name
        else:
            assert own == (set(SFT) if recipe_of(name) == "gmt_full_finetune" else {"preference_dataset"}), name
