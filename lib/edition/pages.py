"""The pages of the book: where they are, their parameters in text and profile, and what they read of each other.

Imports no encoder and no torch, so that the graph of a run is known at once.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

READS = {  # chapters that read others' tables or trainings
    "heads": ("dimension", "semantics", "ground_truth"),
    "learned": ("alignment",),
    "tables": ("selection",),
    "intro": ("claims", "ground_truth", "alignment", "reproduction"),
    "claims": ("dimension", "pursuit", "semantics", "similarity", "selection", "alignment"),
    "reproduction": ("dimension", "semantics", "similarity", "selection", "alignment"),
}
LAST = ("costs", "results")  # chapters that list what all others took and saved
FOLLOWS = {  # chapters that come after one that makes units or trainings that both need
    "alignment": "selection", "zoo": "selection", "class_means": "dimension", "similarity": "dimension",
    "text_and_code": "alignment", "playground": "alignment",
}  # fmt: skip
PROFILE = "RESIDUAL_PROFILE"  # in the environment of a chapter: the file of its profile
DOING = "RESIDUAL_DOING"  # in the environment of a chapter: a file for the progress of an extraction
BOOK = "RESIDUAL_BOOK"  # in the environment of a chapter that is run for the book
HOW = ("device", "workers")  # parameters that say how a chapter runs, not what it computes
SAVED = ".{}.saved"  # in a run's folder: the names of the tables that a chapter saved
LONGEST = 80  # characters of a run's name


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
    """All pages, in the order of the table of contents; the root first."""
    contents = yaml.safe_load((project_root() / "_toc.yml").read_text())
    return [contents["root"], *(entry["file"] for part in contents["parts"] for entry in part["chapters"])]


def chapters() -> list[str]:
    """The pages that are computed: those with parameters."""
    return [page for page in pages() if chapter_defaults(chapter_path(page))]


def chapters_on_device() -> list[str]:
    """The chapters that compute on a device."""
    return [page for page in pages() if "device" in chapter_defaults(chapter_path(page))]


def after(chapter: str) -> tuple[str, ...]:
    """The chapters that a chapter waits for, as it reads what they make, or lists what they cost."""
    if chapter in LAST:  # each after all that come before it
        return tuple(other for other in chapters() if other not in LAST[LAST.index(chapter) :])
    return READS.get(chapter, ()) + ((FOLLOWS[chapter],) if chapter in FOLLOWS else ())


def chapter_path(chapter: str) -> Path:
    return project_root() / "book" / f"{chapter}.md"


def find_chapter(given: str) -> Path:
    """The text of a chapter, by its name or path. Raises ParameterError with the names there are."""
    for path in (Path(given), chapter_path(given)):
        if path.suffix == ".md" and path.is_file():
            return path
    close = difflib.get_close_matches(given, chapters(), 1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ParameterError(f"there is no chapter {given!r}{hint} Chapters are {', '.join(chapters())}, or give a file")


@dataclass(frozen=True)
class CodeCell:
    """A cell of code of a page, with its options (tags, captions) and the line on which its source starts."""

    source: str
    options: dict[str, Any]
    line: int


@functools.lru_cache(maxsize=64)
def code_cells(text: str) -> list[CodeCell]:
    """The code of a page as Jupytext reads it, in a hundredth of the time: to import Jupytext takes a second."""
    cells = []
    for match in re.finditer(r"^```\{code-cell\}[^\n]*\n(.*?)^```[ ]*$", text, re.MULTILINE | re.DOTALL):
        head = re.match(r"---\n(.*?)^---\n|((?::[^\n]*\n)*)", match[1], re.MULTILINE | re.DOTALL)
        options = yaml.safe_load(head[1] if head[1] is not None else re.sub(r"^:", "", head[2], flags=re.MULTILINE))
        source = match[1][head.end() :].lstrip("\n")
        line = text.count("\n", 0, match.end(1) - len(source)) + 1
        cells.append(CodeCell(source.rstrip("\n"), options or {}, line))
    return cells


def chapter_defaults(path: Path) -> dict[str, Any]:
    """The values that a chapter's cell tagged `parameters` assigns; none for a page without one."""
    cells = code_cells(path.read_text(encoding="utf-8"))
    return assigned_values("\n".join(cell.source for cell in cells if "parameters" in cell.options.get("tags", ())))


