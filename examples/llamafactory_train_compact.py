"""LLaMA-Factory with a compact optimizer: gradients and states of a twentieth of the entries.

    pip install llamafactory "gmt-tune[transformers]"
    python llamafactory_train_compact.py config.yaml

The config is an ordinary one of LLaMA-Factory with ``finetuning_type: full``. Rate, betas, decay, schedule and clipping
are the config's; its ``optim`` says the bits of the moments: ``adamw_torch`` 32, ``adamw_torch_8bit`` 8.
"""

from llamafactory.train.tuner import run_exp

from gmt_tune.integrations.transformers import GradientMaskCallback

if __name__ == "__main__":
    run_exp(callbacks=[GradientMaskCallback(density=0.05, refresh_every=20, dense=["*norm*"], compact=True)])
