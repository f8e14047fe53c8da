"""Tables as a reader sees them: accuracies by task, encoder and method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    style = table.style.format(digits, escape="html", **options)
    style = style.format_index(escape="html", axis=0).format_index(escape="html", axis=1)
    style = style.format(subset=list(html)) if html else style
    style = style if index else style.hide(axis="index")
    return style.set_properties(**{"white-space": "normal"}) if wrap else style


def by_task(table: pd.DataFrame, tasks: Iterable[str], columns: str) -> pd.DataFrame:
    """Accuracies with tasks in rows and, below each model, one of `columns` ("method", "strategy"); and the average."""
    wide = table.pivot(index="dataset", columns=["model", columns], values="accuracy").loc[list(tasks)]
    if "Average" not in wide.index:
        wide.loc["Average"] = wide.mean()
    return wide


def best_bold(wide: pd.DataFrame, models: Sequence[str], methods: Sequence[str]) -> Styler:
    """The given columns to two digits, with the best of each row and model in bold."""
    columns = pd.MultiIndex.from_product([models, methods])
    style = styled(wide.reindex(columns=columns), "{:.2f}", na_rep="")
    for model in models:
        style = style.highlight_max(subset=pd.IndexSlice[:, [model]], axis=1, props="font-weight: bold")
    return style


def with_counts(style: Styler, counts: pd.Series) -> Styler:
    """A table with a last row of parameter counts, by model and method."""
    row = pd.DataFrame([counts.reindex(style.columns).to_list()], index=["parameters"], columns=style.columns)
    return style.concat(styled(row, na_rep=""))


def models_of(table: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(table["model"]))
