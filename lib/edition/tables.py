"""Tables as a reader sees them: accuracies by task, encoder and method."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler


def styled(
    table: pd.DataFrame, digits: str | Mapping[str, str] | None = None, *, index: bool = True, wrap: bool = False,
    html: Sequence[str] = (), **options: Any,
) -> Styler:  # fmt: skip
    """A table whose texts are shown as they are: names of files and classes may hold HTML, which no browser must run.

    digits: a format for all cells, or for each column. index: whether rows have names. wrap: whether texts are broken
    into lines. html: columns with links of our own. options: as `Styler.format` takes them.
    """
    formats = (
        {c: _unsigned_zero(d) for c, d in digits.items()} if isinstance(digits, Mapping) else _unsigned_zero(digits)
    )
    style = table.style.format(formats, escape="html", **options)
    style = style.format_index(escape="html", axis=0).format_index(escape="html", axis=1)
    style = style.format(subset=list(html)) if html else style
    style = style if index else style.hide(axis="index")
    return style.set_properties(**{"white-space": "normal"}) if wrap else style


def _unsigned_zero(digits: str | None) -> Callable[[float], str] | None:
    """A format that writes no "-0.00"."""
    return digits and (lambda value: re.sub(r"^-(0\.?0*)$", r"\1", digits.format(value)))


def by_task(table: pd.DataFrame, tasks: Iterable[str], columns: str) -> pd.DataFrame:
    """Accuracies with tasks in rows and, below each model, one of `columns` ("method", "strategy"); and the average."""
    wide = table.pivot(index="dataset", columns=["model", columns], values="accuracy").loc[list(tasks)]
    if "Average" not in wide.index:
        wide.loc["Average"] = wide.mean()
    return wide


def best_bold(wide: pd.DataFrame, models: Sequence[str], methods: Sequence[str]) -> Styler:
    """The given columns to two digits, a block of rows for each model, with the best of each row in bold."""
    blocks = {model: wide[model].reindex(columns=list(methods)) for model in models if model in wide}
    style = styled(pd.concat(blocks, names=["model", None]), "{:.2f}", na_rep="")
    edge = {"selector": f"tbody tr:nth-child({len(wide)}n+1) > *", "props": "border-top: 1px solid"}
    name = {"selector": "th.level0", "props": "vertical-align: top"}
    return style.set_table_styles([edge, name]).apply(_best, axis=1)


def _best(row: pd.Series) -> list[str]:
    shown = row.round(2)  # as many digits as the reader sees
    return ["font-weight: bold" if value == shown.max() else "" for value in shown]


def with_counts(style: Styler, counts: pd.Series) -> Styler:
    """A table of `best_bold` with a last row of parameter counts for each model."""
    models = style.index.get_level_values(0).unique()
    rows = pd.DataFrame([[counts.get((m, method)) for method in style.columns] for m in models], columns=style.columns)
    rows.index = pd.MultiIndex.from_product([models, ["parameters"]])
    return style.concat(styled(rows, na_rep=""))


def models_of(table: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(table["model"]))
