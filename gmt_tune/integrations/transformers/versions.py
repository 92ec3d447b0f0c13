"""Which transformers, accelerate and TRL work: one sentence with the remedy where the installed ones cannot."""

from gmt_tune._installed import installed_version, release

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


def _is_at_least(version: str | None, oldest: str) -> bool:
    return version is not None and release(version) >= release(oldest)
