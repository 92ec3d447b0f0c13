"""A checkpoint's README.md is a model card that the hub's own parser reads; it says what was trained, and no secret."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from gmt_tune.integrations.torchtune.checkpoint.manifest import Progress, read_checkpoint
from gmt_tune.integrations.torchtune.checkpoint.model_card import _hub_dataset, model_card
from gmt_tune.integrations.torchtune.config.public import public_config
from gmt_tune.models.origin import Base, read_base

MASK = {"_component_": "gmt_tune.GradientMask", "density": 0.2, "dense": ["*norm*"]}
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
BASE_CARD = "---\nlicense: apache-2.0\nlicense_link: https://example.com/terms\nlanguage: en\n---\n# The base\n"


@pytest.fixture
def base(tiny_world, tmp_path) -> Path:
    """A model's folder as `tune download` leaves it: with a card, a licence and a chat template."""
    folder = tmp_path / "people" / "alice" / "Tiny-1M"
    shutil.copytree(tiny_world / "model", folder)
    (folder / "README.md").write_text(BASE_CARD)
    (folder / "LICENSE").write_text("Apache License 2.0")
    (folder / "original_repo_id.json").write_text(json.dumps({"repo_id": "tiny-org/Tiny-1M"}))
    (folder / "chat_template.jinja").write_text(CHAT)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(CHAT)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "do_sample": False}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture
