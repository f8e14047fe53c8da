"""One page of the book by itself, in seconds: what a rerun shows, and an editor looks at."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat

from edition.assemble import fold_code
from edition.pages import project_root


def build_page(notebook: Path) -> Path:
    """Build the page of an executed notebook, into <name>-html beside it; returns the HTML file.

    Links to other pages are left as they are: those pages are not there.
    """
    root, html = project_root(), notebook.parent / f"{notebook.stem}-html"
    with TemporaryDirectory(prefix="residual-") as name:
        folder = Path(name)
        (folder / "_static").mkdir()
        for source in ("_config.yml", "book/references.bib", "book/references.md"):
            shutil.copy(root / source, folder)
        for source in (root / "book/_static").iterdir():
            shutil.copy(source, folder / "_static")
        run = nbformat.read(notebook, as_version=4)
        fold_code(run)
        nbformat.write(run, folder / "page.ipynb")
        (folder / "_toc.yml").write_text("format: jb-book\nroot: page\nchapters:\n- file: references\n")
        command = [sys.executable, "-m", "edition.book", "build", "--quiet", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not (folder / "_build/html/page.html").is_file():
            raise RuntimeError(f"the page of {notebook} could not be built: {done.stderr.strip()[-1000:]}")
        shutil.copytree(folder / "_build/html", html, dirs_exist_ok=True)
    return html / "page.html"
