"""Puts the outputs of executed chapters into their present texts, for the book to be built from."""

from __future__ import annotations

import sys
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode


def assembled(text: Path, executed: Path) -> NotebookNode:
    """A chapter as its text is now, with the outputs of its run; the run itself where the code has changed since."""
    try:
        page, run = jupytext.read(text), nbformat.read(executed, as_version=4)
    except (nbformat.reader.NotJSONError, UnicodeDecodeError) as error:
        raise ValueError(f"{executed} is damaged; delete it, and its chapter runs again") from error
    outputs = [cell for cell in run.cells if cell.cell_type == "code"]
    injected = [cell for cell in outputs if "injected-parameters" in cell.metadata.get("tags", ())]
    outputs = [cell for cell in outputs if cell not in injected]
    cells = [cell for cell in page.cells if cell.cell_type == "code"]
    if [cell.source for cell in cells] != [cell.source for cell in outputs]:
        return run
    for cell, done in zip(cells, outputs, strict=True):
        cell.outputs, cell.execution_count = done.outputs, done.execution_count
        failed = [tag for tag in done.metadata.get("tags", ()) if tag.startswith("papermill-error")]
        cell.metadata["tags"] = [*cell.metadata.get("tags", ()), *failed]
    first = next((i for i, cell in enumerate(page.cells) if "parameters" in cell.metadata.get("tags", ())), 0)
    page.cells[first + 1 : first + 1] = injected
    page.metadata["kernelspec"] = run.metadata["kernelspec"]
    return page


def main(arguments: list[str]) -> None:
    """texts and notebooks, alternating, then the folder to write to."""
    *pairs, folder = map(Path, arguments)
    for text, executed in zip(pairs[::2], pairs[1::2], strict=True):
        nbformat.write(assembled(text, executed), folder / executed.name)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
