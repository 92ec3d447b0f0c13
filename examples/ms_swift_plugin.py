"""ms-swift with a gradient mask, or with a compact optimizer: a plugin for ``swift sft``, ``swift pt``, ``swift rlhf``.

    pip install ms-swift "gmt-tune[transformers]"
    swift sft --external_plugins ms_swift_plugin.py --callbacks gradient_mask --tuner_type full --model ...

With ``gradient_mask_compact``, gradients and optimizer states exist for the selected entries alone. Rate, betas, decay,
schedule and clipping are those of the command line; its ``--optim`` says the bits of the moments: ``adamw_torch`` 32,
``adamw_torch_8bit`` 8. With adapters (``--tuner_type lora``), the adapters are masked.
"""

from swift.callbacks import callbacks_map

from gmt_tune.integrations.transformers import GradientMaskCallback


def gradient_mask(args, trainer) -> GradientMaskCallback:
    """The largest fifth of each tensor's gradient is applied; any optimizer."""
    return GradientMaskCallback(density=0.2, dense=["*norm*"])


def gradient_mask_compact(args, trainer) -> GradientMaskCallback:
    """A twentieth of the entries has gradients and states; the others stand still. Layers take turns."""
    return GradientMaskCallback(density=0.05, refresh_every=20, dense=["*norm*"], compact=True)


callbacks_map["gradient_mask"] = gradient_mask
callbacks_map["gradient_mask_compact"] = gradient_mask_compact
