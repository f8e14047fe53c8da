"""The book builds without a warning, and its pages work: in print, in the dark, on a phone, by keyboard and offline."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import axe_playwright_python
import pytest
from filelock import FileLock
from playwright.sync_api import sync_playwright

from conftest import FLAGS
from edition.pages import chapter_path, chapters, project_root

ROOT = project_root()
CHAPTERS = [chapter_path(name) for name in chapters()]
AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")
CHROMIUM = shutil.which("chromium") or ""
SERIOUS = """async () => {
    const alike = [...document.querySelectorAll("tbody tr:nth-child(n+7):not([hidden])")];
    alike.forEach(row => { row.hidden = true; });
    const found = await axe.run(document, {resultTypes: ["violations"], preload: false});
    alike.forEach(row => { row.hidden = false; });
    return found.violations.filter(v => ["serious", "critical"].includes(v.impact))
        .map(v => v.id + ": " + v.nodes[0].html.slice(0, 200));
}"""
DRAWN = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
HEAVIEST = 1.5e6  # bytes of a page with all that it loads

in_a_browser = pytest.mark.skipif(not CHROMIUM, reason="needs chromium")


@pytest.fixture(scope="module")
def site():
    """The book, built with the smallest profile, in place of no other: it goes to _build/site/tiny."""
    target = "_build/site/tiny/_build/html/index.html"
    (ROOT / "_build").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "snakemake", target, "--quiet", "rules", "--cores", "all", "--rerun-incomplete"]
    command += ["--nolock", "--rerun-triggers", "mtime", "input", "--config", "profile=tiny"]
    with FileLock(ROOT / "_build/.tiny.lock"):  # another process of tests may be building it
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    again = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Nothing to be done" in again.stdout + again.stderr
    return (ROOT / target).parent


def test_the_book_has_every_chapter_with_its_figures(site):
    for path in CHAPTERS:
        html = (site / f"{path.stem}.html").read_text()
        assert html.count("<figure") + html.count('<div class="cell_output') >= path.read_text().count("  figure:")
        assert "Traceback" not in html
        assert "glue:text" not in html
        assert "output stderr" not in html
        assert "IPython.core" not in html
    assert 'href="explorer/index.html"' in (site / "heads.html").read_text()
    assert all(name in (site / "explorer/encoders.js").read_text() for name in ("mini-openclip", "mini-vit"))


def test_tables_are_numbered_as_tables_and_files_of_numbers_are_there(site):
    page = (site / "selection.html").read_text()
    assert re.search(r'id="tab-selection".*?<span class="caption-number">Table \d+ </span>', page, re.DOTALL)
    assert re.search(r'id="fig-by-k".*?<span class="caption-number">Fig. \d+ </span>', page, re.DOTALL)
    assert re.search(r'<span class="std std-numref">Table \d+</span>', (site / "data.html").read_text())
    listed = re.findall(r'href="(results/[^"]+\.csv)"', (site / "claims.html").read_text())
    assert "results/unit_selection.csv" in listed
    assert len(listed) > 50
    assert all((site / link).stat().st_size > 20 for link in listed)
    assert ".svg" in page
    assert re.search(r"<strong>(holds|fails|undecided|untestable)[ \w]*</strong> for \d of", page)  # what was found


def test_images_of_the_book_are_not_empty(site):
    for path in CHAPTERS:
        html = (site / f"{path.stem}.html").read_text()
        for image in re.findall(r'<img[^>]*src="(_images/[^"]+)"', html):
            assert (site / image).stat().st_size > 1000
            assert not image.endswith(".svg") or "mathdefault" not in (site / image).read_text()  # as text


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS])
        yield opened
        opened.close()


@pytest.fixture
def page(browser):
    """A page of a browser, and what went wrong on it."""
    opened = browser.new_page()
    opened.wrong, opened.loaded = [], set()
    opened.on("pageerror", lambda error: opened.wrong.append(str(error)))
    opened.on("console", lambda said: said.type == "error" and opened.wrong.append(said.text))
    opened.on("request", lambda request: opened.loaded.add(request.url))
    yield opened
    opened.close()


@in_a_browser
@pytest.mark.parametrize(("widths", "scheme"), [((390,), "dark"), ((1440, 768), "light")])
def test_pages_are_whole_at_every_width_and_in_the_dark(site, page, widths, scheme):
    """Pages are opened in a window of the first width, which is then made narrower."""
    page.emulate_media(color_scheme=scheme)
    problems = []
    book = [path for path in sorted(site.glob("*.html")) if path.stem != "index"]  # which leads to the first page
    apps = [site / "explorer/index.html", *site.glob("playground/*/index.html")]
    # To save time, axe looks at every other page in the dark, at those between in the light, and at apps in both.
    looked_at = {*book[{"dark": 0, "light": 1}[scheme] :: 2], *apps}
    for path in [*book, *apps]:
        page.wrong.clear()
        page.loaded.clear()
        page.set_viewport_size({"width": widths[0], "height": 900})
        page.goto(path.as_uri())
        if path in looked_at:
            page.add_script_tag(path=AXE)
            problems += [f"{path.stem}: {found}" for found in page.evaluate(SERIOUS)]
        for width in widths:
            if width != widths[0]:
                page.add_style_tag(content="* { transition: none !important }")  # or the sidebar still slides
                page.set_viewport_size({"width": width, "height": 900})
                page.evaluate(DRAWN)
            if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
                problems.append(f"{path.stem} is wider than {width} pixels")
        problems += [f"{path.stem}: {error}" for error in page.wrong]
        problems += [f"{path.stem} asks for {url}" for url in page.loaded if not url.startswith(("file:", "data:"))]
        files = {
            Path(url.removeprefix("file://").split("?")[0].split("#")[0]) for url in page.loaded if url[:4] == "file"
        }
        if path.parent == site and (weight := sum(file.stat().st_size for file in files)) > HEAVIEST:
            problems.append(f"{path.stem} weighs {weight:,} bytes")
    assert not problems, "\n".join(problems)


@in_a_browser
def test_the_explorer_shows_a_head_by_its_address_and_finds_sentences(site, page):
    page.goto((site / "explorer/index.html").as_uri() + "#mini-vit/L3.H2")
    assert page.locator("h2").inner_text().startswith("L3.H2")
    assert page.get_by_label("Search sentences").is_disabled()  # mini-vit reads no text
    page.get_by_label("Encoder").select_option("mini-openclip")
    page.get_by_role("heading", name="L0.H0").wait_for()  # its heads are loaded
    sentences = page.locator("section li").all_inner_texts()
    assert len(sentences) == 5
    assert page.url.endswith("#mini-openclip/L0.H0")
    page.get_by_label("Search sentences").fill("flag")
    found = page.locator(".map button:not(.other)").count()
    assert 0 < found < 72
    assert f"{found} of 72 heads" in page.locator("section").inner_text()
    page.get_by_label("Search sentences").fill("L0")  # a label is no sentence
    assert page.locator(".map button:not(.other)").count() == 0
    page.get_by_role("button", name="Two encoders").click()
    assert page.locator("section").count() == 2
    page.locator("section").nth(1).get_by_role("heading").wait_for()
    assert page.locator("section").nth(1).get_by_label("Encoder").input_value() == "mini-vit"  # another one
    assert page.locator("section").nth(1).locator("img").count() == 4  # three components, and a map
    page.locator("section").nth(1).get_by_role("button", name="L2.H1:").click()
    assert page.url.endswith("#mini-openclip/L0.H0+mini-vit/L2.H1")
    page.go_back()
    assert page.locator("section").nth(1).locator("h2").inner_text().startswith("L0.H0")
    measures = page.locator("section").first.get_by_label("Coloured by").locator("option").all_inner_texts()
    assert any(measure.startswith("colour: share explained") for measure in measures)
    page.get_by_role("link", name="Back to the book").click()
    assert page.url.endswith("heads.html")
    assert not page.wrong


@in_a_browser
def test_heads_in_tables_link_to_the_explorer_and_long_tables_sort(site, page):
    page.goto((site / "ground_truth.html").as_uri())
    link = page.locator('a[href^="explorer/index.html#mini-openclip/L"]').first
    link.wait_for()
    label = link.inner_text()
    link.click()
    assert page.locator("h2").inner_text().startswith(label)
    page.goto((site / "claims.html").as_uri())
    table = page.locator("#tab-results table.sortable")
    column = table.locator("tbody tr > :first-child")
    table.locator("thead button").first.click()
    assert column.all_inner_texts() == sorted(column.all_inner_texts(), key=str.lower)
    table.locator("thead button").first.click()
    assert column.all_inner_texts() == sorted(column.all_inner_texts(), key=str.lower, reverse=True)
    page.locator("#tab-results").get_by_label("search this table").fill("alignment_runs")
    assert table.locator("tbody tr:visible").count() == 1


@in_a_browser
def test_a_table_whose_cells_span_rows_gives_a_file_of_whole_lines(site, page):
    page.goto((site / "semantics.html").as_uri())
    address = page.locator("figure#tab-words-1 a", has_text="data (CSV)").get_attribute("href")
    lines = list(csv.reader(unquote(address.partition(",")[2]).splitlines()))
    assert {len(line) for line in lines} == {8}
    assert [line[2] for line in lines[1:5]] == ["TextSpan", "OMP"] * 2
    assert {line[0] for line in lines[1:]} == {"mini-openclip"}


@in_a_browser
def test_an_address_that_names_no_head_says_so(site, page):
    page.goto((site / "explorer/index.html").as_uri() + "#mini-none/L3.H2%")
    assert page.get_by_text("no such head").is_visible()
    assert page.locator("h2").inner_text().startswith("L0.H0")
    assert not page.wrong


@in_a_browser
def test_the_book_prints_as_one_pdf(site, tmp_path):
    """As the Makefile does."""
    book = Path(sys.executable).with_name("jupyter-book")
    subprocess.run([book, "build", "--quiet", "--builder", "singlehtml", site.parents[1]], check=True)
    out, page = tmp_path / "book.pdf", site.parent / "singlehtml/intro.html"
    subprocess.run([CHROMIUM, "--headless", *FLAGS, f"--print-to-pdf={out}", page.as_uri()], check=True, timeout=180)
    assert out.read_bytes().count(b"/Type /Page") > 60
