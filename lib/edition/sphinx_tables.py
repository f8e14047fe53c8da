"""A Sphinx extension: what a cell captions under a label "tab-..." is a table, and is numbered as one."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.writers.html5 import HTML5Translator


class TableFigure(nodes.figure):
    """A figure node that Sphinx counts among the tables."""


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


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_enumerable_node(
        TableFigure, "table", _title, html=(HTML5Translator.visit_figure, HTML5Translator.depart_figure)
    )
    app.add_transform(TablesOfCells)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
