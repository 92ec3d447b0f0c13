"""What other packages print that is of no use to the reader: exactly these messages, only where they come of gmt_tune.

- torchao tries to load its CUDA extensions when it is imported, and warns of each that it cannot: of no use on a
  machine without a GPU. Some of its classes are registered in a way that newer releases of PyTorch warn about.
- torchdata, whose development has slowed, calls a function that PyTorch calls deprecated; so does PyTorch 2.9 itself,
  when it saves a checkpoint.
- torchtune's checkpointer reports each file under a temporary name, where the run says itself what it has saved.
"""

import contextlib
import logging
import re
import threading
import warnings
from collections.abc import Iterator

_WITHOUT_GPU = re.compile(r"Failed to load .*\.so: |Skipping import of cpp extensions")
_REGISTRATION = "%s is an Enum subclass and is now natively supported by"


def _is_worth_reading_of_torchao(record: logging.LogRecord) -> bool:
    import torch

    return _WITHOUT_GPU.match(record.getMessage()) is None or torch.cuda.is_available()


def _is_worth_reading_of_pytree(record: logging.LogRecord) -> bool:
    if not (str(record.msg).startswith(_REGISTRATION) and isinstance(record.args, tuple)):
        return True
    return not str(getattr(record.args[0], "__module__", "")).startswith("torchao.")


def quiet_imports() -> None:
    """Called before torchao or torchdata is imported because of us; again, it changes nothing."""
    logging.getLogger("torchao").addFilter(_is_worth_reading_of_torchao)
    logging.getLogger("torch.utils._pytree").addFilter(_is_worth_reading_of_pytree)
    warnings.filterwarnings("ignore", "'set_vital' is deprecated", UserWarning, r"torchdata\.stateful_dataloader\.")
    warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning, r"torch\.distributed\.checkpoint\.")


@contextlib.contextmanager
def quieter(logger: logging.Logger, lowest: int = logging.WARNING) -> Iterator[None]:
    """Keep what a logger is given by this thread, below a level, from being shown."""
    thread = threading.get_ident()

    def is_high(record: logging.LogRecord) -> bool:
        return record.levelno >= lowest or record.thread != thread

    logger.addFilter(is_high)
    try:
        yield
    finally:
        logger.removeFilter(is_high)
