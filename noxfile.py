"""The rows of the README's table of versions: each runs, in an environment of its own, what its versions could break.

    pip install nox
    nox --list                        # all rows; `nox` alone runs them all
    nox -s "versions(torch-2.6)"      # one of them

A row's Python must be on the PATH (``python3.10``). Where pip finds only PyTorch's builds for CUDA, an environment
takes 6 GB; ``PIP_EXTRA_INDEX_URL`` can name an index of smaller ones. What a row leaves open is the newest release.
"""

from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = True

TRAINER = ["tests/integrations/transformers"]
# The mask, several processes, the compact optimizer, `tune` from an empty folder, and the Trainer
ALL = [
    "tests/masking/test_gradient_mask.py",
    "tests/masking/test_native.py",
    "tests/masking/test_sharded.py",
    "tests/masking/test_compiled_step.py",
    "tests/optim/test_compact_adamw.py",
    "tests/optim/test_compact_checkpoints.py",
    "tests/optim/test_memory.py",
    "tests/optim/test_native.py",
    "tests/optim/test_states.py",
    "tests/recipes/test_quickstart.py",
    "tests/integrations/transformers/test_trainer_compact.py",
    "tests/integrations/transformers/test_trainer_steps.py",
    "tests/integrations/transformers/test_trl.py",
]
OLDEST_HOSTS = ["transformers==4.55.*", "accelerate==1.6.*", "trl==0.18.*"]
OLDEST_TORCH = ["torch==2.6.*", "torchao==0.11.*", "peft==0.18.*"]  # later PEFT refuses torchao before 0.16

VERSIONS = {
    # row: Python, what differs from the newest releases, tests
    "transformers-oldest": ("3.11", [*OLDEST_TORCH, *OLDEST_HOSTS], TRAINER),
    "transformers-newest": ("3.11", ["torch==2.13.*"], TRAINER),
    "torch-2.6": ("3.11", OLDEST_TORCH, ALL),
    "torch-2.9": ("3.11", ["torch==2.9.*", "torchao==0.17.*"], ALL),
    "torch-2.13": ("3.11", ["torch==2.13.*"], ALL),
    "torch-newest": ("3.11", [], ALL),
    "python-3.10": ("3.10", ["torch==2.9.*", "torchao==0.17.*"], ALL),
    "python-3.12": ("3.12", ["torch==2.13.*"], ALL),
    "python-3.13": ("3.13", ["torch==2.13.*"], ALL),
}
# Trainers that bring pins of their own: a folder of tests/integrations with a requirements.txt is a row
HOSTS = sorted(file.parent.name for file in Path(__file__).parent.glob("tests/integrations/*/requirements.txt"))
WITHOUT_THEIR_DEPENDENCIES = {  # packages for GPUs, clouds and web pages, which the tests do not need
    "axolotl": ["axolotl==0.19.0"],
    "llamafactory": ["llamafactory==0.9.5"],
    "ms_swift": ["ms-swift==4.6.0"],
}


@nox.session
@nox.parametrize("python, differs, tests", list(VERSIONS.values()), ids=list(VERSIONS))
def versions(session, differs, tests):
    """A version of Python, torch, transformers, accelerate or TRL."""
    session.install(*differs, "-e", ".[test]")
    session.run("python", "-m", "pip", "list")
    session.run("pytest", *tests, *session.posargs)


@nox.session(python="3.11")
@nox.parametrize("name", HOSTS, ids=HOSTS)
def host(session, name):
    """A trainer with its own pins."""
    session.install("-r", f"tests/integrations/{name}/requirements.txt")
    session.install("--no-deps", *WITHOUT_THEIR_DEPENDENCIES.get(name, []), "-e", ".")
    session.run("pytest", f"tests/integrations/{name}", "-m", "slow or not slow", *session.posargs)


@nox.session(python="3.11")
def fake_cuda(session):
    """A simulated GPU, which needs PyTorch's build for CUDA."""
    session.install("-r", "tests/fake_cuda/requirements.txt", "-e", ".[test]")
    session.run("python", "-c", "import torch; assert torch.version.cuda, 'this is no build of PyTorch for CUDA'")
    session.run("pytest", "-m", "fake_cuda", *session.posargs)
