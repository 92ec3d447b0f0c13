"""Reports as a person opens them: in a real browser, at the widths of a phone and a desktop, light and dark."""

import re

import pytest
from reporting import chromium
from reporting.fabricated import write_run

from gmt_tune.reporting.report import write_report

WIDTHS = (390, 1280)
OVER_TIME = {"loss", "lr", "grad-norm", "mask-density", "mask-overlap", "mask-coverage", "mask-seconds"}
OVER_TIME |= {"tokens-per-second-per-gpu", "threshold"}
BY_LAYER = {"density-map", "coverage-map", "overlap-map", "threshold-by-depth"}

# Elements that stick out of the screen, where they are not in a box that scrolls by itself
STICKING_OUT = """[...document.querySelectorAll("main *")]
  .filter(e => !e.closest(".scroll") && !e.closest("svg") && e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.outerHTML.slice(0, 80))"""
# Letters of all texts within the drawings that overlap another text of the same drawing by more than a little
OVERLAPPING = """[...document.querySelectorAll("figure svg")].flatMap(svg => {
  const texts = [...svg.querySelectorAll("text")].filter(t => !/rotate\\((?!0|-?90|-?270)/.test(t.outerHTML));
  const boxes = texts.map(t => [t.textContent, t.getBoundingClientRect()]);
  return boxes.flatMap(([a, r], i) => boxes.slice(i + 1)
    .filter(([b, s]) => Math.min(r.right, s.right) - Math.max(r.left, s.left) > 2
                     && Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top) > 4)
    .map(([b]) => svg.closest("figure").id + ": " + a + " / " + b));
})"""
# Whether everything drawn lies within its own drawing
CUT_OFF = """[...document.querySelectorAll("figure svg")].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter(t => {
    const r = t.getBoundingClientRect();
    return r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 || r.bottom > box.bottom + 1;
  }).map(t => svg.closest("figure").id + ": " + t.textContent);
})"""
CONTRAST = """(() => {
  const luminance = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4); return 0.2126*v[0]+0.7152*v[1]+0.0722*v[2]; };
  return Math.min(...[...document.querySelectorAll("figcaption, .note, td, th, h1, h2, h3, figure text")].map(e => {
    const own = getComputedStyle(e), card = e.closest(".card") || document.body;
    const a = luminance(e.closest("svg") ? own.fill : own.color), b = luminance(getComputedStyle(card).backgroundColor);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }));
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.open_browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def pages(quickstart_run, smollm2_run, tmp_path_factory):
    """The three reports, with the figures that each must have."""
    folder = tmp_path_factory.mktemp("reports")
    found = {}
    for name, runs in (
        ("quickstart", [quickstart_run]),
        ("smollm2", [smollm2_run]),
        ("comparison", [quickstart_run, smollm2_run]),
    ):
        maps = {f"{key}-{i}" for key in BY_LAYER for i in range(len(runs))}
        path, pngs = write_report(runs, folder / f"{name}.html", folder / name if len(runs) > 1 else None)
        expected = (OVER_TIME if "smollm2" in (name, runs[-1].name) else OVER_TIME - {"grad-norm"}) | maps
        assert {png.stem for png in pngs} == (expected if len(runs) > 1 else set())
        assert all(png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 3000 for png in pngs)
        found[name] = path, expected
    return found


@pytest.mark.needs_chromium
@pytest.mark.parametrize("name", ["quickstart", "smollm2", "comparison"])
def test_a_report_opens_clean_and_whole_at_phone_and_desktop_width(name, pages, browser, tmp_path):
    path, figures = pages[name]
    for width in WIDTHS:
        for dark in (False, True):
            browser.errors.clear()
            browser.requests.clear()
            browser.open(path, width, dark)
            assert browser.errors == []
            assert browser.requests == [path.as_uri()]
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            assert browser.evaluate(STICKING_OUT) == []
            shown = browser.evaluate("""[...document.querySelectorAll("figure")].filter(f => {
                const box = f.querySelector("svg").getBoundingClientRect();
                return box.width > 250 && box.height > 60 && f.querySelectorAll("svg path").length > 3;
            }).map(f => f.id)""")
            assert set(shown) == figures
            assert browser.evaluate(OVERLAPPING) == []
            assert browser.evaluate(CUT_OFF) == []
            assert browser.evaluate(CONTRAST) > 4.5  # WCAG AA
            background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
            assert background == ("rgb(18, 21, 28)" if dark else "rgb(244, 245, 247)")
    assert browser.screenshot(tmp_path / "page.png").stat().st_size > 50_000


@pytest.mark.needs_chromium
def test_the_browser_checks_would_see_what_is_wrong(browser, tmp_path):
    """An error, a request and a wide element are noticed: the test above can fail."""
    wrong = tmp_path / "wrong.html"
    phone = '<meta name="viewport" content="width=device-width,initial-scale=1,minimum-scale=1">'
    body = '<main><img src="missing.png"><div style="width:900px">x</div><script>nothing()</script></main>'
    wrong.write_text(phone + body)
    browser.errors.clear()
    browser.requests.clear()
    browser.open(wrong, 390)
    assert any("nothing" in error for error in browser.errors)
    assert len(browser.requests) == 2
    assert browser.evaluate("document.documentElement.scrollWidth") >= 900
    assert len(browser.evaluate(STICKING_OUT)) == 1


@pytest.mark.slow
@pytest.mark.needs_chromium
def test_odd_runs_open_as_clean(browser, tmp_path):
    runs = [
        write_run(tmp_path / "long", steps=3000, layers=80, log_every=10),
        write_run(tmp_path / "nan", steps=60, layers=2, nan_from=20, validation=False, tracked=False),
        write_run(tmp_path / ("a_rather_long_name_of_a_run_" * 3), steps=1, layers=1, scope="tensor"),
        write_run(tmp_path / "plain", steps=30, density=None),
    ]
    for number, chosen in enumerate([runs[1:2], runs[2:3], runs]):
        path, _ = write_report(chosen, tmp_path / f"{number}.html")
        for width in WIDTHS:
            browser.errors.clear()
            browser.open(path, width)
            assert browser.errors == [] and browser.evaluate(STICKING_OUT) == []
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            assert browser.evaluate(OVERLAPPING) == []
            assert browser.evaluate(CUT_OFF) == []


def test_a_page_is_one_file_without_scripts_or_addresses(pages):
    for path, figures in pages.values():
        text = path.read_text()
        assert "<script" not in text and "default-src 'none'" in text
        addresses = {*re.findall(r"""\b(?:href|src)=["']?([^"'\s>]*)""", text), *re.findall(r"url\(([^)]*)\)", text)}
        assert addresses and all(address.startswith(("data:", "#")) for address in addresses)
        assert not re.search(r"https?://(?!www\.w3\.org/)", text)
        ids = re.findall(r'\bid="([^"]+)"', text)
        assert len(ids) == len(set(ids)) and figures <= set(ids)
        assert path.stat().st_size < 1_000_000


def test_figures_say_in_words_what_they_show(pages, smollm2_run):
    from gmt_tune.reporting.run_reader import read_run

    text = pages["smollm2"][0].read_text()
    losses = read_run(smollm2_run).series["loss"]
    assert f"Training loss goes from {losses.values[0]:.4g} at step 1 to {losses.last:.4g} at step 6" in text
    assert "Heat map of 30 layers by 7 modules" in text
    assert f"<td>{losses.last:.4g} (step\u00a06)</td>" in text


def test_runs_on_the_same_axes_share_their_figures_and_scales(pages):
    text = pages["comparison"][0].read_text()
    loss = text[text.index('id="loss"') : text.index('id="lr"')]
    for label in ("quickstart, training", "quickstart, validation", "smollm2, training", "smollm2, validation"):
        assert f">{label}<" in loss
    assert '<th scope="col">quickstart</th><th scope="col">smollm2</th>' in text
