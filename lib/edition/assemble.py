"""Puts the outputs of executed chapters into their present texts: `python -m edition.assemble RUNS SITE`."""

from __future__ import annotations

import sys
from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs
from nbformat import NotebookNode

from edition.pages import chapter_path, chapters


def assembled(text: Path, executed: Path) -> NotebookNode:
    """A chapter as its text is now, with the outputs of its run and papermill's cell of parameters.

    Raises ValueError where the run is damaged, or has other code than the text.
    """
    try:
        page, run = jupytext.read(text), nbformat.read(executed, as_version=4)
    except (nbformat.reader.NotJSONError, UnicodeDecodeError) as error:
        raise ValueError(f"{executed} is damaged; delete it, and its chapter runs again") from error
    injected = [cell for cell in run.cells if "injected-parameters" in cell.metadata.get("tags", ())]
    run.cells = [cell for cell in run.cells if cell not in injected]
    ours, theirs = ([cell.source for cell in book.cells if cell.cell_type == "code"] for book in (page, run))
    if ours != theirs:
        raise ValueError(f"the code of {text} is not that of {executed}; run the chapter again")
    page = combine_inputs_with_outputs(page, run, fmt="md:myst")
    for place, cell in enumerate(page.cells):
        if injected and "parameters" in cell.metadata.get("tags", ()):
            shown = "remove-cell" if "remove-cell" in cell.metadata["tags"] else "hide-input"
            cell.metadata["tags"] = ["parameters", "remove-input"]  # papermill's cell has the values in force
            injected[0].metadata["tags"] = ["injected-parameters", shown]
            injected[0].metadata["mystnb"] = {"code_prompt_show": "Parameters"}
            page.cells.insert(place + 1, injected[0])
            break
    page.metadata["kernelspec"] = run.metadata["kernelspec"]
    return page


if __name__ == "__main__":
    runs, site = map(Path, sys.argv[1:])
    try:
        for name in chapters():
            nbformat.write(assembled(chapter_path(name), runs / f"{name}.ipynb"), site / f"{name}.ipynb")
    except ValueError as error:
        sys.exit(f"error: {error}")
