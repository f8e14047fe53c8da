"""A Sphinx extension: formulas as MathML, which browsers draw; tables of cells numbered as tables; lighter pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator

# A copy of every icon, 1.5 MB, though a font draws those that are shown; what runs cells on servers; what searches.
UNUSED = r"<script[^>]*(?:fontawesome\.js|sphinx-thebe|x-thebe|>const THEBE).*?</script>"
OF_SEARCH = r"|<script[^>]*(?:searchindex|searchtools|language_data)\.js.*?</script>"


def mathml(tex: str, *, block: bool) -> str:
    """A formula as a math element. Raises ValueError, with the formula, for what docutils cannot read."""
    bare = tex.lstrip()[:1] in ("_", "^")  # as in "EVR$_1$"
    try:
        return tex2mathml(r"\text{}" * bare + tex, as_block=block)
    except (ValueError, SyntaxError, IndexError) as error:
        raise ValueError(f"no MathML for {tex!r}: {error}") from error


def _inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(mathml(node.astext(), block=False))
    raise nodes.SkipNode


def _display(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(writer.starttag(node, "div", CLASS="math", tabindex="0"))  # it scrolls where it is wide
    if node["number"]:
        number = get_node_equation_number(writer, node)
        writer.body.append(f'<span class="eqno">({number})')
        writer.add_permalink_ref(node, "Link to this equation")
        writer.body.append("</span>")
    writer.body.append(mathml(node.astext().strip(), block=True) + "</div>\n")
    raise nodes.SkipNode


class TableFigure(nodes.figure):
    """What a cell captions under a label "tab-...", which Sphinx counts among the tables."""


class TablesOfCells(SphinxTransform):
    default_priority = 10  # before anything is numbered

    def apply(self, **_options: Any) -> None:
        for figure in list(self.document.findall(nodes.figure)):
            if any(name.startswith("tab-") for name in figure["ids"]):
                table = TableFigure("", *figure.children, **figure.attributes)
                figure.replace_self(table)
                self.document.ids |= dict.fromkeys(table["ids"], table)  # where references look


def _title(node: nodes.Node) -> str:
    return next((caption.astext() for caption in node.findall(nodes.caption)), "")


def _lighten(app: Sphinx, error: Exception | None) -> None:
    for page in Path(app.outdir).glob("*.html") if error is None else ():
        unused = UNUSED + OF_SEARCH * (page.name != "search.html")
        page.write_text(re.sub(unused, "", page.read_text(encoding="utf-8"), flags=re.DOTALL), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    figure = HTML5Translator.visit_figure, HTML5Translator.depart_figure
    app.add_enumerable_node(TableFigure, "table", _title, html=figure)
    app.add_transform(TablesOfCells)
    app.connect("build-finished", _lighten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
