"""A Sphinx extension: pages without what they do not need, and whole for keyboards and screen readers.

The theme brings every icon as a script of 1.5 MB, though a font draws those it shows, and a program that runs cells on
a server elsewhere, which this book does not use.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from pathlib import Path

from sphinx.application import Sphinx

UNUSED = (  # elements that are taken out
    r'<script[^>]*scripts/fontawesome\.js[^>]*></script>',
    r'<script>const THEBE_JS_URL.*?</script>',
    r'<script[^>]*sphinx-thebe\.js[^>]*></script>',
    r'<script type="text/x-thebe-config">.*?</script>',
    r'<script>kernelName = .*?</script>',
    r'<link[^>]*sphinx-thebe\.css[^>]*/>',
)  # fmt: skip
OF_SEARCH = r'<script src="(?:_static/searchtools\.js|_static/language_data\.js|searchindex\.js)"></script>'
MENDED = {
    'role="list" class="citation-list"': 'class="citation-list"',  # whose entries are no list items
    '<pre id="codecell': '<pre tabindex="0" id="codecell',  # which may be wider than the page
}


def lean(page: str) -> str:
    """A page without unused scripts, and with what its theme forgot."""
    for element in UNUSED:
        page = re.sub(rf"\s*{element}", "", page, flags=re.DOTALL)
    if 'id="search-results"' not in page:
        page = re.sub(rf"\s*{OF_SEARCH}", "", page)
    for old, new in MENDED.items():
        page = page.replace(old, new)
    return page


def words(page: str) -> str:
    """The text of a page, without its code."""
    article = re.search(r"<article.*?</article>", page, re.DOTALL)
    bare = re.sub(r"<(script|style|details|pre)\b.*?</\1>", " ", article[0] if article else "", flags=re.DOTALL)
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", bare)).split())
    return re.sub(r" ([,.;:)])", r"\1", text)


def with_own_references(page: str, documents: Iterable[str]) -> str:
    """A book on one page, whose references stay on it; links to tables and interactive pages are left out.

    Works cited have marks of their own, as Sphinx numbers those of each document anew.
    """
    page = re.sub(r'(<div class="citation" id=")(id\d+")', r"\1work-\2", page)
    cited = r'(<span class="bibtex-citation".*?</span>\]?)'
    page = re.sub(cited, lambda m: re.sub(r'href="[^"#]*#(id\d+")', r'href="#work-\1', m[0]), page, flags=re.DOTALL)
    names = "|".join(map(re.escape, documents))
    page = re.sub(rf'href="(?:{names})\.html#', 'href="#', page)
    page = re.sub(rf'href="({names})\.html"', r'href="#document-\1"', page)
    return re.sub(r'<a [^>]*href="(?:results|explorer|playground)/[^>]*>(.*?)</a>', r"\1", page, flags=re.DOTALL)


def _finish(app: Sphinx, error: Exception | None) -> None:
    """Mend every page; give the search what it shows of each, which a browser does not read from other files."""
    out, texts = Path(app.outdir), {}
    for path in out.glob("*.html") if error is None else ():
        page = lean(path.read_text(encoding="utf-8"))
        page = with_own_references(page, app.env.found_docs) if app.builder.name == "singlehtml" else page
        path.write_text(page, encoding="utf-8")
        texts[path.name] = words(page)
    (out / "_static/scripts/fontawesome.js").unlink(missing_ok=True)
    if (search := out / "search.html").is_file():
        (out / "_static/texts.js").write_text(f"window.pageTexts = {json.dumps(texts)};", encoding="utf-8")
        loads = '<script src="_static/texts.js"></script></head>'
        search.write_text(search.read_text(encoding="utf-8").replace("</head>", loads, 1), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", _finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
