"""What other packages print without need is kept quiet, that alone, and only where it comes of gmt_tune."""

import logging
import subprocess
import sys
import warnings

import pytest
import torch

from gmt_tune._quiet import quiet_imports, quieter

UNLOADED = "Failed to load /somewhere/torchao/_C_cutlass_90a.abi3.so: Could not load this library"
SKIPPED = "Skipping import of cpp extensions due to incompatible torch version. Please upgrade to torch >= 2.11.0"


@pytest.mark.parametrize("has_gpu", [False, True])
def test_what_torchao_says_of_its_extensions_is_quiet_without_a_gpu_and_all_else_is_not(has_gpu, caplog, monkeypatch):
    quiet_imports()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    for message in (UNLOADED, SKIPPED, "Failed to load a config", "something else"):
        logging.getLogger("torchao").warning(message)
    extensions = [UNLOADED, SKIPPED] if has_gpu else []
    assert [record.message for record in caplog.records] == [*extensions, "Failed to load a config", "something else"]


def test_pytorch_goes_on_to_warn_of_registrations_by_others(caplog, monkeypatch):
    quiet_imports()
    logger = logging.getLogger("torch.utils._pytree")
    monkeypatch.setattr(logger, "propagate", True)
    said = "%s is an Enum subclass and is now natively supported by torch.compile as an opaque value type."
    for module in ("torchao.quantization.kernel", "users.module"):
        logger.warning(said, type("Preference", (), {"__module__": module}))
    logger.warning("another warning")
    found = [record.message for record in caplog.records if record.name == logger.name]
    assert len(found) == 2 and "users.module" in found[0] and found[1] == "another warning"


@pytest.mark.parametrize(
    "message, module",
    [
        ("'set_vital' is deprecated, please do not call", "torchdata.stateful_dataloader.stateful_dataloader"),
        ("TypedStorage is deprecated. It will be removed", "torch.distributed.checkpoint.filesystem"),
    ],
)
def test_a_deprecated_call_of_ones_own_is_warned_of(message, module):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_imports()
        for name in (module, "users.module"):
            warnings.warn_explicit(message, UserWarning, "file.py", 1, module=name)
    assert len(caught) == 1


def test_a_logger_is_quieter_for_a_while_and_for_this_thread(caplog):
    logger = logging.getLogger("of this test")
    logger.setLevel(logging.INFO)
    with quieter(logger):
        logger.info("left out")
        logger.warning("a warning")
    logger.info("said")
    assert [record.message for record in caplog.records] == ["a warning", "said"]


@pytest.mark.slow  # each imports PyTorch
@pytest.mark.parametrize(
    "code",
    [
        "from gmt_tune import CompactAdamW",
        "from gmt_tune.integrations.transformers import GradientMaskCallback",
        "from transformers import Trainer; from gmt_tune import GradientMask",
        "import peft",
    ],
)
def test_importing_prints_nothing_and_torchao_by_itself_is_left_alone(code):
    said = [
        subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True).stderr
        for line in (code, "import torchao")
    ]
    assert said[0] == "" != said[1]
