"""LLaMA-Factory with a gradient mask: ``llamafactory-cli train config.yaml``, and one more line.

    pip install llamafactory "gmt-tune[transformers]"
    python llamafactory_train.py config.yaml
    torchrun --nproc_per_node 2 llamafactory_train.py config.yaml

The config is an ordinary one of LLaMA-Factory (``finetuning_type: full``; with ``lora`` the adapters are masked);
``key=value`` behind it replaces a key, as ever. Each log line shows what the mask did, each checkpoint holds it.
"""

from llamafactory.train.tuner import run_exp

from gmt_tune.integrations.transformers import GradientMaskCallback

if __name__ == "__main__":
    run_exp(callbacks=[GradientMaskCallback(density=0.2, dense=["*norm*"])])
