"""The whole book as one PDF, whose references work: `python -m edition.pdf mini`, after `make book`."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from edition.pages import ParameterError, find_profile, pages, project_root

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
PATIENCE = 20_000  # milliseconds in which the page draws itself


class PDFError(RuntimeError):
    """The book cannot be printed."""


def find_browser() -> str:
    """A browser that prints. Raises PDFError where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise PDFError("no Chromium or Chrome is installed, which prints the book; on Debian, apt-get install chromium")
    return found


def write_pdf(site: Path, out: Path) -> Path:
    """Print the book whose texts and outputs are in `site` on one page, and that page into `out`; returns it.

    Raises PDFError, with what the tool said, where the book is not there or cannot be printed.
    """
    if not (site / "_toc.yml").is_file():
        raise PDFError(f"there is no book in {site}; run make book first")
    browser = find_browser()
    _run([sys.executable, "-m", "edition.book", "build", "--builder", "singlehtml", "--quiet", str(site)])
    page = site / "_build/singlehtml" / f"{pages()[0]}.html"
    with tempfile.TemporaryDirectory() as user:
        options = (f"--user-data-dir={user}", "--no-pdf-header-footer", f"--virtual-time-budget={PATIENCE}")
        _run([browser, "--headless", *FLAGS, *options, f"--print-to-pdf={out}", page.absolute().as_uri()])
    return out


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PDFError(f"{' '.join(command[:4])} failed: {(done.stderr or done.stdout)[-2000:]}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m edition.pdf", description=__doc__)
    parser.add_argument("profile", nargs="?", default="mini", help="whose book is printed; default: mini")
    given = parser.parse_args(arguments)
    try:
        name = find_profile(given.profile).stem
        out = project_root() / "_build" / f"residual-{name}.pdf"
        print(f"Open {write_pdf(project_root() / '_build/site' / name, out)}")
    except (PDFError, ParameterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
