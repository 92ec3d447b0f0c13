"""transformers, accelerate and TRL that cannot work are named with the pip line that mends it."""

import subprocess
import sys

import pytest

from gmt_tune.integrations.transformers import versions

GOOD = {"transformers": "4.55.4", "accelerate": "1.6.0", "trl": "0.18.2"}


@pytest.fixture
def installed(monkeypatch):
    """Function that makes these versions, over good ones, the installed ones."""
    return lambda **found: monkeypatch.setattr(versions, "installed_version", {**GOOD, **found}.get)


@pytest.mark.parametrize(
    "found", [{}, {"transformers": "5.24.0", "trl": "1.16.0"}, {"trl": None}, {"accelerate": "1.15.0"}]
)
def test_versions_that_work_pass(installed, found):
    installed(**found)
    versions.check_versions()
    assert versions.problem_of_trl() is None


@pytest.mark.parametrize(
    "found, sentence",
    [
        ({"transformers": "4.54.1"}, r'transformers>=4.55, found 4.54.1: run pip install "transformers>=4.55"'),
        (
            {"transformers": "4.9.2", "accelerate": None},
            'transformers>=4.55 and accelerate>=1.6, found 4.9.2 and none: run pip install "transformers>=4.55" "acc',
        ),
    ],
)
def test_what_is_too_old_is_refused_with_the_remedy(installed, found, sentence):
    installed(**found)
    with pytest.raises(ImportError) as refused:
        versions.check_versions()
    assert sentence in str(refused.value)


def test_a_trl_that_does_not_import_beside_transformers_is_named(installed):
    installed(transformers="5.6.0", trl="0.24.0")
    assert versions.problem_of_trl() == (
        'TRL 0.24.0 cannot be imported with transformers 5.6.0: for its trainers, run pip install "trl>=0.29"'
    )


def test_importing_the_integration_checks_first():
    program = """
import importlib.metadata as metadata
found = metadata.version
metadata.version = lambda name: "4.30.0" if name == "transformers" else found(name)
import gmt_tune.integrations.transformers
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: gmt-tune's integration needs transformers>=4.55, found 4.30.0: "
        'run pip install "transformers>=4.55"'
    )
