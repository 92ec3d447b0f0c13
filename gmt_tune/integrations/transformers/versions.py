"""Which transformers, accelerate and TRL work: one sentence with the remedy where the installed ones cannot."""

import importlib.metadata
import re

OLDEST = {
    "transformers": "4.55",
    "accelerate": "1.6",  # FSDP2
}
# From this transformers on, older releases of TRL than this one take packages for installed that are not
TRANSFORMERS_5_3_NEEDS_TRL = "0.29"


def check_versions() -> None:
    """Raise ImportError with the ``pip`` line that mends it, if transformers or accelerate is too old."""
    found = {name: installed_version(name) for name in OLDEST}
    wrong = [name for name in OLDEST if not _is_at_least(found[name], OLDEST[name])]
    if wrong:
        pins = [f"{name}>={OLDEST[name]}" for name in wrong]
        raise ImportError(
            f"gmt-tune's integration needs {' and '.join(pins)}, found "
            f"{' and '.join(found[name] or 'none' for name in wrong)}: run pip install "
            + " ".join(f'"{pin}"' for pin in pins)
        )


def problem_of_trl() -> str | None:
    """One sentence if the installed TRL, which a Trainer does not need, cannot be imported beside transformers."""
    trl, transformers = installed_version("trl"), installed_version("transformers")
    oldest = TRANSFORMERS_5_3_NEEDS_TRL
    if trl is None or _is_at_least(trl, oldest) or not _is_at_least(transformers, "5.3"):
        return None
    remedy = f'run pip install "trl>={oldest}"'
    return f"TRL {trl} cannot be imported with transformers {transformers}: for its trainers, {remedy}"


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution as pip shows it, or None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_at_least(version: str | None, oldest: str) -> bool:
    return version is not None and _numbers(version) >= _numbers(oldest)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
