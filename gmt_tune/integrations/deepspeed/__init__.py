"""DeepSpeed's ZeRO, stages 1 to 3: the mask on the flat gradient that the wrapped optimizer is about to apply."""

from gmt_tune.integrations.deepspeed.zero import register, zero_optimizer

__all__ = ["register", "zero_optimizer"]
