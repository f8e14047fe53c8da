"""The pages of the book: where they are, their parameters in text and profile, and what they read of each other.

Imports no encoder and no torch, so that the graph of a run is known at once.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import jupytext
import yaml

READS = {  # chapters that read others' tables or trainings
    "learned": ("alignment",),
    "tables": ("selection",),
    "claims": ("dimension", "pursuit", "semantics", "similarity", "selection", "alignment"),
    "reproduction": ("dimension", "semantics", "similarity", "selection", "alignment"),
}
AFTER = READS | {"alignment": ("selection",)}  # which extracts the units of the same tasks


class ParameterError(ValueError):
    """A chapter was given a parameter that is unknown or ill-typed."""


def project_root() -> Path:
    """The project's folder, from anywhere inside it. Raises FileNotFoundError outside."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "_toc.yml").is_file():
            return folder
    raise FileNotFoundError(f"{here} is not inside the project (no _toc.yml above it)")


def pages() -> list[str]:
    """All pages but the root, in the order of the table of contents."""
    return [entry["file"] for entry in yaml.safe_load((project_root() / "_toc.yml").read_text())["chapters"]]


def chapters() -> list[str]:
    """The pages that are computed: those with parameters."""
    return [page for page in pages() if chapter_defaults(chapter_path(page))]


def chapters_on_device() -> list[str]:
    """The chapters that compute on a device."""
    return [page for page in pages() if "device" in chapter_defaults(chapter_path(page))]


def chapter_path(chapter: str) -> Path:
    return project_root() / "book" / f"{chapter}.md"


def chapter_defaults(path: Path) -> dict[str, Any]:
    """The values that a chapter's cell tagged `parameters` assigns; none for a page without one."""
    tagged = (cell.source for cell in jupytext.read(path).cells if "parameters" in cell.metadata.get("tags", ()))
    assigned = (statement for source in tagged for statement in ast.parse(source).body)
    return {a.targets[0].id: ast.literal_eval(a.value) for a in assigned if isinstance(a, ast.Assign)}


def read_profile(path: Path, chapter: str) -> dict[str, Any]:
    """The parameters of a chapter in a profile. Raises ParameterError for a file that is none."""
    profile = yaml.safe_load(path.read_text())
    values = (profile.get(chapter) or {}) if isinstance(profile, dict) else None
    if not isinstance(values, dict):
        raise ParameterError(f"{path} is not a profile: it must map chapters to parameters")
    return values
