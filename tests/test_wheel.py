"""The package as a user without a checkout gets it: built as a wheel, installed elsewhere, run from an empty folder."""

import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path
from urllib.parse import urljoin

import pytest
import yaml
from markdown_it import MarkdownIt

import gmt_tune

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (file,) = folder.glob("gmt_tune-*.whl")
    return file


def test_it_carries_recipes_and_configs_and_claims_no_name_of_torchtunes(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern in (("recipes", "*.py"), ("configs", "*.yaml")):
        files = [path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)]
        assert files and {f"gmt_tune/{file}" for file in files} <= names
    modules = {path.stem for path in (ROOT / "recipes").glob("*.py")}
    top_level = {name.split("/")[0].removesuffix(".py") for name in names if ".dist-info/" not in name}
    assert top_level == {"gmt_tune", *modules}  # "recipes" is torchtune's
    assert "gmt_tune/py.typed" in names


def _links(text: str) -> list[str]:
    tokens = [token for block in MarkdownIt().enable("table").parse(text) for token in block.children or ()]
    return [
        str(token.attrs.get("href") or token.attrs["src"]) for token in tokens if token.type in ("link_open", "image")
    ]


def test_its_metadata_is_what_an_index_shows(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == "gmt-tune" and metadata["Version"] == gmt_tune.__version__
    assert metadata["Description-Content-Type"] == "text/markdown"
    urls = dict(entry.split(", ") for entry in metadata.get_all("Project-URL"))
    address = urls["Repository"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["repository-code"] == address
    assert all(url.startswith(f"{address}/") for name, url in urls.items() if name not in ("Repository", "Paper"))

    readme, shown = (ROOT / "README.md").read_text(encoding="utf-8").strip(), metadata.get_payload().strip()
    page = f"{address}/blob/main/"
    assert _links(shown) == [link if link.startswith("#") else urljoin(page, link) for link in _links(readme)]
    assert re.sub(r"\]\(.*?\)", "", shown) == re.sub(r"\]\(.*?\)", "", readme)


def test_installed_elsewhere_it_trains_from_an_empty_folder(wheel, tmp_path, run_tune, tiny_config, logged_metrics):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    found = subprocess.run(
        [sys.executable, "-c", "import gmt_tune; print(gmt_tune.__file__)"],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(site)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert Path(found.stdout.strip()).is_relative_to(site)

    mask = {"_component_": "gmt_tune.GradientMask", "density": 0.2}
    config = tiny_config(tmp_path / "out", max_steps_per_epoch=2, gradient_mask=mask)
    (empty / "mine.yaml").write_text(yaml.safe_dump(config))
    run_tune("run", "gmt_full_finetune", "--config", "mine.yaml", cwd=empty, PYTHONPATH=site)
    assert [round(step["mask/density"], 1) for step in logged_metrics(tmp_path / "out")] == [0.2, 0.2]
