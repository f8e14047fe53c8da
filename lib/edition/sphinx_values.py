"""A Sphinx extension: values that maps carry move from the picture to the page, whose script shows them."""

from __future__ import annotations

import base64
import functools
import json
import re
from html import escape
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from edition.carried_values import MARK

PANEL = re.compile(rf'<g id="{MARK}(?P<data>[\w-]+)">\s*<path d="(?P<outline>[^"]+)"')
PICTURE = re.compile(r'<img (?=[^>]*src="(?P<file>_images/[^"]+\.svg)")')


def carried(picture: str) -> list[dict[str, Any]]:
    """Panels of an SVG with their values, and their boxes (left, top, right, bottom) as shares of the picture."""
    if MARK not in picture:
        return []
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', picture).groups())
    panels = []
    for panel in PANEL.finditer(picture):
        points = [float(number) for number in re.findall(r"-?[\d.]+", panel["outline"])]
        across, down = points[::2], points[1::2]
        box = min(across) / width, min(down) / height, max(across) / width, max(down) / height
        data = json.loads(base64.urlsafe_b64decode(panel["data"] + "=" * (-len(panel["data"]) % 4)))
        panels.append({"box": [round(share, 4) for share in box]} | data)
    return panels


def _finish(app: Sphinx, error: Exception | None) -> None:
    out = Path(app.outdir)

    @functools.cache
    def panels(file: str) -> str:
        path = out / file
        picture = path.read_text(encoding="utf-8")
        found = carried(picture)
        if found:
            path.write_text(PANEL.sub(r'<g><path d="\g<outline>"', picture), encoding="utf-8")
        return escape(json.dumps(found), quote=True) if found else ""

    def with_values(picture: re.Match) -> str:
        found = panels(picture["file"])
        return f'<img data-values="{found}" ' if found else picture[0]

    for path in out.glob("*.html") if error is None else ():
        page = path.read_text(encoding="utf-8")
        path.write_text(PICTURE.sub(with_values, page), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", _finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
