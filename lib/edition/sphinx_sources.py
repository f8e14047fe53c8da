"""A Sphinx extension: what a cell calls of this project links to its source.

That is the repository where _config.yml gives its address, and pages of the site where it does not.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable
from html import escape
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from sphinx.application import Sphinx

from edition.pages import chapter_path, code_cells

LIB = Path(__file__).resolve().parents[1]
PACKAGES = ("residual", "edition", "zoo")
CHAPTER = "edition.chapter"  # whose class is every page's `run`
NAMES = re.compile(  # as Pygments marks them: a name, or the attribute of one, but not an attribute's attribute
    r'(?<!<span class="o">\.</span>)(?:<span class="n">(?P<owner>\w+)</span><span class="o">\.</span>)?'
    r'(?P<span><span class="[a-z]+">(?P<name>\w+)</span>)'
)
CODE = re.compile(r'<div class="highlight-i?python3?\b.*?</pre>', re.DOTALL)
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>body {{ background: white; margin: 1rem; }} .highlight {{ overflow-x: auto; }}
:target {{ outline: 2px solid #0072b2; }} {style}</style></head><body><h1>{title}</h1>{code}</body></html>
"""


@functools.cache
def definitions() -> dict[str, dict[str, int]]:
    """The lines of functions, classes and constants, and of methods as "Class.method", by module."""
    found = {}
    for path in sorted(path for package in PACKAGES for path in (LIB / package).rglob("*.py")):
        lines: dict[str, int] = {}
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            lines |= dict.fromkeys(_names(node), node.lineno)
            if isinstance(node, ast.ClassDef):
                lines |= {f"{node.name}.{name}": part.lineno for part in node.body for name in _names(part)}
        found[".".join(path.relative_to(LIB).with_suffix("").parts).removesuffix(".__init__")] = lines
    return found


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def find(module: str, name: str) -> tuple[str, int] | None:
    """The module and line that define what `from module import name` gives; None where that is not clear."""
    known = definitions()
    if name in known.get(module, ()):
        return module, known[module][name]
    places = [
        (other, lines[name]) for other, lines in known.items() if other.startswith(f"{module}.") and name in lines
    ]
    return places[0] if len(places) == 1 else None


def imported(text: str) -> dict[str, str]:
    """What the cells of a page import of this project: the module and the name in it, by the name on the page."""
    names = {}
    for cell in code_cells(text):
        for node in ast.walk(ast.parse(re.sub(r"^[%!].*", "", cell.source, flags=re.MULTILINE))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
                names |= {alias.asname or alias.name: f"{node.module} {alias.name}" for alias in node.names}
    return names


def linked(page: str, names: dict[str, str], address: Callable[[str, int], str]) -> str:
    """A page whose code links to the definitions of `names`, of attributes of those that are modules, and of `run`'s.

    address: of a module and a line.
    """

    def target(owner: str | None, name: str) -> tuple[str, int] | None:
        if owner is None:
            return find(*names[name].split()) if name in names else None
        if owner == "run":
            return find(CHAPTER, f"Chapter.{name}")
        return find(names[owner].replace(" ", "."), name) if owner in names else None

    def link(match: re.Match) -> str:
        place = target(match["owner"], match["name"])
        if place is None:
            return match[0]
        made = f'<a class="source" href="{escape(address(*place))}">{match["span"]}</a>'
        return match[0].removesuffix(match["span"]) + made

    return CODE.sub(lambda code: NAMES.sub(link, code[0]), page)


def source_file(module: str) -> Path:
    path = LIB.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def source_page(module: str) -> str:
    """A module's source as a page, with an anchor for each line: L12."""
    form = HtmlFormatter(linenos="inline", lineanchors="L", style="a11y-high-contrast-light")
    code = highlight(source_file(module).read_text(encoding="utf-8"), PythonLexer(), form)
    code = re.sub(r' (id|name)="L-(\d+)"', r' \1="L\2"', code)
    return PAGE.format(title=escape(module), style=form.get_style_defs(".highlight"), code=code)


def _finish(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.name != "html":  # a book on one page is for print
        return
    repository = app.config.html_theme_options.get("repository_url", "")
    branch = app.config.html_theme_options.get("repository_branch") or "main"

    def address(module: str, line: int) -> str:
        path = source_file(module).relative_to(LIB).as_posix()
        return f"{repository}/blob/{branch}/lib/{path}#L{line}" if repository else f"source/{module}.html#L{line}"

    for name in sorted(app.env.found_docs):
        text, page = chapter_path(name), Path(app.outdir) / f"{name}.html"
        if text.is_file():
            names = imported(text.read_text(encoding="utf-8"))
            page.write_text(linked(page.read_text(encoding="utf-8"), names, address), encoding="utf-8")
    if not repository:
        (Path(app.outdir) / "source").mkdir(exist_ok=True)
        for module in definitions():
            (Path(app.outdir) / f"source/{module}.html").write_text(source_page(module), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", _finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
