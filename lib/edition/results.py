"""Tables of a run, of the paper, and of earlier measurements."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from edition.pages import project_root

LIBRARIES = ("residual", "torch", "open_clip_torch", "transformers", "scikit-learn", "numpy")


class Outputs(NamedTuple):
    """What a chapter leaves in its folder of results. tables: name -> what a row is. folders: of other files."""

    tables: Mapping[str, str]
    folders: tuple[str, ...]


@functools.cache
def _explanations() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(Path(__file__).with_suffix(".yml").read_text())


def outputs(chapter: str) -> Outputs:
    """From results.yml, which the Snakefile and the page *Does it hold?* read as well."""
    known = _explanations()
    return Outputs(known["tables"].get(chapter, {}), tuple(known["folders"].get(chapter, ())))


def published(name: str) -> pd.DataFrame:
    """A table of the paper's numbers, from book/published."""
    return pd.read_csv(project_root() / "book/published" / f"{name}.csv")


def measured(name: str) -> pd.DataFrame:
    """A table measured once on a machine that a run of the book does not have, from book/measured."""
    return pd.read_csv(project_root() / "book/measured" / f"{name}.csv")


def find(file: str, chapter: str, folders: Iterable[Path]) -> Path:
    """A file in the first of several folders that has it. Raises FileNotFoundError that names the chapter to run."""
    places = [folder / file for folder in folders]
    if path := next((place for place in places if place.is_file()), None):
        return path
    raise FileNotFoundError(f"no {places[0]}; run the chapter {chapter} with the same profile first, or make book")


def read_table(path: Path, *, chapter: str) -> pd.DataFrame:
    """A table of a run. Raises ValueError that names the chapter to run again where the file is damaged."""
    try:
        return pd.read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run the chapter {chapter} again") from error


def columns() -> dict[str, str]:
    """What columns are whose names do not say all."""
    return _explanations()["columns"]


def run_line(seconds: float) -> str:
    """On what a run was made: commit, versions, machine, seconds."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, cwd=project_root(), capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    versions = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    code = f"commit {commit}" if commit else "not a git checkout"
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return f"{code}; Python {platform.python_version()}, {versions}; {machine}; {seconds:.0f} seconds"
