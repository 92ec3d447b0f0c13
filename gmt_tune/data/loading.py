"""The data set of a config's section, whose files and rows are checked before and after it is loaded."""

import inspect
import logging
import os
import re
import traceback
from collections.abc import Mapping
from typing import Any

from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf
from torchtune import config
from torchtune.config._utils import _get_component_from_path
from torchtune.datasets import PackedDataset

from gmt_tune.data.files import KINDS, fault_of_files, local_files
from gmt_tune.data.rows import ROWS_CHECKED_AHEAD, CheckedRows, cause_in_words
from gmt_tune.data.scan import files_of_section, scan_section
from gmt_tune.errors import UserError, did_you_mean

# After a scan, only the types that loading gives to whole columns can be wrong: the first rows show them.
_ROWS_AFTER_SCAN = 100

_UNKNOWN_KEY = re.compile(r"Config\.__init__\(\) got an unexpected keyword argument '(\w+)'")

# They log a file that they cannot read, and raise what is put in words here.
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)


def load_dataset(section: DictConfig, tokenizer: Any, key: str) -> CheckedRows | PackedDataset:
    """Make the data set of a section, called ``key``: packed, or with rows whose errors name them.

    Raises:
        UserError: if it cannot be loaded or a row is wrong, with the file, and the line where that is known.
    """
    values: Any = OmegaConf.to_container(section, resolve=True)
    _check_source(values, key)
    is_scanned = scan_section(values, key, getattr(tokenizer, "check_messages", None))
    try:
        dataset = config.instantiate(section, tokenizer)
        len(dataset)
        if isinstance(dataset, PackedDataset):
            _checked(dataset.ds, values, key).check(None)  # for a row that is wrong and raised no error
            return dataset
        rows = _checked(dataset, values, key)
        rows.check(_ROWS_AFTER_SCAN if is_scanned else ROWS_CHECKED_AHEAD)
        return rows
    except UserError:
        raise
    except Exception as error:
        if "_pack" in {frame.name for frame in traceback.extract_tb(error.__traceback__)}:
            _name_bad_row(section, tokenizer, key, values)
        fault = fault_of_files(values)
        if fault is not None:
            raise UserError(f"{key}: {fault}") from error
        if (unknown := _UNKNOWN_KEY.search(str(error))) is not None:
            raise UserError(_unknown_key(unknown[1], values, key)) from error
        files = values.get("data_files")
        where = "" if files is None else f" (in {files})"
        raise UserError(f"{key} cannot be loaded: {cause_in_words(error)}{where}") from error


def _check_source(values: Mapping[str, Any], key: str) -> None:
    """Raise UserError if local files are to be read by what ``datasets`` would look for on the hub."""
    source, files = values.get("source"), values.get("data_files")
    if not isinstance(source, str) or files is None or source in _PACKAGED_DATASETS_MODULES:
        return
    if "/" not in source and not os.path.exists(source) and local_files(files, values.get("data_dir")) is not None:
        right = did_you_mean(source, KINDS, f"it is one of {', '.join(KINDS)}")
        raise UserError(f"{key}.source is {source}, which reads no files: {right} (JSON Lines are json)")


def _unknown_key(name: str, values: Mapping[str, Any], key: str) -> str:
    """What to say of a key that a component of torchtune's hands on to ``datasets``, which does not know it."""
    component = values["_component_"]
    parameters = inspect.signature(_get_component_from_path(component)).parameters.values()
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "tokenizer"]
    return f"{key}.{name} is no key of {component}: {did_you_mean(name, known)} (~{key}.{name} takes it out)"


def _checked(dataset: Any, values: Mapping[str, Any], key: str) -> CheckedRows:
    files = values.get("data_files")
    origin = files if isinstance(files, str) else values.get("source")
    return CheckedRows(dataset, key, origin, files_of_section(values))


def _name_bad_row(section: DictConfig, tokenizer: Any, key: str, values: Mapping[str, Any]) -> None:
    """Packing reads all rows and does not say at which it failed: raise UserError if one of them fails."""
    try:
        rows = _checked(config.instantiate(section, tokenizer, packed=False), values, key)
        rows.check(None)
        for index in range(len(rows)):
            rows[index]
    except UserError:
        raise
    except Exception:
        return  # it is not one row
