"""Interactive pages: a template, and beside it the page's numbers as scripts, which work from disk as well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2

from residual.files import write_bytes


def write_page(folder: Path, template: str, **values: Any) -> Path:
    """Write `folder/index.html` from a template of this folder; returns the page. values: its texts, escaped."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    source = Path(__file__).with_name(template).read_text()
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "index.html", environment.from_string(source).render(**values).encode())
    return folder / "index.html"


def write_script(path: Path, name: str, data: Any) -> None:
    """Write a script that assigns data to a name, such as `window.played`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, f"{name} = {json.dumps(data, allow_nan=False)};\n".encode())
