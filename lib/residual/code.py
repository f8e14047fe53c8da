"""What code does, apart from how it is described: the part of a source that results depend on."""

from __future__ import annotations

import ast


def without_docstrings(source: str) -> str:
    """A source as a syntax tree in words, without docstrings, comments and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)
