"""The plots that pages share. Each returns the matplotlib axes that it drew; what one page alone draws stands there."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib_inline.backend_inline import set_matplotlib_formats

COLOURS, DASHES, MARKS = (
    sns.color_palette("colorblind"),
    ("-", "--", "-.", ":", (0, (4, 1, 1, 1)), (0, (1, 2))),
    "osD^vP",
)
DIMENSIONS = {"linear_id": "L", "twonn_id": "N", "ratio": "Ratio", "evr1": "EVR\u2081"}
DECIMALS = {"linear_id": 1, "twonn_id": 1, "ratio": 2, "evr1": 2}
DARKEST = {"linear_id": 1.0, "twonn_id": 0.5, "ratio": 5.0, "evr1": 1.0}  # L and N as shares of a head's width
WIDTH = 64  # of the paper's heads


def set_style() -> None:
    """Figures that are the same from every run, and whose text can be read and searched."""
    set_matplotlib_formats("svg", metadata={"Date": None})
    plt.rcParams["text.parse_math"] = False  # a dollar in the name of a folder or a class is a dollar
    fonts = {"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Verdana"]}  # text stays text
    plt.rcParams.update({"svg.hashsalt": "residual"} | fonts)


def panels(count: int, height: float, width: float = 3.2, across: int = 3, **options: Any) -> tuple[Figure, list[Axes]]:
    """Axes side by side, at most `across` of them in a row. height, width: inches of each."""
    across = min(count, across)
    down = -(-count // across)
    options = {"figsize": (width * across + 0.5, height * down), "squeeze": False, "layout": "constrained"} | options
    figure, axes = plt.subplots(down, across, **options)
    for ax in axes.flat[count:]:
        ax.remove()
    return figure, list(axes.flat[:count])


def legend_below(figure: Figure, columns: int = 4) -> None:
    """One legend for all panels, with each name once."""
    pairs = [pair for ax in figure.axes for pair in zip(*ax.get_legend_handles_labels()[::-1], strict=True)]
    named = dict(reversed(pairs))
    order = dict.fromkeys(name for name, _ in pairs)
    figure.legend([named[name] for name in order], order, loc="outside lower center", ncols=columns, frameon=False)


def plain_numbers(axis: Axis, form: str = "{x:,.0f}") -> None:
    """Show the numbers of a logarithmic axis as they are, not as powers, whose formulas would not be read."""
    axis.set_major_formatter(form)
    axis.set_minor_formatter("")


def lines(
    table: pd.DataFrame, x: str, y: str, hue: str, panel: str = "model", *, height: float = 3.0, **axes: Any
) -> list[Axes]:
    """Lines with marks, a colour for each value of `hue`, a panel for each of `panel`. axes: of `Axes.set`."""
    names, hues = list(dict.fromkeys(table[panel])), list(dict.fromkeys(table[hue]))
    figure, drawn = panels(len(names), height, sharey=True)
    for ax, name in zip(drawn, names, strict=True):
        for index, value in enumerate(hues):
            rows = table[(table[panel] == name) & (table[hue] == value)].sort_values(x)
            style = {"color": COLOURS[index % len(COLOURS)], "ls": DASHES[index % len(DASHES)], "ms": 4, "label": value}
            ax.plot(rows[x], rows[y], marker=MARKS[index % len(MARKS)], **style)
        ax.set(**{"title": name, "xlabel": x} | axes)
        ax.set_ylabel(y if ax.get_subplotspec().is_first_col() else "")
    legend_below(figure)
    return drawn


def accuracy_dots(table: pd.DataFrame, measures: Mapping[str, str]) -> list[Axes]:
    """Accuracies with two standard errors: tasks in rows, one panel for each model, a mark for each measure.

    table: columns model, task, chance, and for each key of `measures` the accuracy and key + "_se".
    measures: column -> its name in the legend.
    """
    models, tasks = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["task"]))
    figure, axes = panels(len(models), 0.3 * len(tasks) + 1.2, 9 / min(len(models), 3), sharey=True)
    places = np.arange(len(tasks))
    for ax, model in zip(axes, models, strict=True):
        rows = table[table["model"] == model].set_index("task").reindex(tasks)
        ax.scatter(rows["chance"], places, marker="|", color="black", s=70, label="chance")
        for index, (column, name) in enumerate(measures.items()):
            style = {"fmt": MARKS[index], "color": COLOURS[index], "ms": 5, "lw": 1.2, "mfc": ("none", None)[index % 2]}
            ax.errorbar(rows[column], places, xerr=2 * rows[f"{column}_se"], label=name, **style)
        ax.set(xlim=(-0.03, 1.03), title=model, xlabel="accuracy", yticks=places, yticklabels=tasks)
        ax.grid(color="#e5e5e5", lw=0.6)
        ax.set_axisbelow(True)
    axes[0].invert_yaxis()
    legend_below(figure, 7)
    return axes


def dimension_heatmaps(table: pd.DataFrame) -> list[Axes]:
    """Fig. 2: for each model, layers in rows and L, N, their ratio and EVR1 in columns.

    table: columns model, layer, linear_id, twonn_id, ratio, evr1, and head_width unless it is 64. Shades have one scale
    for each column in every figure, of L and N in widths of a head.
    """
    models, relative = list(dict.fromkeys(table["model"])), in_widths(table)
    figure, axes = panels(len(models), 0.23 * table.groupby("model").size().max() + 0.8, 2.9)
    figure.set_visible(False)  # or seaborn draws the whole figure for each model, to see whether labels overlap
    for ax, model in zip(axes, models, strict=True):
        rows, shades = (p[p["model"] == model].set_index("layer")[list(DIMENSIONS)] for p in (table, relative))
        text = rows.apply(lambda column: column.map(lambda v, c=column.name: f"{v:.{DECIMALS[c]}f}"))
        options = {"cmap": "Blues", "vmin": 0, "vmax": 1.25, "cbar": False, "annot_kws": {"size": 8}}
        sns.heatmap(shades / pd.Series(DARKEST), annot=text, fmt="", ax=ax, rasterized=True, **options)
        ax.set_xticklabels(DIMENSIONS.values())
        ax.set_yticklabels(rows.index, rotation=0)
        ax.xaxis.tick_top()
        ax.tick_params(length=0)
        ax.set(xlabel="", ylabel="Layer", title=model)
    figure.set_visible(True)
    return axes


def in_widths(table: pd.DataFrame) -> pd.DataFrame:
    """The same with L and N, and their errors, as shares of a head's width."""
    width = table.get("head_width", WIDTH)
    columns = [name for name in table if name.startswith(("linear_id", "twonn_id"))]
    return table.assign(**{name: table[name] / width for name in columns})


