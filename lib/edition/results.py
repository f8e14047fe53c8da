"""Tables of a run, of the paper, and of earlier measurements."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from edition.pages import project_root
from residual.files import replacing

LIBRARIES = ("residual", "torch", "open_clip_torch", "transformers", "scikit-learn", "numpy")


def published(name: str) -> pd.DataFrame:
    """A table of the paper's numbers, from book/published."""
    return pd.read_csv(project_root() / "book/published" / f"{name}.csv")


def measured(name: str) -> pd.DataFrame:
    """A table measured once on a machine that a run of the book does not have, from book/measured."""
    return pd.read_csv(project_root() / "book/measured" / f"{name}.csv")


def results_folder(profile: str) -> Path:
    folder = project_root() / "_build/results" / profile
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_results(table: pd.DataFrame, profile: str, name: str) -> Path:
    """Write a tidy table of this run to _build/results/<profile>/<name>.csv."""
    path = results_folder(profile) / f"{name}.csv"
    with replacing(path) as partial:
        table.to_csv(partial, index=False, float_format="%.6g")
    return path


def load_results(profile: str, name: str, *, chapter: str) -> pd.DataFrame:
    """A table that another chapter saved. Raises FileNotFoundError that names the chapter to run."""
    path = results_folder(profile) / f"{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; run the chapter {chapter} with the same profile first, or make book")
    return pd.read_csv(path)


def run_card(seconds: float, facts: dict[str, Any]) -> pd.DataFrame:
    """What a reader needs to repeat a run: parameters, commit, versions, machine, seconds."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=project_root(), capture_output=True, text=True, check=False
    )
    rows = {name: ", ".join(value) if isinstance(value, list) else value for name, value in facts.items()}
    rows["commit"] = commit.stdout.strip() or "not a git checkout"
    rows["Python"] = platform.python_version()
    rows |= {library: version(library) for library in LIBRARIES}
    rows["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    rows["seconds"] = round(seconds)
    return pd.DataFrame({"value": {name: str(value) for name, value in rows.items()}})
