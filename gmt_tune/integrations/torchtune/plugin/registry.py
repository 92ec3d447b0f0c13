"""The recipes and configs that ``tune`` learns from this package.

``tune`` joins each ``file_path`` to its own folder with ``pathlib``'s ``/``, which lets an absolute path
win: so ``ls``, ``cp``, ``cat``, ``validate`` and ``run`` treat our files like torchtune's own.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

from gmt_tune._quiet import quiet_imports
from gmt_tune.errors import UserError, did_you_mean
from gmt_tune.integrations.torchtune.plugin.torchrun import shorten_tracebacks
from gmt_tune.integrations.torchtune.plugin.versions import check_torchtune_version, make_torchtune_importable

RECIPES = ("gmt_full_finetune", "gmt_full_dpo")  # each is recipes/<name>.py


def _folder(name: str) -> Path:
    """``recipes/`` or ``configs/``: inside the package when installed, at the root of a checkout otherwise."""
    package = Path(__file__).resolve().parents[3]
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


def recipe_path(name: str) -> Path:
    """Absolute path of a recipe's file, ``recipes/<name>.py``."""
    return _folder("recipes") / f"{name}.py"


def config_paths() -> dict[str, Path]:
    """Every config by the name that ``tune`` shows, such as ``llama3_1/8B_gmt``, with its absolute path."""
    root = _folder("configs")
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def config_file(name: str) -> Path:
    """The file of a config: one of ours or torchtune's by the name that ``tune ls`` shows, or a file.

    Raises UserError, with names that are near, if there is none.
    """
    ours = config_paths()
    if name in ours:
        return ours[name]
    torchtune = importlib.util.find_spec("torchtune")
    folder = Path(str(torchtune and torchtune.origin)).parent.parent / "recipes" / "configs"
    for path in (Path(name).expanduser(), folder / f"{name}.yaml"):
        if path.exists():
            return path
    hint = did_you_mean(name, ours, "`tune ls` lists them", most=2, cutoff=0.5)
    raise UserError(f"there is no config {name!r}, nor such a file: {hint}")


def recipe_of(config_name: str) -> str:
    """The recipe that a config belongs to, by its name: ``*_dpo*`` is DPO, all others fine-tune."""
    return "gmt_full_dpo" if "dpo" in config_name else "gmt_full_finetune"


def register_recipes(registry) -> None:
    """Append our recipes to the module ``torchtune._recipe_registry``; with another torchtune, say so on stderr."""
    problem = check_torchtune_version()
    if problem is not None:
        print(f"gmt-tune: {problem}", file=sys.stderr)
        return
    from gmt_tune.integrations.torchtune.plugin.assets import register_resolver

    register_resolver()
    if set(RECIPES) & set(sys.argv):  # `tune run gmt_full_finetune`, perhaps under torchrun
        shorten_tracebacks()
    configs = config_paths()
    for recipe in RECIPES:
        own = [registry.Config(name, str(path)) for name, path in configs.items() if recipe_of(name) == recipe]
        registry._ALL_RECIPES.append(registry.Recipe(recipe, str(recipe_path(recipe)), own, supports_distributed=True))


def run_unregistered(recipe: str, argv: list[str]) -> None:
    """Run a recipe as ``python -m`` does, where ``tune`` does not know it; ``--config`` may name one of our configs."""
    quiet_imports()
    make_torchtune_importable()  # with autoload off, nobody has done it yet
    if "--config" in argv[:-1]:
        value = argv.index("--config") + 1
        argv[value] = str(config_paths().get(argv[value], argv[value]))
    runpy.run_path(str(recipe_path(recipe)), run_name="__main__")