def agreement_grids(table: pd.DataFrame) -> list[Axes]:
    """Fig. 3 and 8: agreement of two sets of descriptions, layers in columns and heads in rows, for each model.

    table: columns model, layer, head, z.
    """
    models = list(dict.fromkeys(table["model"]))
    _, axes = panels(len(models), 0.3 * table["head"].nunique() + 0.9, 0.55 * table["layer"].nunique() + 1, across=1)
    for ax, model in zip(axes, models, strict=True):
        grid = table[table["model"] == model].pivot(index="head", columns="layer", values="z")
        sns.heatmap(grid, annot=True, fmt=".2f", cmap="Blues", vmin=0, vmax=4, cbar=False, ax=ax, annot_kws={"size": 8})
        ax.set(title=model, xlabel="layer", ylabel="head")
        ax.tick_params(length=0, rotation=0)
    return axes


def head_rows(
    table: pd.DataFrame, row: str, value: str, label: str, *, falling: bool = False, unit: str = "heads",
    cmap: str = "cividis", limits: tuple[float, float] = (0, 1),
) -> list[Axes]:  # fmt: skip
    """Values in rows, with all heads in columns by layer, one panel for each model.

    table: columns model, layer, head (infinite for an MLP, which comes last), `row` and `value`. falling: whether rows
    are in the order of their means.
    """
    grids = {}
    for model, part in table.groupby("model", sort=False):
        order = part.groupby(row, sort=False)[value].mean()
        order = order.sort_values(ascending=False) if falling else order
        grids[model] = (
            part.pivot(index=row, columns=["layer", "head"], values=value).sort_index(axis=1).loc[order.index]
        )
    size = 9.5, sum(0.2 * len(grid) + 0.7 for grid in grids.values())
    figure, axes = plt.subplots(len(grids), 1, figsize=size, squeeze=False, layout="constrained")
    for ax, (model, grid) in zip(axes.flat, grids.items(), strict=True):
        image = ax.imshow(grid, aspect="auto", cmap=cmap, vmin=limits[0], vmax=limits[1], interpolation="nearest")
        layers = grid.columns.get_level_values("layer")
        for edge in np.flatnonzero(np.diff(layers)):
            ax.axvline(edge + 0.5, color="white" if cmap == "cividis" else "black", lw=1)
        ax.set_xticks([np.flatnonzero(layers == layer).mean() for layer in layers.unique()], layers.unique())
        ax.set_yticks(range(len(grid)), grid.index)
        ax.set_title(model, loc="left")  # in sight on a phone, which shows a part of the width
        ax.tick_params(length=0, labelsize=8)
    axes.flat[-1].set_xlabel(f"layer (its {unit} side by side)")
    figure.colorbar(image, ax=axes, label=label, shrink=0.5, aspect=30)
    return list(axes.flat)


def squares(grids: Mapping[str, pd.DataFrame], *, annotate: bool = False) -> list[Axes]:
    """Square tables of values from 0 to 1, one panel for each."""
    side = (0.75 if annotate else 0.3) * max(map(len, grids.values())) + 1.2
    _, axes = panels(len(grids), side, side)
    for ax, (name, grid) in zip(axes, grids.items(), strict=True):
        options = {"annot": annotate, "fmt": ".2f", "cmap": "Blues" if annotate else "cividis", "vmin": 0, "vmax": 1}
        sns.heatmap(grid, cbar=not annotate and ax is axes[-1], square=True, ax=ax, **options)
        ax.set(title=name, xlabel="", ylabel="")
        ax.tick_params(length=0, labelsize=8)
        ax.set_xticks(ax.get_xticks(), ax.get_xticklabels(), rotation=90)
        ax.set_yticks(ax.get_yticks(), ax.get_yticklabels(), rotation=0)
    return axes


def pictures(images: Any, captions: Sequence[str], columns: int) -> list[Axes]:
    """Images [n 3 h w], each with a caption of a few words under it."""
    down = -(-len(images) // columns)
    _, axes = plt.subplots(
        down, columns, figsize=(9, 9 * down / columns + 0.4 * down), squeeze=False, layout="constrained"
    )
    for ax, image, caption in zip(axes.flat, images, captions, strict=True):
        ax.imshow(image.permute(1, 2, 0), interpolation="none")
        ax.set(xticks=[], yticks=[])
        ax.set_xlabel(textwrap.fill(caption, 18), fontsize=9)
        sns.despine(ax=ax, left=True, bottom=True)
    return list(axes.flat)
