"""One page of the book by itself, in seconds: what a rerun shows, and an editor looks at."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

from edition.assemble import fold_code
from edition.pages import project_root

log = logging.getLogger(__name__)


def build_page(notebook: Path) -> Path:
    """Build the page of an executed notebook, beside it; returns the HTML file.

    Links to other pages are left as they are: those pages are not there.
    """
    root, folder = project_root(), notebook.parent / f".{notebook.stem}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "_static").mkdir(parents=True)
    for source, target in (
        (root / "_config.yml", ""), (root / "book/references.bib", ""),
        (root / "book/references.md", ""), (root / "book/_static/custom.css", "_static"),
        (root / "book/_static/code.js", "_static"),
    ):  # fmt: skip
        shutil.copy(source, folder / target)
    page = nbformat.read(notebook, as_version=4)
    fold_code(page)
    nbformat.write(page, folder / notebook.name)
    chapters = "chapters:\n- file: references\n" if notebook.stem != "references" else ""
    (folder / "_toc.yml").write_text(f"format: jb-book\nroot: {notebook.stem}\n{chapters}")
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", "--quiet", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    page = folder / "_build/html" / f"{notebook.stem}.html"
    if done.returncode or not page.is_file():
        raise RuntimeError(f"the page of {notebook} could not be built: {done.stderr.strip()[-1000:]}")
    html = notebook.parent / "html"
    shutil.copytree(folder / "_build/html", html, dirs_exist_ok=True)
    shutil.rmtree(folder)
    return html / page.name
