"""A rule of one's own for when selections are made: often at first, seldom later. It survives an interruption.

Run it in this folder, which ``tune`` searches for modules; it takes two minutes on a CPU:

    tune run gmt_full_finetune --config quickstart gradient_mask._component_=own_rule.OftenFirst \
        output_dir=/tmp/own_rule save_every_n_steps=5

Interrupt it (Ctrl-C) and add ``resume_from_checkpoint=True`` to the same line: it ends with the same weights, bit for
bit, as a run that was not interrupted. With another rule, or ``gradient_mask.growth=3``, it is refused.
"""

from gmt_tune import GradientMask


class OftenFirst(GradientMask):
    """Makes new selections at the steps 0, 1, 2, 4, 8, ...: the powers of ``growth``.

    Args:
        named_parameters, density, **options: as GradientMask takes them; ``refresh_every`` means nothing here.
        growth: by what the steps between two selections grow, a whole number from 2 on.
    """

    def __init__(self, named_parameters, density, *, growth=2, **options):
        super().__init__(named_parameters, density, **options)
        if not isinstance(growth, int) or growth < 2:
            raise ValueError(f"growth must be a whole number from 2 on, got {growth!r}")
        self.growth = growth

    def refreshes(self, name, step):
        while step > 1 and step % self.growth == 0:
            step //= self.growth
        return step <= 1

    def policy(self):
        return {**super().policy(), "growth": self.growth}
