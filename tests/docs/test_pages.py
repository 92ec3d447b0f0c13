"""The documentation works as written: its blocks run in order in an empty folder, and its links lead somewhere."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from doc_fences import ROOT, Fence, fences_of, follow, pages
from markdown_it import MarkdownIt
from omegaconf import OmegaConf

PAGES = pages()
FENCES = [fence for page in PAGES for fence in fences_of(page)]
EXTENDING = sorted((ROOT / "docs" / "extending").glob("*.md"))


def _ids(items):
    return [item.where if isinstance(item, Fence) else item.relative_to(ROOT).as_posix() for item in items]


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """The reader's folder: current, and searched for the modules that the page makes, which are forgotten after."""
    threads, modules = torch.get_num_threads(), set(sys.modules)
    torch.set_num_threads(1)  # tiny tensors
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    torch.set_num_threads(threads)
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


def _with(mark: str | None):
    chosen = []
    for page in PAGES:
        blocks = [fence for fence in fences_of(page) if fence.runs]
        if any(("slow" in fence.marks) == (mark == "slow") for fence in blocks):
            chosen.append(page)
    return chosen


# ---------------------------------------------------------------------- what every block says of itself


@pytest.mark.parametrize("fence", FENCES, ids=_ids(FENCES))
def test_block_runs_or_says_why_not(fence):
    problem = fence.problem()
    assert problem is None, f"{fence.where}: {problem}"


# ---------------------------------------------------------------------- blocks that run


@pytest.mark.parametrize("page", _with(None), ids=_ids(_with(None)))
def test_page_works_as_written(page, empty_folder):
    assert follow(fences_of(page), empty_folder) > 0


@pytest.mark.slow
@pytest.mark.parametrize("page", _with("slow"), ids=_ids(_with("slow")))
def test_page_works_as_written_with_what_takes_minutes(page, empty_folder):
    assert follow(fences_of(page), empty_folder, slow=True) > 0


@pytest.mark.parametrize("page", EXTENDING, ids=_ids(EXTENDING))
def test_extension_page_ends_in_training(page):
    """Its own assertions, which run above, look at what the training left."""
    text = "".join(fence.text for fence in fences_of(page) if fence.runs and "slow" not in fence.marks)
    assert "tune run" in text or "optimizer.step()" in text
    assert re.search(r"^assert ", text, re.MULTILINE)


# ---------------------------------------------------------------------- blocks that are only looked at


def _parsers():
    from gmt_tune.cli.main import build_parser
    from gmt_tune.integrations.torchtune.plugin.registry import RECIPES, config_paths

    return build_parser(), RECIPES, config_paths()


def _commands(text: str) -> list[list[str]]:
    """The commands of a shell block, as words; comments, pipes and redirections left out."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        for command in re.split(r"&&|\|", line):
            words = shlex.split(command, comments=True)
            words = words[: next((i for i, word in enumerate(words) if word.startswith(">")), None)]
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                commands.append(words)
    return commands


def _command_problem(words: list[str], files: set[str]) -> str | None:
    """What in a command does not exist, or None. Knows our own commands; others are the reader's."""
    parser, recipes, configs = _parsers()
    if words[0] == "gmt-tune":
        try:
            parser.parse_args(words[1:])
        except SystemExit as stop:
            return "gmt-tune does not take that" if stop.code else None
    if words[0] in ("python", "sbatch") and len(words) > 1 and words[1].endswith((".py", ".sbatch")):
        return None if (ROOT / words[1]).is_file() or words[1] in files else f"there is no {words[1]}"
    if words[0] != "tune" or len(words) < 3:
        return None
    if words[1] in ("cp", "cat", "validate"):
        return None if words[2] in {*recipes, *configs, *files} else f"there is no recipe or config {words[2]}"
    if words[1] != "run" or "--config" not in words or "gmt_full" not in " ".join(words):
        return None
    at = words.index("--config")
    name = words[at + 1]
    if name not in configs:
        return None if name in files or name.isupper() or "my_" in name else f"there is no config {name}"
    if words[at - 1] not in recipes:
        return f"there is no recipe {words[at - 1]}"
    return _override_problem(words[at + 2 :], configs[name])


def _override_problem(overrides: list[str], config: Path) -> str | None:
    cfg = OmegaConf.load(config)
    known = _keys_of_recipes()
    for override in overrides:
        key = override.lstrip("~").partition("=")[0]
        if "=" not in override and not override.startswith("~"):
            return f"{override} is no override of the form key=value"
        if key.split(".")[0] not in {*known, *cfg}:
            return f"{key} is no key of the recipe"
    return None


