"""Tables of a run, of the paper, and of earlier measurements."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from edition.pages import SAVED, chapters, project_root, read_cost
from residual.files import replacing

LIBRARIES = ("residual", "torch", "open_clip_torch", "transformers", "scikit-learn", "numpy")


def published(name: str) -> pd.DataFrame:
    """A table of the paper's numbers, from book/published."""
    return pd.read_csv(project_root() / "book/published" / f"{name}.csv")


def measured(name: str) -> pd.DataFrame:
    """A table measured once on a machine that a run of the book does not have, from book/measured."""
    return pd.read_csv(project_root() / "book/measured" / f"{name}.csv")


def results_folder(run: str) -> Path:
    """Where a run's results are; see `run_name`."""
    folder = project_root() / "_build/results" / run
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_results(table: pd.DataFrame, run: str, name: str, *, chapter: str) -> Path:
    """Write a chapter's tidy table to _build/results/<run>/<name>.csv."""
    path = results_folder(run) / f"{name}.csv"
    with replacing(path) as partial:
        table.to_csv(partial, index=False, float_format="%.6g")
    with (path.parent / SAVED.format(chapter)).open("a") as listed:
        listed.write(f"{path.name}\n")
    return path


def find_result(run: str, profile: str, file: str, *, chapter: str) -> Path:
    """A file that another chapter saved in the same run, or in its profile's.

    Raises FileNotFoundError that names the chapter to run.
    """
    folder = project_root() / "_build/results"
    path = next((path for path in (folder / run / file, folder / profile / file) if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"no {folder / run / file}; run the chapter {chapter} with the same profile first, or make book"
        )
    return path


def read_table(path: Path, *, chapter: str) -> pd.DataFrame:
    """A table of a run. Raises ValueError that names the chapter to run again where the file is damaged."""
    try:
        return pd.read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run the chapter {chapter} again") from error


def _commit() -> str:
    """The commit of the project; "" without git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=project_root(), capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


@functools.cache
def _explanations() -> dict[str, dict[str, str]]:
    return yaml.safe_load(Path(__file__).with_suffix(".yml").read_text())


def saved_tables(profile: str) -> pd.DataFrame:
    """Every table of the book's run: chapter, table, what a row is, rows and columns."""
    rows, folder = [], results_folder(profile)
    for chapter in chapters():
        listed = folder / SAVED.format(chapter)
        names = dict.fromkeys(listed.read_text().split()) if listed.is_file() else {}
        for path in (folder / name for name in names):
            if path.is_file():
                table = read_table(path, chapter=chapter)
                columns = ", ".join(table.columns)
                rows.append((chapter, path.stem, explained_table(path.stem), len(table), columns))
    return pd.DataFrame(rows, columns=["chapter", "table", "a row is", "rows", "columns"])


def explained_table(name: str) -> str:
    """What a row of a table is. Raises KeyError where results.yml does not say."""
    known = _explanations()
    by_prefix = (text for prefix, text in known["prefixes"].items() if name.startswith(prefix))
    return known["tables"].get(name) or next(by_prefix, None) or known["tables"][name]


def explained_columns() -> pd.DataFrame:
    return pd.DataFrame(_explanations()["columns"].items(), columns=["column", "what it is"])


def costs(profile: str) -> pd.DataFrame:
    """What each chapter of the book's run took: minutes, CPU minutes and memory of its process, in the book's order."""
    rows = {}
    for chapter in chapters():
        if cost := read_cost(profile, chapter):
            rows[chapter] = cost["seconds"] / 60, cost["cpu_seconds"] / 60, cost["bytes"] / 1e9
    return pd.DataFrame.from_dict(rows, orient="index", columns=["minutes", "CPU minutes", "GB"])


def run_card(seconds: float, facts: dict[str, Any]) -> pd.DataFrame:
    """What a reader needs to repeat a run: parameters, commit, versions, machine, seconds."""
    rows = {name: ", ".join(value) if isinstance(value, list) else value for name, value in facts.items()}
    rows["commit"] = _commit() or "not a git checkout"
    rows["Python"] = platform.python_version()
    rows |= {library: version(library) for library in LIBRARIES}
    rows["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    rows["seconds"] = round(seconds)
    return pd.DataFrame({"value": {name: str(value) for name, value in rows.items()}})
