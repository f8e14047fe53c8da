"""Tables as a reader sees them: accuracies by task, encoder and method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
from pandas.io.formats.style import Styler


def by_task(table: pd.DataFrame, tasks: Iterable[str], columns: str) -> pd.DataFrame:
    """Accuracies with tasks in rows and, below each model, one of `columns` ("method", "strategy"); and the average."""
    wide = table.pivot(index="dataset", columns=["model", columns], values="accuracy").loc[list(tasks)]
    if "Average" not in wide.index:
        wide.loc["Average"] = wide.mean()
    return wide


def best_bold(wide: pd.DataFrame, models: Sequence[str], methods: Sequence[str]) -> Styler:
    """The given columns to two digits, with the best of each row and model in bold."""
    columns = pd.MultiIndex.from_product([models, methods])
    style = wide.reindex(columns=columns).style.format("{:.2f}", na_rep="")
    for model in models:
        style = style.highlight_max(subset=pd.IndexSlice[:, [model]], axis=1, props="font-weight: bold")
    return style


def with_counts(style: Styler, counts: pd.Series) -> Styler:
    """A table with a last row of parameter counts, by model and method."""
    row = pd.DataFrame([counts.reindex(style.columns).to_list()], index=["parameters"], columns=style.columns)
    return style.concat(row.style.format(na_rep=""))


def wrapped(table: pd.DataFrame) -> Styler:
    """A table of texts, broken into lines, without an index."""
    return table.style.hide(axis="index").set_properties(**{"white-space": "normal"})


def models_of(table: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(table["model"]))
