"""gmt-tune try: the shipped configs with data and a tokenizer of one's own, without weights, and what it refuses."""

import base64
import json
import os
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from slow_cases import slow_where
from tiny_families import FAMILIES
from torchtune import config as torchtune_config
from torchtune.data import Message

from gmt_tune.cli.dry_run.tiny_model import SIZES, tiny_model
from gmt_tune.cli.main import main
from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.config.release import described
from gmt_tune.integrations.torchtune.plugin.registry import config_paths

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = config_paths()
FULL_SIZE = [name for name in CONFIGS if name.partition("/")[0] in FAMILIES]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, Path]:
    """Files of rows: chats, and pairs of answers."""
    folder, rng = tmp_path_factory.mktemp("rows"), random.Random(0)
    files = {"chats": folder / "chats.jsonl", "pairs": folder / "pairs.jsonl"}
    with files["chats"].open("w") as chats, files["pairs"].open("w") as pairs:
        for _ in range(160):
            a, b = rng.randint(0, 99), rng.randint(0, 99)
            question = {"role": "user", "content": f"What is {a} plus {b}?"}
            right, wrong = ({"role": "assistant", "content": text} for text in (f"It is {a + b}.", "I do not know."))
            chats.write(json.dumps({"messages": [question, right]}) + "\n")
            pairs.write(json.dumps({"chosen": [question, right], "rejected": [question, wrong]}) + "\n")
    return files


def llama3_tokenizer(file: Path) -> None:
    """A vocabulary of Llama 3's size and form: bytes, and 127,744 words that no text has."""
    words = [bytes([b]) for b in range(256)] + [f"\0{i:06d}".encode() for i in range(127_744)]
    file.write_text("".join(f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(words)))


def downloaded(name: str, folder: Path, rows: dict[str, Path]) -> list[str]:
    """A model's folder with tokenizer and config.json alone, and the overrides that lead there and to own rows."""
    cfg = OmegaConf.load(CONFIGS[name])
    with torch.device("meta"):
        built = described(torchtune_config.instantiate(cfg.model))
    folder.mkdir(parents=True)
    family = name.partition("/")[0]
    release = {key: value for key, value in built.items() if value not in (None, "none")}
    release |= {"model_type": FAMILIES[family].kind, "rope_scaling": FAMILIES[family].values.get("rope_scaling")}
    (folder / "config.json").write_text(json.dumps(release))
    tokenizer = folder / Path(cfg.tokenizer.path).relative_to(cfg.checkpointer.checkpoint_dir)
    tokenizer.parent.mkdir(exist_ok=True)
    if family.startswith("llama3"):
        llama3_tokenizer(tokenizer)
    else:
        FAMILIES[family].write_tokenizer(folder, rows["chats"].read_text().splitlines())
    overrides = [f"checkpointer.checkpoint_dir={folder}", f"tokenizer.path={tokenizer}"]
    if "ref_checkpointer" in cfg:
        overrides.append(f"ref_checkpointer.checkpoint_dir={folder}")
        own = {"source": "json", "data_files": rows["pairs"], "split": "train"}
        return overrides + [
            f"{key}.{k}={v}" for key in ("dataset", "dataset_val") if cfg.get(key) for k, v in own.items()
        ]
    own = {"source": "json", "data_files": rows["chats"], "split": "train"}
    own |= {"conversation_column": "messages", "conversation_style": "openai"}
    given = {key for key in cfg.dataset if key not in ("_component_", "packed", *own)}
    overrides += ["dataset=torchtune.datasets.chat_dataset", *(f"dataset.{k}={v}" for k, v in own.items())]
    return [*overrides, *(f"~dataset.{key}" for key in given)]


def tried(name: str, folder: Path, rows: dict[str, Path], capfd, *more: str) -> str:
    output_dir = folder / "absent" / "out"
    overrides = downloaded(name, folder / "model", rows)
    assert main(["try", "--config", name, *overrides, f"output_dir={output_dir}", *more]) == 0, capfd.readouterr().err
    assert not (folder / "absent").exists()
    return capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_shipped_config_is_tried_without_weights(name, tmp_path, rows, capfd):
    out = tried(name, tmp_path, rows, capfd)
    for line in ("160 pairs" if "dpo" in name else "160 rows", "4 steps, loss", "bit for bit", "files are not in"):
        assert line in out, out


