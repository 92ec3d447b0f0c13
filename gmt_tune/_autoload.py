"""What runs when torch is imported: puts a finder on ``sys.meta_path`` and does nothing else.

torchtune 0.6.1 has no plugin registry. PyTorch calls the entry points of the group ``torch.backends``
at the end of ``import torch`` (switched off with ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``). The finder placed
here waits until torchtune is imported, and then

- before the first of torchtune's submodules is executed, fills in the names that newer torchao releases
  dropped (not before ``torchtune`` itself: that module may be what imports torch, and so this file), and
- after ``torchtune._recipe_registry`` is executed, appends this package's recipes and configs.

When torchao is imported because of torchtune or of this package, or by the Hugging Face libraries because this package
brought it, what it prints without need is kept quiet.

It imports neither torchtune nor torchao by itself, and no failure in it may reach ``import torch``.
"""

import importlib.machinery
import sys

# One of these is being imported where torchao is imported because this package is installed: the last three import it
# if it is there. Programs that import it themselves are left alone.
_USERS_OF_TORCHAO = (
    "torchtune",
    "gmt_tune.integrations",
    "gmt_tune.masking",
    "gmt_tune.optim",
    "transformers",
    "accelerate",
    "peft",
)


class TorchtuneFinder:
    """Meta path finder that watches for torchtune's and torchao's submodules and leaves other imports alone."""

    def __init__(self):
        self._seen = set()

    def find_spec(self, fullname, path=None, target=None):
        package, _, submodule = fullname.partition(".")
        if fullname == "torchao":
            _keep_torchao_quiet()
        if package not in ("torchao", "torchtune") or not submodule:
            return None
        if package not in self._seen:
            self._seen.add(package)
            from gmt_tune.integrations.torchtune.plugin import versions

            versions.check_before_torchao() if package == "torchao" else versions.make_torchtune_importable()
        if fullname != "torchtune._recipe_registry":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _executing_and_registering(spec.loader.exec_module)
        return spec


def _keep_torchao_quiet() -> None:
    if not sys.modules.keys().isdisjoint(_USERS_OF_TORCHAO):
        from gmt_tune._quiet import quiet_imports

        quiet_imports()


def _executing_and_registering(execute):
    def exec_module(registry):
        execute(registry)
        from gmt_tune.integrations.torchtune.plugin.registry import register_recipes

        register_recipes(registry)

    return exec_module


def autoload() -> None:
    """Install the finder once. Called by PyTorch; safe to call again."""
    if not any(isinstance(finder, TorchtuneFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchtuneFinder())
    _keep_torchao_quiet()  # torchtune imports torchao first, and that torch: torchao is not looked for any more
