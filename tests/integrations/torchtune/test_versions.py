"""torchtune 0.6.1 with an old torchao, the newest, and one that cannot work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gmt_tune.integrations.torchtune.plugin import versions

TUNE = Path(sys.executable).parent / "tune"


@pytest.fixture(scope="session")
def torchao_folder(tmp_path_factory):
    """Function that installs one torchao release into a folder of its own, for PYTHONPATH."""

    def install(version: str) -> str:
        folder = tmp_path_factory.getbasetemp() / f"torchao-{version}"
        if not folder.exists():
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
            done = subprocess.run([*command, f"torchao=={version}"], capture_output=True, text=True)
            if done.returncode != 0:
                pytest.fail(f"torchao {version} cannot be installed: {done.stderr.strip()[-500:]}")
        return str(folder)

    return install


def run(command, cwd, **environment):
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )


USE_EVERYTHING = """
import torchao, torchtune, torchtune.training, torchtune.modules.peft, torchtune.training.quantization
from importlib.metadata import version
from torchtune.modules.common_utils import NF4Tensor
from torchao.optim import AdamW8bit
print("imported with", version("torchao"))
"""


# The oldest always; 0.15.0 is imported below too, and the installed one, of the newer kind, by every test that trains
OLDEST = pytest.param("0.11.0", marks=pytest.mark.needs_network)
SEEN_ELSEWHERE = [
    *(pytest.param(v, marks=[pytest.mark.slow, pytest.mark.needs_network]) for v in ("0.15.0", "0.16.0")),
    pytest.param("installed", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("version", [OLDEST, *SEEN_ELSEWHERE])
def test_torchtune_imports_with_old_and_new_torchao(version, torchao_folder, tmp_path):
    environment = {} if version == "installed" else {"PYTHONPATH": torchao_folder(version)}
    done = run([sys.executable, "-c", USE_EVERYTHING], tmp_path, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("imported with " + ("0." if version == "installed" else version))


@pytest.mark.needs_network
def test_an_unusable_torchao_ends_tune_with_one_sentence_and_the_pip_line(torchao_folder, tmp_path):
    done = run([TUNE, "ls"], tmp_path, PYTHONPATH=torchao_folder("0.12.0"))
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    sentence = done.stderr.strip().splitlines()[-1]
    assert sentence.startswith("gmt-tune: torchao 0.12.0 does not work with torchtune 0.6.1")
    assert sentence.endswith(f"run: {versions.pip_line()}")


def test_a_torchao_that_is_too_new_for_torch_is_one_sentence_with_the_pip_line(monkeypatch):
    installed = {"torch": "2.9.1+cpu", "torchao": "0.18.0", "torchtune": "0.6.1"}
    monkeypatch.setattr(versions, "installed_version", installed.get)
    with pytest.raises(ImportError, match=r"torchao 0\.18\.0 needs torch 2\.10 or newer, found 2\.9\.1.*<0\.18\""):
        versions.make_torchtune_importable()
    installed["torch"] = "2.10.0"
    assert versions._problem_of_versions() is None and versions.pip_line().endswith('<0.19"')


def test_a_name_that_torchao_removed_says_so_when_it_is_called():
    removed = versions._removed_function("torchao.quantization", "int4_weight_only", "0.18.0")
    with pytest.raises(NotImplementedError, match=r"int4_weight_only was removed .* install torchao 0\.15\.0"):
        removed(128)


@pytest.mark.needs_network
def test_what_torchao_still_has_is_left_alone(tmp_path, torchao_folder):
    code = (
        "import torchao.quantization as q; before = q.int4_weight_only; import torchtune.training; "
        "assert q.int4_weight_only is before; print('same')"
    )
    done = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=torchao_folder("0.15.0"))
    assert done.stdout.strip() == "same", done.stderr[-2000:]


def test_another_torchtune_is_refused_by_our_recipes_with_the_pip_line(monkeypatch):
    from gmt_tune.integrations.torchtune.run.base_recipes import load_base_recipe

    monkeypatch.setattr(versions, "installed_version", lambda name: "0.5.0")
    with pytest.raises(SystemExit, match=r"works with torchtune 0\.6\.1, found 0\.5\.0: run pip install"):
        load_base_recipe("full_finetune_distributed")
