"""Lets ``tune run gmt_full_dpo`` work where PyTorch's autoload is switched off.

torchtune runs a recipe name that it does not know as an importable module. This one finds our config by
its name, as ``tune`` would have done, and runs the recipe's file.
"""

import sys

from gmt_tune.integrations.torchtune.plugin.registry import run_unregistered

if __name__ == "__main__":
    run_unregistered("gmt_full_dpo", sys.argv)
