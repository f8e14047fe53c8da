"""A Sphinx extension: pages without what they do not need, and whole for keyboards and screen readers.

The theme brings every icon as a script of 1.5 MB, though a font draws those it shows, and a program that runs cells on
a server elsewhere, which this book does not use.
"""

from __future__ import annotations

import re
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
MENDED = {
    'role="list" class="citation-list"': 'class="citation-list"',  # whose entries are no list items
    '<pre id="codecell': '<pre tabindex="0" id="codecell',  # which may be wider than the page
}


def lean(page: str) -> str:
    """A page without unused scripts, and with what its theme forgot."""
    for element in UNUSED:
        page = re.sub(rf"\s*{element}", "", page, flags=re.DOTALL)
    for old, new in MENDED.items():
        page = page.replace(old, new)
    return page


def _finish(app: Sphinx, error: Exception | None) -> None:
    for path in Path(app.outdir).glob("*.html") if error is None else ():
        path.write_text(lean(path.read_text(encoding="utf-8")), encoding="utf-8")
    (Path(app.outdir) / "_static/scripts/fontawesome.js").unlink(missing_ok=True)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", _finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