@pytest.mark.slow
def test_the_example_tries_an_8b_config_with_chats_of_ones_own(tmp_path, rows):
    downloaded("llama3_1/8B_gmt_compact", tmp_path / "llama", rows)
    example = ROOT / "examples" / "dry_run_8b.sh"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"MODEL": str(tmp_path / "llama"), "CHATS": str(rows["chats"])}
    command = ["bash", str(example), f"output_dir={tmp_path / 'out'}"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    for words in (
        "160 rows, all of them made into tokens",
        "20 steps, 20 an epoch",
        "bit for bit",
        "fits cards of 24 GB",
    ):
        assert words in said, said
    assert "4 of 4 files are not in" in said and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_numbers_of_the_data_and_the_schedule_are_those_of_the_real_run(tmp_path, tiny_config, tiny_world, capfd):
    changes = {"epochs": 3, "max_steps_per_epoch": None, "save_every_n_steps": 3, "gradient_accumulation_steps": 2}
    tiny = tiny_config(tmp_path / "out", **changes)
    tiny["tokenizer"]["max_seq_len"] = 30
    tiny["dataset_val"] = {**tiny["dataset"]}
    OmegaConf.save(tiny, tmp_path / "config.yaml")
    assert main(["try", "--config", str(tmp_path / "config.yaml")]) == 0
    out = " ".join(capfd.readouterr().out.split())
    from gmt_tune.models.chatml import ChatMLTokenizer

    tokenizer = ChatMLTokenizer(tiny["tokenizer"]["path"])
    lengths = []
    for line in (tiny_world / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        messages = [("user", row["question"]), ("assistant", row["answer"])]
        lengths.append(len(tokenizer.tokenize_messages([Message(role=r, content=c) for r, c in messages])[0]))
    cut = sum(length > 30 for length in lengths) / len(lengths)
    assert f"{int(statistics.median(lengths))} of a row (median), {max(lengths)} of the longest" in out
    assert cut > 0 and f"max_seq_len is 30, and {cut:.0%} are cut" in out
    # 64 rows, 8 a step; at steps 3, 6, 8, 9, 12, 15, 16, 18, 21, 24
    assert "24 steps, 8 an epoch, each of 8 rows" in out and "10 checkpoints" in out
    assert "held out 64 rows" in out and "validation val_loss" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("batch_sise=2", "batch_sise (2) on the command line is no key of this recipe: did you mean batch_size?"),
        ("dataset.data_files=absent.jsonl", "dataset.data_files absent.jsonl does not exist"),
        ("dataset.column_map.output=anser", "its rows have no column 'anser'"),
        ("batch_size=100", "dataset has 64 rows, but one optimizer step takes 100"),
        ("tokenizer.path=/absent/tokenizer.json", 'tune download <REPOSITORY> --output-dir'),
        ("checkpointer.checkpoint_dir=/absent", '--ignore-patterns "*.[bps]*"'),
        ("optimizer.lr=-1", "optimizer.lr must be a number from 0 on"),
    ],
)  # fmt: skip
def test_what_tune_run_refuses_ends_in_its_sentence(change, sentence, tmp_path, tiny_config, capfd):
    OmegaConf.save(tiny_config(tmp_path / "out"), tmp_path / "config.yaml")
    assert main(["try", "--config", str(tmp_path / "config.yaml"), change]) == 1
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("gmt-tune: ") and sentence in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_goes_wrong_in_the_small_run_ends_in_its_sentence_too(tmp_path, tiny_config, capfd, monkeypatch):
    (tmp_path / "failing_loss.py").write_text(
        "import torch\n"
        "class Loss(torch.nn.Module):\n    ignore_index = -100\n"
        "    def forward(self, logits, labels):\n        return logits.sum() * float('nan')\n"
    )
    monkeypatch.chdir(tmp_path)
    OmegaConf.save(tiny_config(tmp_path / "out", loss={"_component_": "failing_loss.Loss"}), "config.yaml")
    assert main(["try", "--config", "config.yaml"]) == 1
    assert "gmt-tune: the dry run ended: " in (error := capfd.readouterr().err) and "holds NaN" in error


QUICK = (
    "quickstart",
    "smollm2/135M_gmt_cpu",
    "gemma2/2B_gmt",
    "llama2/7B_gmt",
    "llama3_2/1B_gmt",
    "mistral_v0_3/7B_gmt",
)
QUICK += ("phi4/14B_gmt", "qwen2_5/0.5B_gmt", "qwen2_5/7B_gmt", "qwen3/0.6B_gmt")


@pytest.mark.parametrize("name", slow_where(lambda name: name not in QUICK, CONFIGS))
def test_the_small_model_is_of_the_same_family(name):
    section = OmegaConf.to_container(OmegaConf.load(CONFIGS[name]).model)
    with torch.device("meta"):
        real, small = torchtune_config.instantiate(OmegaConf.create(section)), tiny_model(section)
    assert sum(p.numel() for p in small.parameters()) < 50_000_000
    if name.startswith("quickstart"):  # small enough as it is
        assert small.state_dict().keys() == real.state_dict().keys()
        return
    assert len(small.layers) == SIZES["num_layers"]
    assert set(small.state_dict()) == {key for key in real.state_dict() if not _is_beyond(key)}
    sizes = {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"}
    sizes |= {"intermediate_size", "query_pre_attn_scalar"}
    same = {key: value for key, value in described(real).items() if key not in sizes}
    assert same == {key: value for key, value in described(small).items() if key not in sizes}


def _is_beyond(key: str) -> bool:
    number = re.match(r"layers\.(\d+)\.", key)
    return number is not None and int(number[1]) >= SIZES["num_layers"]


def test_a_builder_that_takes_no_sizes_is_refused_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "without_sizes.py").write_text(
        "from torch import nn\n"
        "from torchtune.modules import TransformerDecoder\n"
        "class Model(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.tok_embeddings = nn.Embedding(50_000, 1024)\n"
        "def builder():\n    return Model()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="without_sizes.builder cannot be built smaller, which a dry run needs"):
        tiny_model({"_component_": "without_sizes.builder"})
