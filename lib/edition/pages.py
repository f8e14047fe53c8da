"""The pages of the book: where they are, their parameters in text and profile, and what they read of each other.

Imports neither torch nor an encoder's library, so that the graph of a run is known in seconds.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jupytext
import yaml
from nbformat import NotebookNode

READS = {  # chapters that read others' tables or trainings
    "heads": ("dimension", "semantics", "ground_truth"),
    "ground_truth": ("alignment",),
    "intro": ("claims", "alignment"),
    "claims": ("dimension", "pursuit", "semantics", "similarity", "selection", "alignment"),
}
FOLLOWS = {  # chapters that come after others which make units or trainings that both need
    "data": ("selection",), "pursuit": ("dimension",), "semantics": ("dimension",),
    "similarity": ("dimension", "selection"),
    "text_and_code": ("selection", "alignment"), "heads": ("selection", "alignment"),
}  # fmt: skip
LAST = "running"  # the chapter that lists what all others took


class ParameterError(ValueError):
    """A chapter was given a parameter that is unknown or ill-typed."""


def project_root() -> Path:
    """The project's folder, from anywhere inside it. Raises FileNotFoundError outside."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "_toc.yml").is_file():
            return folder
    raise FileNotFoundError(f"{here} is not inside the project; go there, or give papermill its folder by --cwd")


def pages() -> list[str]:
    """All pages, in the order of the table of contents; the root first."""
    contents = yaml.safe_load((project_root() / "_toc.yml").read_text())
    return [contents["root"], *(entry["file"] for part in contents["parts"] for entry in part["chapters"])]


def chapters() -> list[str]:
    """The pages that are computed: those with parameters."""
    return [page for page in pages() if chapter_defaults(chapter_path(page))]


def after(chapter: str) -> tuple[str, ...]:
    """The chapters that a chapter waits for, as it reads what they make, or lists what they cost."""
    if chapter == LAST:
        return tuple(other for other in chapters() if other != LAST)
    return READS.get(chapter, ()) + FOLLOWS.get(chapter, ())


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


def code_cells(path: Path) -> list[NotebookNode]:
    """The cells of code of a page's text."""
    return _code_cells(path.read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=64)
def _code_cells(text: str) -> list[NotebookNode]:
    return [cell for cell in jupytext.reads(text, fmt="md:myst").cells if cell.cell_type == "code"]


def chapter_defaults(path: Path) -> dict[str, Any]:
    """The literals that a chapter's cell tagged `parameters` assigns; none for a page without one.

    Raises ParameterError where that cell assigns anything else.
    """
    source = "\n".join(cell.source for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", ()))
    try:
        assigned = (s for s in ast.parse(source).body if isinstance(s, ast.Assign | ast.AnnAssign))
        targets = ((s.target if isinstance(s, ast.AnnAssign) else s.targets[0], s.value) for s in assigned)
        return {target.id: ast.literal_eval(value) for target, value in targets}
    except (SyntaxError, ValueError) as error:
        raise ParameterError(f"{path}: the cell of parameters must assign plain values: {error}") from error


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


def read_chapters(path: Path) -> dict[str, Any]:
    """All of a profile: parameters by chapter. Raises ParameterError, of one line, for a file that is none."""
    try:
        profile = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path} is not a profile: {' '.join(str(error).split())}") from error
    profile = {} if profile is None else profile  # a file of comments
    if not isinstance(profile, dict) or not all(isinstance(own, dict | None) for own in profile.values()):
        raise ParameterError(f"{path} is not a profile: it must map chapters to parameters")
    return profile


def read_profile(path: Path, chapter: str) -> dict[str, Any]:
    """The parameters of a chapter in a profile, `profile` among them: the file's name. Errors as `read_chapters`."""
    values = read_chapters(path).get(chapter) or {}
    if values.get("profile", path.stem) != path.stem:
        raise ParameterError(f"{path}: {chapter} has profile = {values['profile']!r}, which must be {path.stem!r}")
    return {"profile": path.stem} | values


def write_inputs(profile: Path) -> dict[str, str]:
    """Files from which Snakemake sees what has changed: of each chapter its code and its parameters in a profile.

    "library" has the checksums of every module and data file in lib/, of the tables in book/, and of constraints.txt.
    Written only where they differ; returns their paths by chapter, relative to the project.
    """
    root, texts = project_root(), {}
    for chapter in chapters():
        parameters = chapter_defaults(chapter_path(chapter)) | read_profile(profile, chapter)
        texts[chapter] = {"parameters": parameters, "code": [c.source for c in code_cells(chapter_path(chapter))]}
    tables = (path for path in (root / "book").rglob("*") if path.suffix in (".csv", ".json"))
    files = (path for path in (root / "lib").resolve().rglob("*") if path.suffix != ".pyc" and path.is_file())
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (*tables, root / "constraints.txt")}
    for path in files:
        if not path.parent.name.endswith(".egg-info"):
            sums[str(path.relative_to((root / "lib").resolve()))] = hashlib.sha256(path.read_bytes()).hexdigest()
    texts["library"] = dict(sorted(sums.items()))
    paths = {name: f"_build/inputs/{profile.stem}/{name}.json" for name in texts}
    for name, found in texts.items():
        path, text = root / paths[name], json.dumps(found, indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
    return paths
