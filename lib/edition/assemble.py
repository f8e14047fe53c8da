"""Puts the outputs of executed chapters into their present texts, for the book to be built from."""

from __future__ import annotations

import re
import shlex
import sys
from html import escape
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbformat import NotebookNode

from edition.pages import SAVED, assigned_values, read_cost
from residual.code import without_docstrings

BOX = """:::{{dropdown}} Run this chapter
With the values of this run, which took {took}:

```bash
{command}
```
:::"""
PROMPTS = {"parameters": "Parameters", "injected-parameters": "Parameters of this run"}


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
    if list(map(_code, cells)) != list(map(_code, outputs)):
        fold_code(run)
        return run
    for cell, done in zip(cells, outputs, strict=True):
        cell.outputs, cell.execution_count = done.outputs, done.execution_count
        failed = [tag for tag in done.metadata.get("tags", ()) if tag.startswith("papermill-error")]
        cell.metadata["tags"] = [*cell.metadata.get("tags", ()), *failed]
    first = next((i for i, cell in enumerate(page.cells) if "parameters" in cell.metadata.get("tags", ())), 0)
    page.cells[first + 1 : first + 1] = injected
    page.metadata["kernelspec"] = run.metadata["kernelspec"]
    fold_code(page)
    return page


def _code(cell: NotebookNode) -> str:
    """What a cell does, apart from comments and layout, as in a chapter's key."""
    try:
        return without_docstrings(cell.source)
    except SyntaxError:  # IPython's own, such as %magic
        return cell.source


def fold_code(notebook: NotebookNode) -> None:
    """Fold the code of every cell, which a reader opens, cell by cell or all at once."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    in_force = any("injected-parameters" in cell.metadata.get("tags", ()) for cell in code)
    for cell in code:
        tags = cell.metadata.setdefault("tags", [])
        if "parameters" in tags and in_force:  # papermill's cell has the values in force
            cell.metadata["tags"] = tags = ["parameters", "remove-input"]
        if "hide-output" in tags:  # a long computation, whose output is progress
            tags[tags.index("hide-output")] = "hide-cell"
        if not any(tag.startswith(("hide-", "remove-")) for tag in tags):
            tags.append("hide-input")
        prompt = next((text for tag, text in PROMPTS.items() if tag in tags), "")
        prompt = prompt or ("Set-up" if "Chapter(" in cell.source else "")
        if prompt:
            shown = {"code_prompt_show": prompt, "code_prompt_hide": prompt}
            cell.metadata["mystnb"] = cell.metadata.get("mystnb", {}) | shown


def with_command(notebook: NotebookNode, chapter: str, profile: str) -> NotebookNode:
    """A chapter with the command that runs it, under its parameters, if it has any of a run."""
    for place, cell in enumerate(notebook.cells):
        if "injected-parameters" in cell.metadata.get("tags", ()):
            minutes = read_cost(profile, chapter).get("seconds", 0) / 60
            took = (
                f"{minutes:.0f} minutes" if minutes >= 1.5 else "about a minute" if minutes > 0.5 else "a few seconds"
            )
            command = run_command(chapter, profile, cell.source)
            notebook.cells.insert(place + 1, nbformat.v4.new_markdown_cell(BOX.format(took=took, command=command)))
            break
    return notebook


def run_command(chapter: str, profile: str, source: str) -> str:
    """The command that runs a chapter with the values that a cell assigns."""
    given = {
        name: value for name, value in assigned_values(source).items() if name != "profile" and value not in ("", [])
    }
    words = (f"-p {name} {_word(value)}" for name, value in given.items())
    return f'make chapter CHAPTER={chapter} PROFILE={profile} ARGS="{" ".join(words)}"'


def _word(value: Any) -> str:
    """A value as one word, as it passes a shell's double quotes, make, and the shell that make calls."""
    text = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
    if re.fullmatch(r"[\w.:/@+-]+", text):
        return text
    return re.sub(r'(["`\\$])', r"\\\1", shlex.quote(text).replace("$", "$$"))


def with_data(notebook: NotebookNode, saved: Path) -> NotebookNode:
    """A chapter with links to its tables. saved: the list of their names; without one there are no links."""
    names = sorted(set(saved.read_text().split())) if saved.is_file() else []
    if names:
        links = ", ".join(f'<a href="results/{escape(name)}" download>{escape(Path(name).stem)}</a>' for name in names)
        text = f"Tables of this page as CSV, explained in {{doc}}`results`: {links}."
        notebook.cells.append(nbformat.v4.new_markdown_cell(text))
    return notebook


def main(arguments: list[str]) -> None:
    """texts and notebooks, alternating, then the folder of results and the folder to write to."""
    *pairs, results, folder = map(Path, arguments)
    for text, executed in zip(pairs[::2], pairs[1::2], strict=True):
        page = with_command(assembled(text, executed), text.stem, results.name)
        page = with_data(page, results / SAVED.format(text.stem))
        nbformat.write(page, folder / executed.name)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
