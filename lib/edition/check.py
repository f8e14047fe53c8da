"""Checks the pages of the book without running them: `python -m edition.check`. Each fault with its file and line."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from edition.pages import chapter_defaults, chapter_path, chapters, code_cells, pages, project_root

Fault = tuple[Path, int, str]
ROLE = re.compile(r"\{(?P<role>doc|numref|ref|eq|cite(?::\w+)?|glue:text)\}`(?P<target>[^`]+)`")
LABELS = re.compile(r"^\s*(?:name|:name|:label): *(\S+)|^\((\S+)\)=|^\$\$ *\((\S+)\)", re.MULTILINE)


def faults() -> Iterator[Fault]:
    """Unknown targets of references, citations and values, labels that repeat, and what a new page still needs."""
    root = project_root()
    if broken := list(_unreadable(root)):
        yield from broken  # the rest cannot be told before these are mended
        return
    texts = {path: _body(path.read_text()) for path in sorted((root / "book").glob("*.md"))}
    labels: dict[str, Path] = {}
    for path, text in texts.items():
        for match in LABELS.finditer(text):
            label = next(filter(None, match.groups()))
            if label in labels:
                yield path, _line(text, match.start()), f"the label {label!r} is in {labels[label].name} already"
            labels[label] = path
    keys = set(re.findall(r"^@\w+\{([^,]+),", (root / "book/references.bib").read_text(), re.MULTILINE))
    for path, text in texts.items():
        yield from _references(path, text, set(labels), keys, {other.stem for other in texts})
        yield from _cells(path, text)
    yield from _pages(root, texts)


def _unreadable(root: Path) -> Iterator[Fault]:
    """Pages that are listed and missing, and cells whose options or parameters cannot be read."""
    toc = root / "_toc.yml"
    for name in pages():
        path = chapter_path(name)
        if not path.is_file():
            yield toc, 1, f"there is no book/{name}.md"
            continue
        try:
            chapter_defaults(path)
        except SyntaxError as error:
            yield path, 1, f"the cell of parameters is not Python: {error.msg}: {(error.text or '').strip()}"
        except (yaml.YAMLError, ValueError) as error:
            yield path, 1, f"a cell's options, or a parameter, cannot be read: {' '.join(str(error).split())}"


def _body(text: str) -> str:
    """A text with its header emptied, so that lines keep their numbers."""
    header = re.match(r"---\n.*?\n---\n", text, re.DOTALL)
    return "\n" * header[0].count("\n") + text[header.end() :] if header else text


def _references(path: Path, text: str, labels: set[str], keys: set[str], names: set[str]) -> Iterator[Fault]:
    values = _glued(text)
    for match in ROLE.finditer(text):
        role, target = match["role"].partition(":")[0], re.sub(r".*<(.+)>$", r"\1", match["target"])
        if role == "glue":
            wrong = [] if values is None or target.partition(":")[0] in values else [target]
            missing = "no cell glues the value"
        elif role == "cite":
            wrong, missing = [key for key in re.split(r", *", target) if key not in keys], "references.bib lacks"
        elif role == "doc":
            wrong, missing = [target] * (target not in names), "there is no page"
        else:
            wrong, missing = [target] * (target not in labels), "no figure, table or equation has the label"
        for name in wrong:
            yield path, _line(text, match.start()), f"{missing} {name!r}"


def _glued(text: str) -> set[str] | None:
    """The names that cells glue; None where they are not all written out."""
    names: set[str] = set()
    for cell in code_cells(text):
        for call in (node for node in ast.walk(_parsed(cell.source)) if isinstance(node, ast.Call)):
            if getattr(call.func, "attr", getattr(call.func, "id", "")) == "glue":
                if any(keyword.arg is None for keyword in call.keywords):
                    return None
                names |= {keyword.arg for keyword in call.keywords}
                names |= {a.value for a in call.args if isinstance(a, ast.Constant)}
    return names


def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError:  # told by `_cells`
        return ast.Module([], [])


def _cells(path: Path, text: str) -> Iterator[Fault]:
    for cell in code_cells(text):
        try:
            ast.parse(cell.source)
        except SyntaxError as error:
            yield path, cell.line + (error.lineno or 1) - 1, f"this is not Python: {error.msg}"


def _pages(root: Path, texts: dict[Path, str]) -> Iterator[Fault]:
    """What a page needs beside its text."""
    intro, slurm = root / "book/intro.md", root / "profiles/slurm/config.yaml"
    yield from ((path, 1, "it is not in _toc.yml") for path in texts if path.stem not in pages())
    for name in chapters():
        if chapter_path(name) != intro and f"{{doc}}`{name}`" not in texts[intro]:
            yield intro, 1, f"its table lacks the chapter {name}"
        if "device" not in chapter_defaults(chapter_path(name)) and f"'{name}'" not in slurm.read_text():
            yield slurm, 1, f"the chapter {name}, which has no device, is not among those for CPU nodes"
        if f'Chapter("{name}", globals())' not in texts[chapter_path(name)]:
            yield chapter_path(name), 1, f'no cell calls run = Chapter("{name}", globals())'


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def told_faults() -> list[str]:
    """Every fault in a line, with file and line."""
    return [f"{path.relative_to(project_root())}:{line}: {told}" for path, line, told in faults()]


def main() -> int:
    found = told_faults()
    print("\n".join(found), file=sys.stderr, end="\n" * bool(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
