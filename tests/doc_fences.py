"""The fenced code blocks of README.md and docs/: what each says of itself, and how a reader would follow it.

The first word after the fence is the language, the others say what a test does with the block:

    ```sh                       runs, in the page's own empty folder, in the page's order
    ```python                   runs likewise; one namespace for the whole page
    ```yaml                     is checked as a part of a config: keys, and whether the mask can be built
    ```python file=NAME         is written to that file of the page's folder (also yaml, json)
    ```diff file=NAME           changes that file as a reader would: each hunk must fit in exactly one place
    ```text                     is output, or something else that is not code
    ... slow                    runs only in the tests that take minutes
    ... illustration            does not run (it needs a GPU, a hub, a cluster), but its commands and keys must exist
    ... tested-by=PATH          runs in that test, or CI script, instead of here
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
RUNNABLE = {"sh", "python"}
WRITABLE = {"python", "yaml", "json"}
LANGUAGES = RUNNABLE | WRITABLE | {"diff", "text"}
MARKS = {"slow", "illustration"}
OPTIONS = {"file", "tested-by"}


@dataclass(frozen=True)
class Fence:
    """One fenced block.

    Attributes:
        page: the Markdown file.
        line: of the opening fence, from 1 on.
        language: the first word after it.
        marks: the words that stand alone, such as ``slow``.
        options: the words of the form ``key=value``.
        text: the lines between the fences.
    """

    page: Path
    line: int
    language: str
    marks: frozenset[str]
    options: dict[str, str] = field(hash=False)
    text: str

    @property
    def where(self) -> str:
        """For a message: page and line."""
        return f"{self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether following the page does something with the block."""
        if self.language == "text" or "illustration" in self.marks or "tested-by" in self.options:
            return False
        return self.language in RUNNABLE or "file" in self.options

    def problem(self) -> str | None:
        """What is wrong with what the block says of itself, or None."""
        if self.language not in LANGUAGES:
            return f"the language '{self.language}' is none of {', '.join(sorted(LANGUAGES))}"
        unknown = (self.marks - MARKS) | (self.options.keys() - OPTIONS)
        if unknown:
            return f"'{sorted(unknown)[0]}' says nothing: see tests/doc_fences.py"
        if "file" in self.options and self.language not in WRITABLE | {"diff"}:
            return f"a {self.language} block cannot be written to a file"
        if self.language == "diff" and "file" not in self.options:
            return "a diff needs file=NAME, the file that it changes"
        tested_by = self.options.get("tested-by")
        if tested_by is not None and not (ROOT / tested_by).is_file():
            return f"{tested_by}, which is said to test it, does not exist"
        return None


def pages() -> list[Path]:
    """README.md, CONTRIBUTING.md and every page of docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def fences_of(page: Path) -> list[Fence]:
    """The fenced blocks of a page, in order, without the site generator's own (``{toctree}``)."""
    found = []
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.type not in ("fence", "code_block"):
            continue
        words = token.info.split() or [""]
        if words[0].startswith("{"):
            continue
        options = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        marks = frozenset(word for word in words[1:] if "=" not in word)
        found.append(Fence(page, token.map[0] + 1, words[0], marks, options, token.content))
    return found


def follow(fences: list[Fence], folder: Path, *, slow: bool = False) -> int:
    """Do what the blocks say, in order, as a reader who begins in an empty folder would.

    Args:
        fences: of one page.
        folder: the reader's folder.
        slow: also what is marked ``slow``.

    Returns:
        How many blocks were followed.

    Raises:
        AssertionError: if a command fails, a diff does not fit, or an ``assert`` of the page does not hold.
    """
    namespace: dict = {"__name__": "__main__"}
    followed = 0
    for fence in fences:
        if not fence.runs or ("slow" in fence.marks and not slow):
            continue
        if fence.language == "diff":
            _apply_diff(fence, folder / fence.options["file"])
        elif "file" in fence.options:
            (folder / fence.options["file"]).write_text(fence.text, encoding="utf-8")
        elif fence.language == "python":
            # Empty lines in front let a traceback show the page's own line numbers
            exec(compile("\n" * fence.line + fence.text, str(fence.page), "exec"), namespace)
        else:
            _run_shell(fence, folder)
        followed += 1
    return followed


def _run_shell(fence: Fence, folder: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    process = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", fence.text],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    output = process.stdout[-3000:] + process.stderr[-5000:]
    assert process.returncode == 0, f"{fence.where} ended with {process.returncode}:\n{fence.text}\n{output}"


def _apply_diff(fence: Fence, file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for hunk in _hunks(fence.text):
        old = "".join(line[1:] for line in hunk if line[0] in " -")
        new = "".join(line[1:] for line in hunk if line[0] in " +")
        times = text.count(old)
        assert times == 1, f"{fence.where} fits {times} places in {file.name}, not one:\n{old}"
        text = text.replace(old, new)
    file.write_text(text, encoding="utf-8")


def _hunks(diff: str) -> list[list[str]]:
    hunks: list[list[str]] = []
    for line in diff.splitlines(keepends=True):
        if line.startswith(("--- ", "+++ ")):
            continue
        if line.startswith("@@"):
            hunks.append([])
        else:
            hunks[-1].append(line if line.strip() else " \n")
    return hunks
