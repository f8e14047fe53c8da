"""Interactive pages that are one file each: a template, and the page's numbers in a script element as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2

from residual.files import write_bytes


def write_page(folder: Path, template: str, data: dict[str, Any], **values: Any) -> Path:
    """Write `folder/index.html` from a template of this folder; returns the page. values: its texts, escaped."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    source = Path(__file__).with_name(template).read_text()
    numbers = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # no text in the data ends the script
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "index.html", environment.from_string(source).render(data=numbers, **values).encode())
    return folder / "index.html"