def _keys_of_recipes() -> set[str]:
    from gmt_tune.integrations.torchtune.config.keys import KEYS

    return {name for name in KEYS if "." not in name}


_LOOKED_AT = [f for f in FENCES if f.language == "sh" and (not f.runs or "slow" in f.marks)]


@pytest.mark.parametrize("fence", _LOOKED_AT, ids=_ids(_LOOKED_AT))
def test_commands_that_do_not_run_here_exist(fence):
    files = {other.options["file"] for other in FENCES if "file" in other.options}
    commands = list(_commands(fence.text))
    assert commands, f"{fence.where} holds no command"
    for words in commands:
        problem = _command_problem(words, files)
        assert problem is None, f"{fence.where}: {shlex.join(words)}: {problem}"


_FRAGMENTS = [f for f in FENCES if f.language == "yaml" and not f.options and "illustration" not in f.marks]


@pytest.mark.parametrize("fence", _FRAGMENTS, ids=_ids(_FRAGMENTS))
def test_part_of_a_config_has_only_keys_of_the_recipe(fence):
    from gmt_tune.integrations.torchtune.config.mask import build_gradient_mask

    cfg = OmegaConf.create(fence.text)
    unknown = set(cfg) - _keys_of_recipes()
    assert not unknown, f"{fence.where}: {sorted(unknown)[0]} is no key of the recipe"
    mask = cfg.get("gradient_mask", None)
    if mask is not None and str(mask.get("_component_")).startswith("gmt_tune."):
        model = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(4), "proj": torch.nn.Linear(4, 4)})
        build_gradient_mask(mask, model)


# ---------------------------------------------------------------------- links

_DOCUMENTS = [*PAGES, ROOT / "CHANGELOG.md"]


def _anchor(heading: str) -> str:
    """The anchor that GitHub and the site give a heading."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower().strip()))


def _tokens(page: Path):
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def _anchors(page: Path) -> set[str]:
    tokens = list(MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")))
    found = set()
    for token, inline in zip(tokens, tokens[1:], strict=False):
        if token.type == "heading_open":
            text = "".join(t.content for t in inline.children if t.type in ("text", "code_inline"))
            found.add(_anchor(text))
    return found


@pytest.mark.parametrize("page", _DOCUMENTS, ids=_ids(_DOCUMENTS))
def test_links_within_the_repository_lead_somewhere(page):
    for token in _tokens(page):
        target = token.attrGet("href") if token.type == "link_open" else None
        target = target or (token.attrGet("src") if token.type == "image" else None)
        if target is None or re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = str(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor and file.suffix == ".md":
            assert anchor in _anchors(file), f"{page.name} links to {target}: there is no such heading"


# ---------------------------------------------------------------------- the checks themselves can fail


def _page(tmp_path, text: str) -> list[Fence]:
    page = tmp_path / "page.md"
    page.write_text(text)
    return fences_of(page)


@pytest.mark.parametrize(
    "block",
    ["```sh\nfalse\ntrue\n```", "```python\nassert 1 == 2\n```", "```diff file=f.py\n@@\n-absent\n+present\n```"],
)
def test_a_block_that_does_not_work_fails(block, tmp_path, empty_folder):
    (empty_folder / "f.py").write_text("something\n")
    with pytest.raises(AssertionError):
        follow(_page(tmp_path, block), empty_folder)


@pytest.mark.parametrize("info", ["", "bash", "sh ilustration", "yaml name=x", "diff", "sh tested-by=tests/absent.py"])
def test_a_block_that_says_nothing_or_wrong_things_of_itself_is_told(info, tmp_path):
    assert _page(tmp_path, f"```{info}\ntext\n```")[0].problem()


@pytest.mark.parametrize(
    "command",
    [
        "tune run gmt_full_finetune --config llama9/8B_gmt",
        "tune run gmt_full_finetun --config quickstart",
        "tune run gmt_full_finetune --config quickstart gradient_msk.density=0.1",
        "gmt-tune memroy --all",
        "tune cp gmt_full_finetun x.py",
        "python scripts/absent.py",
    ],
)
def test_a_command_that_does_not_exist_is_told(command, capsys):
    assert _command_problem(_commands(command)[0], set())


def test_a_diff_changes_the_file_as_a_reader_would(tmp_path, empty_folder):
    (empty_folder / "f.py").write_text("a\nb\nc\n")
    follow(_page(tmp_path, "```diff file=f.py\n@@\n a\n-b\n+B\n+B2\n@@\n c\n+d\n```"), empty_folder)
    assert (empty_folder / "f.py").read_text() == "a\nB\nB2\nc\nd\n"