def config(base, tiny_config, tmp_path):
    """Function that gives the config of two steps on that folder."""

    def make(**changes) -> dict:
        made = tiny_config(tmp_path / "out", gradient_mask=MASK, **{"max_steps_per_epoch": 2, **changes})
        made["checkpointer"]["checkpoint_dir"] = str(base)
        return made

    return make


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("in_background", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_card_names_base_data_settings_numbers_and_versions(in_background, config, tmp_path, run_recipe):
    run_recipe(config(save_every_n_steps=1, enable_async_checkpointing=in_background, epochs=2))
    out = tmp_path / "out"
    card = card_of(out / "epoch_1")
    assert card.data.to_dict() == {
        "base_model": "tiny-org/Tiny-1M",
        "library_name": "transformers",
        "license": "apache-2.0",
        "license_link": "https://example.com/terms",
        "pipeline_tag": "text-generation",
        "tags": ["gmt-tune", "gradient-mask-tuning", "sft"],
    }
    for words in (
        "[tiny-org/Tiny-1M](https://huggingface.co/tiny-org/Tiny-1M)", "`epoch_1`, step 4 of 4",
        "| `dataset` | 64 | `instruct_dataset(source=json, data_files=train.jsonl, split=train",
        "GradientMask(score=magnitude, density=0.2", 'dense=["*norm*"]', "`AdamW(lr=0.001)`", "4 rows: `batch_size` 4",
        "`seed` | 5", "`LICENSE` in this folder came with it", "gmt-tune 0.", f"torch {torch.__version__}",
        "apply_chat_template",
    ):  # fmt: skip
        assert words in card.text, words
    assert not [name for name in ("alice", "people", str(tmp_path)) if name in card.content]
    # Each has the loss of its own step, also where the log has gone on
    losses = {
        line["step"]: line["loss"]
        for line in map(json.loads, (out / "run_log.jsonl").read_text().splitlines())
        if "loss" in line
    }
    steps = {"step_1": 1, "epoch_0": 2, "step_3": 3, "epoch_1": 4}
    for name, step in steps.items():
        assert f"| `loss` | {losses[step]:.4g} | {step} |" in card_of(out / name).text
    assert len(set(losses.values())) == len(steps)
    tokens = [read_checkpoint(out / name).progress.tokens for name in steps]
    assert tokens == sorted(set(tokens)) and f"{tokens[-1]:,}" in card.text
    # The rest of the base's folder is there, its own card is not
    for name in ("LICENSE", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        assert (out / "epoch_1" / name).is_file(), name
    assert (out / "epoch_1" / "generation_config.json").is_file()
    assert "# The base" not in card.content


def test_no_secret_of_the_config_and_no_path_is_in_a_card(config, tmp_path, run_recipe, monkeypatch):
    monkeypatch.setenv("DATA_PASSWORD", "hunter2-from-the-environment")
    made = config()
    made["dataset"]["storage_options"] = {"key": "AKIAIOSFODNN7EXAMPLE", "secret": "storage-secret-1234"}
    made["dataset"]["token"] = "hf_abcdefghijklmnopqrstuvwxyz"
    made["dataset"]["name"] = "${oc.env:DATA_PASSWORD}"
    made["metric_logger"]["api_key"] = "metric-logger-key-1234"
    made["tokenizer"]["path"] = "/home/alice/private/tokenizer.json"
    made["output_dir"] = "runs-of-alice/out"
    made["dataset"]["data_dir"] = "../alice/chats"
    made["dataset"]["new_system_prompt"] = "/be brief/"
    made["checkpointer"]["checkpoint_dir"] = "models/alice/Tiny"
    made["checkpointer"]["checkpoint_files"] = ["alice/model.safetensors"]
    made["optimizer"]["note"] = f"{Path.home()}/notes and s3://bucket/x"
    made["dataset"]["data_files"] = ["s3://alice:pw@bucket/a/rows.jsonl?sig=abcdef", "C:\\Users\\alice\\more.jsonl"]
    run_recipe(config())
    saved = read_checkpoint(tmp_path / "out" / "epoch_0")
    public = public_config(OmegaConf.create(made))
    monkeypatch.setattr(
        "sys.argv",
        ["/home/alice/r/gmt_full_finetune.py", "--config", "/home/alice/c/mine.yaml", "dataset.token=hf_abcdefghijklmno"
         "pqrstuvwxyz", "tokenizer.path=/home/alice/private/tokenizer.json", "~dataset_val",
         "dataset.data_files=[a,b]", "output_dir=runs-of-alice/out", "unknown=sesame-1234"],
    )  # fmt: skip
    text = model_card(
        saved.path,
        "epoch_0",
        Progress(**{**vars(saved.progress), "config": public}),
        base=read_base(Path(config()["checkpointer"]["checkpoint_dir"])),
        policy=None,
        parameters=1,
        is_hugging_face=True,
        run_dir=tmp_path / "out",
    )
    assert "rows.jsonl" in text and "more.jsonl" in text and "path=tokenizer.json" in text  # it has what it may have
    assert "tune run gmt_full_finetune --config mine.yaml 'dataset.token=***' tokenizer.path=tokenizer.json" in text
    assert "'~dataset_val' 'dataset.data_files=[rows.jsonl,more.jsonl]' output_dir=out\n" in text
    assert "new_system_prompt=/be brief/" in text
    leaked = ("hunter2", "AKIA", "secret-1234", "hf_abc", "key-1234", "alice", "bucket/a", "sig=", "sesame")
    assert [word for word in (*leaked, str(Path.home()) + "/") if word in text] == []


def test_a_card_that_a_person_has_changed_is_no_damage(config, tmp_path, run_recipe, final_weights):
    changes = dict(max_steps_per_epoch=4, save_every_n_steps=2)
    run_recipe(config(**changes))
    out = tmp_path / "out"
    wanted = final_weights(out)
    shutil.rmtree(out / "epoch_0")
    (out / "step_2" / "README.md").write_text("# My own words, with a secret recipe\n")
    tokens = read_checkpoint(out / "step_2").progress.tokens
    run_recipe(config(resume_from_checkpoint=True, **changes))
    assert (out / "step_2" / "README.md").read_text().startswith("# My own words")  # it is not written over
    assert read_checkpoint(out / "epoch_0").progress.tokens > tokens
    again = final_weights(out)
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)
    card = card_of(out / "epoch_0")
    assert card.data.base_model == "tiny-org/Tiny-1M" and "My own words" not in card.text
    (out / "epoch_0" / "README.md").unlink()
    assert read_checkpoint(out / "epoch_0").damage() is None
    (out / "epoch_0" / "config.json").write_text("{}")
    assert "config.json" in read_checkpoint(out / "epoch_0").damage()


def test_without_a_card_there_is_not_the_bases_either(config, tmp_path, run_recipe):
    run_recipe(config(save_model_card=False))
    folder = tmp_path / "out" / "epoch_0"
    assert (folder / "LICENSE").is_file() and not (folder / "README.md").exists()


def test_a_folder_loads_in_transformers_with_its_chat_template(config, base, tmp_path, run_recipe):
    run_recipe(config())
    folder = tmp_path / "out" / "epoch_0"
    tokenizer, of_base = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(base)
    messages = [{"role": "user", "content": "What is 1 plus 2?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == of_base.apply_chat_template(
        messages, tokenize=False
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == 2
    # The card's own lines
    code = card_of(folder).text.partition("```python\n")[2].partition("```")[0]
    exec(code.replace('folder = "."', f"folder = {str(folder)!r}"), {})


def test_a_checkpoint_that_transformers_does_not_load_does_not_say_so(config, tmp_path, run_recipe):
    made = config()
    first = tmp_path / "out" / "epoch_0"
    run_recipe(made)
    saved = read_checkpoint(first)
    base = Base("org/m", "org/m", weights="stored in 4 bits")
    parts = dict(base=base, policy={}, parameters=1, run_dir=tmp_path)
    text = model_card(first, "epoch_0", saved.progress, is_hugging_face=False, **parts)
    card = ModelCard(text)
    assert card.data.library_name is None and card.data.pipeline_tag is None and "AutoModel" not in text
    assert "\n[org/m](https://huggingface.co/org/m) (stored in 4 bits), trained further" in text
    assert "## Numbers" not in text  # there is no log in that folder


@pytest.mark.parametrize(
    ("files", "name", "repo_id", "license"),
    [
        ({}, "model", None, {}),
        # What its own training began with, or a folder of whoever trained it
        ({"config.json": '{"_name_or_path": "checkpoints/run3"}'}, "model", None, {}),
        ({"original_repo_id.json": '{"repo_id": "../m"}'}, "model", None, {}),
        ({"README.md": "---\nlicense:\n- mit\n- other\n---\n"}, "model", None, {"license": ["mit", "other"]}),
        ({"README.md": "\ufeff---\nlicense: mit\n---\n"}, "model", None, {"license": "mit"}),
        ({"README.md": b"---\nlicense: mit\n---\n# Caf\xe9\n"}, "model", None, {"license": "mit"}),
        (
            {"README.md": "---\nbase_model: org/b\ntags: [gmt-tune]\nlicense: mit\n---\n"},
            "org/b", "org/b", {"license": "mit"},
        ),
        ({"original_repo_id.json": '{"repo_id": "org/b", "weights": 4}'}, "org/b", "org/b", {}),
        ({"README.md": "---\nbase_model: org/b\n---\n"}, "model", None, {}),  # its base is not it
        ({"README.md": "---\n: [broken\n---\n", "original_repo_id.json": "[]"}, "model", None, {}),
        ({"README.md": "no front matter"}, "model", None, {}),
    ],
)  # fmt: skip
def test_a_base_is_what_its_folder_says(files, name, repo_id, license, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file, text in files.items():
        (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    base = read_base(folder)
    assert base == Base(name, repo_id, license)


def test_a_base_in_the_hubs_cache_is_named_by_its_folder(tmp_path):
    folder = tmp_path / "models--org--some-model" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    assert read_base(folder).repo_id == "org/some-model"


def test_data_sets_of_the_hub_are_named_also_where_they_are_a_components_default():
    assert _hub_dataset({"_component_": "torchtune.datasets.alpaca_dataset"}) == "tatsu-lab/alpaca"
    assert _hub_dataset({"_component_": "torchtune.datasets.chat_dataset", "source": "org/data"}) == "org/data"
    for source in ({"source": "json", "data_files": "org/data"}, {"source": "/home/a/data"}, {}):
        assert _hub_dataset({"_component_": "gmt_tune.data.quickstart_dataset", **source}) is None


@pytest.mark.slow
def test_two_processes_write_one_card_each_checkpoint(config, tmp_path, run_tune):
    (tmp_path / "mine.yaml").write_text(OmegaConf.to_yaml(config(save_every_n_steps=1)))
    run_tune(
        *("run", "--nproc_per_node", "2", "gmt_full_finetune", "--config", "mine.yaml", "optimizer.lr=2e-3"),
        cwd=tmp_path,
    )
    for name, step in (("step_1", 1), ("epoch_0", 2)):
        saved, card = read_checkpoint(tmp_path / "out" / name), card_of(tmp_path / "out" / name)
        assert saved.damage() is None and card.data.base_model == "tiny-org/Tiny-1M"
        assert f"step {step} of 2" in card.text and "on 2 processes" in card.text
        assert "tune run --nproc_per_node 2 gmt_full_finetune --config mine.yaml optimizer.lr=" in card.text
        assert f"{saved.progress.tokens:,}" in card.text  # of both


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_card_of_dpo_names_both_and_counts_tokens_of_pairs(processes, tmp_path, run_tune):
    launch = ("--nproc_per_node", "2") if processes == 2 else ()
    run_tune(
        *("run", *launch, "gmt_full_dpo", "--config", "quickstart_dpo", "max_steps_per_epoch=1", "epochs=1"),
        *("evaluation=null", "dataset_val=null", "run_val_every_n_steps=null", f"output_dir={tmp_path / 'out'}"),
        cwd=tmp_path,
    )
    folder = tmp_path / "out" / "epoch_0"
    card = card_of(folder)
    assert read_checkpoint(folder).damage() is None
    assert card.data.tags == ["gmt-tune", "gradient-mask-tuning", "dpo"]
    for words in ("after DPO with a gradient mask", "DPOLoss(beta=0.1", "tokens in pairs of answers", "step 1 of 1"):
        assert words in card.text, words
    assert f"on {processes} process" in card.text
