"""How much memory a config will need, from the config alone: no weights, no network, no accelerator.

- ``states``: weights, gradients, optimizer states and the mask's stored bits. Exact: bytes of tensors whose
  shapes and dtypes are known, checked against real optimizers in the tests.
- ``sharding``: the part of each tensor that one device holds under FSDP2 and tensor parallelism.
- ``activations``: what the forward pass keeps, and the largest passing demand. An estimate.
- ``moments``: which of these are there at the same time, moment by moment of a training step.
- ``estimate``: a config in, rows per device out.
- ``simulation``: the same config's recipe on a simulated GPU, which the estimate is held against.
- ``cards``: which cards a total fits on.
"""

from gmt_tune.memory.cards import CARDS, cards_that_fit
from gmt_tune.memory.estimate import Estimate, Row, estimate

__all__ = ["CARDS", "Estimate", "Row", "cards_that_fit", "estimate"]
