"""The API reference has every public name, each with its arguments, and a user's script type-checks."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FACADES = {"gmt_tune.masking", "gmt_tune.optim"}  # their names are those of gmt_tune
SCRIPT = """
import torch
from gmt_tune import CompactAdamW, GradientMask
from gmt_tune.integrations.transformers import GradientMaskCallback

model = torch.nn.Linear(100, 10)
mask = GradientMask(model.named_parameters(), density=0.2, refresh_every=10, dense=["bias"])
optimizer = CompactAdamW(model.parameters(), lr=1e-3, state_bits=8)
handle = mask.register(optimizer)
model(torch.randn(8, 100)).square().mean().backward()
optimizer.step()
density: float = mask.statistics.density
callback: GradientMaskCallback = GradientMaskCallback(density=0.2)
handle.remove()
"""


def _public() -> dict[str, list[str]]:
    """The names of each module's ``__all__``."""
    found = {}
    for file in (ROOT / "gmt_tune").rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                found[name] = ast.literal_eval(node.value)
    return found


PUBLIC = _public()


def test_the_reference_has_every_public_module_and_no_other():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.rst"))
    listed = re.findall(r"automodule:: (\S+)", pages)
    assert sorted(listed) == sorted(PUBLIC.keys() - FACADES)
    assert {name for facade in FACADES for name in PUBLIC[facade]} <= set(PUBLIC["gmt_tune"])


def _lacking(where: str, function, doc: str):
    if not doc:
        yield f"{where} has no docstring"
    if "arguments are otherwise torchtune's" in doc:
        return
    names = inspect.signature(function).parameters.keys() - {"self", "args", "kwargs"}
    _, has_entries, rest = doc.partition("Args:\n")
    if has_entries:  # "    a, b: what they are", before the next section
        section = re.split(r"^\w", rest, flags=re.MULTILINE)[0]
        entries = re.findall(r"^    (\w[\w, ]*)(?: \(.*?\))?:", section, re.MULTILINE)
        said = {name for entry in entries for name in entry.split(", ")}
    else:  # a short docstring names them in its text
        said = set(re.findall(r"``(\w+)``", doc))
    yield from (f"{where} does not say what {name} is" for name in sorted(names - said))


@pytest.mark.parametrize("module", sorted(name for name in PUBLIC if "axolotl" not in name))
def test_public_names_say_what_their_arguments_are(module):
    wrong = []
    for name in PUBLIC[module]:
        thing = getattr(importlib.import_module(module), name)
        is_value = inspect.isclass(thing) and (is_dataclass(thing) or issubclass(thing, Exception))
        if callable(thing) and not is_value:
            wrong += _lacking(name, thing, inspect.cleandoc(thing.__doc__ or ""))
        for key, member in vars(thing).items() if inspect.isclass(thing) else ():
            if not key.startswith("_") and inspect.isfunction(member):
                wrong += [f"{name}.{key} has no docstring"] if not inspect.getdoc(getattr(thing, key)) else []
    assert not wrong


def test_what_configs_name_is_public():
    named = {
        path
        for file in (ROOT / "configs").rglob("*.yaml")
        for path in re.findall(r"_component_: (gmt_tune\.[\w.]+)", file.read_text(encoding="utf-8"))
    }
    assert named and all(name in PUBLIC[module] for module, _, name in (path.rpartition(".") for path in named))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param("", id="whole", marks=pytest.mark.slow),  # mypy reads torch's sources: more than a minute
        pytest.param("[mypy-torch.*,transformers.*,torchao.*,numpy.*]\nfollow_imports = skip\n", id="own"),
    ],
)
def test_a_users_script_type_checks(config, tmp_path):
    pytest.importorskip("mypy", reason="mypy is in the extra dev")
    assert (ROOT / "gmt_tune" / "py.typed").is_file()
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = True\nfollow_imports = silent\n{config}")
    for text, passes in ((SCRIPT, True), (SCRIPT.replace("density=0.2,", "density=[],"), False)):
        (tmp_path / "mine.py").write_text(text)
        done = subprocess.run([sys.executable, "-m", "mypy", "mine.py"], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode == 0) == passes, done.stdout
