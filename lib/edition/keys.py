"""What each chapter of the book depends on, so that a change reruns the chapters that it concerns, and no others.

A chapter's key names the code of its cells, its parameters, the modules that it reaches by imports, the files of data
beside them, the tables that it reads and constraints.txt; not prose, captions, docstrings and comments.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from edition.pages import (
    chapter_defaults,
    chapter_path,
    chapters,
    code_cells,
    missing_tables,
    project_root,
    read_profile,
)
from residual.code import without_docstrings

LIBRARY = Path(__file__).parent.parent


def chapter_key(chapter: str, profile: Path) -> dict[str, str]:
    """The hash of everything that a chapter's results depend on, by its name."""
    path = chapter_path(chapter)
    source = "\n".join(cell.source for cell in code_cells(path.read_text(encoding="utf-8")))
    files = sorted(_reached(_imports(ast.parse(source))))
    facts = {"code of the chapter": _hash(without_docstrings(source).encode())}
    parameters = chapter_defaults(path) | read_profile(profile, chapter)
    facts["parameters"] = _hash(json.dumps(parameters, sort_keys=True).encode())
    texts = [source, *(file.read_text() for file in files if file.is_relative_to(LIBRARY / "edition"))]
    for file in (*files, *_beside(files), *_named_in(texts), project_root() / "constraints.txt"):
        facts[str(file.relative_to(LIBRARY if file.is_relative_to(LIBRARY) else project_root()))] = _file_hash(file)
    return facts


def write_keys(profile: Path) -> dict[str, str]:
    """A file for each chapter, written only if its key has changed; returns their paths by chapter."""
    folder = project_root() / "_build/keys" / profile.stem
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for chapter in chapters():
        path, text = folder / f"{chapter}.json", json.dumps(chapter_key(chapter, profile), indent=1)
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
            _outdate(chapter, profile.stem, path)
        elif missing_tables(profile.stem, chapter):
            _outdate(chapter, profile.stem, path)
        paths[chapter] = str(path.relative_to(project_root()))
    return paths


def _outdate(chapter: str, profile: str, key: Path) -> None:
    """Make a key newer than the run of its chapter, even where the clock was set back."""
    run = project_root() / f"_build/runs/{profile}/{chapter}.ipynb"
    now = time.time()
    os.utime(key, (max(now, run.stat().st_mtime + 1) if run.is_file() else now,) * 2)


@functools.cache
def _module(name: str) -> Path | None:
    """The file of a module of the library; None for what is none."""
    base = LIBRARY.joinpath(*name.split("."))
    return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)


@functools.cache
def _exports(package: str) -> dict[str, str]:
    """The names that a package takes from its modules, at once or when they are used, and the modules; else none."""
    if (file := _module(package)).name != "__init__.py":
        return {}
    tree, names = ast.parse(file.read_text()), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(package):
            names |= {alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.keyword) and node.arg == "submod_attrs":
            lazy = ast.literal_eval(node.value)
            names |= {name: f"{package}.{module}" for module, attributes in lazy.items() for name in attributes}
    return names


def _imports(tree: ast.Module) -> Iterator[str]:
    """The modules that a tree imports, at its top or in functions; of packages only what is used of them."""
    nodes = list(ast.walk(tree))
    used = {(n.value.id, n.attr) for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and _module(node.module or ""):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if not _module(name):
                    yield _exports(node.module).get(alias.name, node.module)
                elif exports := _exports(name):
                    attributes = {attr for variable, attr in used if variable == (alias.asname or alias.name)}
                    yield from {exports.get(attribute, name) for attribute in attributes}
                else:
                    yield name


def _reached(names: Iterable[str]) -> set[Path]:
    """The files of modules, and of those that they import in turn."""
    found: set[Path] = set()
    waiting = list(names)
    while waiting:
        file = _module(waiting.pop())
        if file and file not in found:
            found.add(file)
            waiting += _imports_of(file)
    return found


@functools.cache
def _imports_of(file: Path) -> tuple[str, ...]:
    return tuple(_imports(ast.parse(file.read_text())))


def _beside(files: Iterable[Path]) -> list[Path]:
    """Files of data in the folders of modules: catalogues, templates, weights."""
    folders = {file.parent for file in files}
    inside = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    data = {path for path in inside if path.suffix not in (".py", ".pyc", ".md")}
    return sorted(p for p in data if p.parent in folders or not (p.parent / "__init__.py").is_file())


def _named_in(texts: Iterable[str]) -> list[Path]:
    """The tables of the paper's numbers and of measurements that code names."""
    whole = "\n".join(texts)
    tables = (path for path in (project_root() / "book").rglob("*") if path.suffix in (".csv", ".json"))
    return sorted(path for path in tables if f'"{path.stem}"' in whole or path.name in whole)


@functools.cache
def _file_hash(path: Path) -> str:
    return _hash(without_docstrings(path.read_text()).encode() if path.suffix == ".py" else path.read_bytes())


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
