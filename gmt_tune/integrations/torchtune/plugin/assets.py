"""``${gmt_asset:NAME}`` in a config: the absolute path of a file or folder that the package carries.

A config is a plain file that users copy anywhere, so it cannot hold the path of the installed package.
"""

from pathlib import Path

from omegaconf import OmegaConf

ASSETS = Path(__file__).resolve().parents[3] / "assets"


def asset(name: str) -> str:
    """Absolute path of ``gmt_tune/assets/<name>``. Raises FileNotFoundError if the package carries no such thing."""
    path = (ASSETS / name).resolve()
    if not path.is_relative_to(ASSETS.resolve()) or not path.exists():
        names = sorted(entry.name for entry in ASSETS.iterdir()) if ASSETS.is_dir() else []
        raise FileNotFoundError(f"${{gmt_asset:{name}}}: the package carries no '{name}', only {names}")
    return str(path)


def register_resolver() -> None:
    """Make ``${gmt_asset:...}`` known to OmegaConf. Safe to call again."""
    if not OmegaConf.has_resolver("gmt_asset"):
        # omegaconf 2.4 renamed register_new_resolver and warns about the old name
        register = getattr(OmegaConf, "register_resolver", OmegaConf.register_new_resolver)
        register("gmt_asset", asset)
