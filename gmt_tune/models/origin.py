"""What a model's folder says of itself: its JSON files, and where the model comes from."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gmt_tune._quiet import quieter

# For people, who may change it
CARD = "README.md"

# On the card of a model that was trained here
TAG = "gmt-tune"

_FOLDER_IN_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Base:
    """The model that a run began with.

    Attributes:
        name: of its folder, or on the hub.
        repo_id: on the hub; None where nothing in its folder says so.
        license: the keys of its own model card that are about its licence.
        weights: what `gmt-tune fetch` did to them, in words; None where they are as the hub has them.
    """

    name: str
    repo_id: str | None = None
    license: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None


def read_base(folder: Path) -> Base:
    """What a model's folder says of where it comes from; never fails."""
    card = _front_matter(folder / CARD)
    download = read_json_object(folder / "original_repo_id.json") or {}  # by `tune download` or `gmt-tune fetch`
    in_cache = next((m for part in folder.resolve().parts if (m := _FOLDER_IN_CACHE.fullmatch(part))), None)
    named = [
        download.get("repo_id"),
        card.get("base_model") if TAG in (card.get("tags") or ()) else None,  # a model that we made
        "/".join(in_cache.groups()) if in_cache is not None else None,
    ]
    repo_id = next((name for name in named if is_hub_id(name)), None)
    license = {key: card[key] for key in _LICENSE_KEYS if isinstance(card.get(key), (str, list))}
    weights = download.get("weights") if isinstance(download.get("weights"), str) else None
    return Base(repo_id or folder.resolve().name, repo_id, license, weights)


def read_json_object(file: Path) -> dict | None:
    """The JSON object in a file; None for anything else, such as a list, a pipe, or brackets without end."""
    try:
        if not file.is_file():  # reading from a pipe would wait for who writes to it
            return None
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _front_matter(file: Path) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    try:
        content = file.read_bytes()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("latin-1")
        with quieter(logging.getLogger("huggingface_hub.repocard"), logging.ERROR):  # of a card without metadata
            return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # no such file, or somebody's own idea of YAML
        return {}


def is_hub_id(name: object) -> bool:
    """Whether it names a repository on the Hugging Face hub, and no file here."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not isinstance(name, str) or "/" not in name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