def assigned_values(source: str) -> dict[str, Any]:
    """The literals that code assigns, by name."""
    assigned = (s for s in ast.parse(source).body if isinstance(s, ast.Assign | ast.AnnAssign))
    targets = ((s.target if isinstance(s, ast.AnnAssign) else s.targets[0], s.value) for s in assigned)
    return {target.id: ast.literal_eval(value) for target, value in targets}


def find_profile(given: str | Path) -> Path:
    """The file of a profile: the name of one in profiles/, or any path. Raises ParameterError with those there are."""
    folder = project_root() / "profiles"
    path = Path(given).expanduser()
    path = path if path.suffix in (".yml", ".yaml") else folder / f"{given}.yml"
    if path.is_file() and (path.absolute().parent == folder or not (folder / path.name).exists()):
        return path.absolute()
    if path.is_file():
        raise ParameterError(f"{path} has the name of a profile of the project, {folder / path.name}; rename it")
    names = ", ".join(sorted(file.stem for file in folder.glob("*.yml")))
    shown = path if path.suffix == Path(given).suffix else given
    raise ParameterError(f"there is no profile {shown}; give one of {names}, or the path of a YAML file")


def profile_of_run(name: str) -> Path | None:
    """The file of the profile of this run of a chapter; None for a name that is no profile's."""
    given, ours = Path(os.environ.get(PROFILE, "")), project_root() / f"profiles/{name}.yml"
    return next((file for file in (given, ours) if file.stem == name and file.is_file()), None)


def read_profile(path: Path, chapter: str) -> dict[str, Any]:
    """The parameters of a chapter in a profile, `profile` among them: the file's name.

    Raises ParameterError for a file that is none.
    """
    try:
        profile = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path} is not a profile: {error}") from error
    profile = {} if profile is None else profile  # a file of comments
    values = (profile.get(chapter) or {}) if isinstance(profile, dict) else None
    if not isinstance(values, dict):
        raise ParameterError(f"{path} is not a profile: it must map chapters to parameters")
    if values.get("profile", path.stem) != path.stem:
        raise ParameterError(f"{path}: {chapter} has profile = {values['profile']!r}, which must be {path.stem!r}")
    return {"profile": path.stem} | values


def run_name(chapter: Path, parameters: Mapping[str, Any]) -> str:
    """The folder of a run's results: its profile's name, and what differs from the profile, as "mini--images-500".

    The profile's name alone is for runs of the book; another run with its parameters is "mini--rerun". So no rerun
    changes what the book reads. A name that is no profile's stands for itself.
    """
    profile = parameters["profile"]
    file = profile_of_run(profile)
    if file is None:
        of_a_book = (project_root() / "_build/runs" / profile).is_dir()
        return f"{profile}--rerun" if of_a_book and not os.environ.get(BOOK) else profile
    usual = chapter_defaults(chapter) | read_profile(file, chapter.stem)
    changed = {k: v for k, v in parameters.items() if k not in (*HOW, "profile") and v != usual.get(k)}
    if not changed:
        return profile if os.environ.get(BOOK) else f"{profile}--rerun"
    whole = "--".join((profile, *(f"{name}-{_words(value)}" for name, value in changed.items())))
    name = re.sub(r"[^\w.+-]", "_", whole)
    if len(name) <= LONGEST and name == whole:
        return name
    return f"{name[:LONGEST]}--{hashlib.sha256(repr(sorted(changed.items())).encode()).hexdigest()[:6]}"


def missing_tables(run: str, chapter: str) -> list[str]:
    """The tables that a chapter saved in a run, and that are no longer there."""
    return [path.name for path in _saved_tables(run, chapter) if not path.is_file()]


def forget_tables(run: str, chapter: str) -> None:
    """Remove the tables that a chapter saved before in a run, so that no other reads them if it fails now."""
    for path in _saved_tables(run, chapter):
        path.unlink(missing_ok=True)
    (project_root() / "_build/results" / run / SAVED.format(chapter)).unlink(missing_ok=True)


def _saved_tables(run: str, chapter: str) -> list[Path]:
    """The tables that a chapter saved in a run, whether they are still there or not."""
    folder = project_root() / "_build/results" / run
    listed = folder / SAVED.format(chapter)
    return [folder / name for name in listed.read_text().split()] if listed.is_file() else []


def read_cost(profile: str, chapter: str) -> dict[str, float]:
    """What a chapter of the book took, as `execute_chapter` wrote it; empty for none, and for a damaged file."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((project_root() / f"_build/runs/{profile}/{chapter}.cost.json").read_text())
    return {}


def _words(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
