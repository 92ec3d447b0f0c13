"""The documentation's site is built without warnings, and is read on a phone without scrolling sideways."""

import subprocess
import sys
from pathlib import Path

import pytest
from reporting import chromium

ROOT = Path(__file__).resolve().parents[2]
PHONE = 390
# Of the page, and of the first columns of tables, which stay in sight while the others scroll
WIDTHS = """[document.documentElement.scrollWidth,
  Math.max(0, ...[...document.querySelectorAll(".table-wrapper td:first-child")].map(cell => cell.offsetWidth))]"""

pytestmark = pytest.mark.slow  # Sphinx takes half a minute; CI, where the site must build, runs it by its name


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder with the site of this checkout."""
    for module in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(module, reason=f"{module} is in the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_says_the_version(site):
    from gmt_tune import __version__

    pages = [*site.glob("*.html"), *(site / "api").glob("*.html")]
    assert {"index", "config_reference", "choosing", "data", "masking"} <= {page.stem for page in pages}
    shown = [f"gmt-tune {__version__}" in page.read_text(encoding="utf-8").rpartition("<footer>")[2] for page in pages]
    assert all(shown)


@pytest.mark.needs_chromium
def test_no_page_is_wider_than_a_phone(site, tmp_path):
    widths = {}
    with chromium.open_browser(tmp_path) as browser:
        for page in sorted(site.rglob("*.html")):
            browser.open(page, PHONE)
            widths[page.relative_to(site).as_posix()] = browser.evaluate(WIDTHS)
    assert len(widths) > 30
    assert {name: found for name, found in widths.items() if found[0] > PHONE or found[1] > 0.8 * PHONE} == {}
