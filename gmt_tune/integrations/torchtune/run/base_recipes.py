"""Loads torchtune's own recipes, which its ``recipes`` folder forbids to import as a package."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torchtune

from gmt_tune.integrations.torchtune.plugin.versions import check_torchtune_version


def load_base_recipe(name: str) -> ModuleType:
    """One of torchtune's recipe files as a module, by its name without ``.py``: ``full_finetune_distributed``."""
    problem = check_torchtune_version()
    if problem is not None:
        raise SystemExit(f"gmt-tune: {problem}")
    module_name = f"torchtune_recipes_{name}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    path = Path(torchtune.__file__).parent.parent / "recipes" / f"{name}.py"
    loader = importlib.machinery.SourceFileLoader(module_name, str(path))
    spec = importlib.util.spec_from_loader(module_name, loader)
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    loader.exec_module(module)
    return module
