"""The troubleshooting page quotes messages that exist, and has all of the torchtune integration and the commands."""

import ast
import functools
import re
from pathlib import Path

import pytest
from doc_fences import ROOT

from gmt_tune.integrations.torchtune.config.keys import KEYS, TAKES

PAGE = ROOT / "docs" / "troubleshooting.md"
PACKAGE = ROOT / "gmt_tune"
RAISED = {"UserError", "LargeDeltaError", "VersionError", "SystemExit", "OutOfReachError", "StopRun"}
COVERED = sorted(
    [
        *(PACKAGE / "integrations" / "torchtune").rglob("*.py"),
        *(PACKAGE / "cli").rglob("*.py"),
        *(PACKAGE / "deltas").rglob("*.py"),
    ]
)
GAP = "\0"  # what a placeholder of an f-string becomes


def _template(node: ast.AST) -> str:
    """The text of a string expression, with a gap for each part that is known only when it runs."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else GAP
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    return GAP


def _raised(file: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            text = _template(node.args[0])
            if name in RAISED and len(re.findall(r"[a-z]{2,}", text)) >= 3:
                found.append((node.lineno, text))
    return found


@functools.cache
def _all_strings() -> frozenset[str]:
    strings = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.JoinedStr, ast.Constant, ast.BinOp)):
                strings.add(_template(node))
    # What the table of keys says of their values
    strings |= {f"{key.name} must be {key.takes.words}, got {GAP}" for key in KEYS.values()}
    strings |= {f"{GAP} must be {takes.words}, got {GAP}" for takes in TAKES.values()}
    return frozenset(strings)


def _quoted() -> list[str]:
    """The messages of the page: the code in the first column of its tables."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cell = line.split(" | ")[0]
        if line.startswith("| `") or " `" in cell and line.startswith("| "):
            found += re.findall(r"`([^`]+)`", cell)
    return [quote for quote in found if " " in quote]


def _matches(quote: str, message: str) -> bool:
    """Whether the page's quotation is of that message: its pieces, in order, gaps where the page has `…`."""
    pieces = [re.escape(piece) for piece in quote.split("…")]
    return re.search(".*".join(pieces), message, re.DOTALL) is not None


FROM_OTHERS = {"CUDA out of memory", "density: 1.0"}  # of torch, and a value of a key


@pytest.mark.parametrize("quote", sorted(set(_quoted()) - FROM_OTHERS))
def test_quoted_message_exists(quote):
    strings = _all_strings()
    pieces = [piece for piece in re.split("…", quote) if re.search("[a-z]", piece)]
    assert any(_matches(quote, text) for text in strings) or not pieces, f"no message reads: {quote}"


@pytest.mark.parametrize("file", COVERED, ids=[file.relative_to(PACKAGE).as_posix() for file in COVERED])
def test_every_message_is_on_the_page(file):
    # A quotation of mere gaps would match everything
    quotes = [quote for quote in _quoted() if len(re.findall("[a-z]{2,}", quote)) >= 2]
    missing = [f"{file.name}:{line}: {text.replace(GAP, '…')}" for line, text in _raised(file)
               if not any(_matches(quote, text) for quote in quotes)]  # fmt: skip
    assert not missing, "add to docs/troubleshooting.md:\n" + "\n".join(missing)
