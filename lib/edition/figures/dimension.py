"""Figures of section 3.1: dimensions by layer."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

COLUMNS = {"linear_id": "L", "twonn_id": "N", "ratio": "Ratio", "evr1": "EVR\u2081"}
DECIMALS = {"linear_id": 1, "twonn_id": 1, "ratio": 2, "evr1": 2}
DARKEST = {"linear_id": 1.0, "twonn_id": 0.5, "ratio": 5.0, "evr1": 1.0}  # L and N as shares of a head's width
WIDTH = 64  # of the paper's heads


def dimension_heatmaps(table: pd.DataFrame) -> list[Axes]:
    """Fig. 2: for each model, layers in rows and L, N, their ratio and EVR1 in columns.

    table: columns model, layer, linear_id, twonn_id, ratio, evr1, and head_width unless it is 64. Shades have one scale
    for each column in every figure, of L and N in widths of a head.
    """
    models, relative = list(dict.fromkeys(table["model"])), _in_widths(table)
    across = min(len(models), 3)
    down = -(-len(models) // across)
    height = down * (0.23 * table.groupby("model").size().max() + 0.8)
    figure, axes = plt.subplots(down, across, figsize=(3 * across, height), squeeze=False, layout="constrained")
    figure.set_visible(False)  # or seaborn draws the whole figure for each model, to see whether labels overlap
    for ax, model in zip(axes.flat, models, strict=False):
        rows, shades = (part[part["model"] == model].set_index("layer")[list(COLUMNS)] for part in (table, relative))
        shades = shades / pd.Series(DARKEST)
        text = rows.apply(lambda column: column.map(lambda v, c=column.name: f"{v:.{DECIMALS[c]}f}"))
        sns.heatmap(
            shades,
            annot=text,
            fmt="",
            cmap="Blues",
            vmin=0,
            vmax=1.25,
            cbar=False,
            ax=ax,
            annot_kws={"size": 8},
            rasterized=True,
        )
        ax.set_xticklabels(COLUMNS.values())
        ax.set_yticklabels(rows.index, rotation=0)
        ax.xaxis.tick_top()
        ax.tick_params(length=0)
        ax.set(xlabel="", ylabel="Layer", title=model)
    for ax in axes.flat[len(models) :]:
        ax.remove()
    figure.set_visible(True)
    return list(axes.flat[: len(models)])


def _in_widths(table: pd.DataFrame) -> pd.DataFrame:
    """The same with L and N, and their errors, as shares of a head's width."""
    width = table.get("head_width", WIDTH)
    columns = [name for name in table if name.startswith(("linear_id", "twonn_id"))]
    return table.assign(**{name: table[name] / width for name in columns})


def dimension_curves(ours: pd.DataFrame, theirs: pd.DataFrame) -> list[Axes]:
    """L, N, their ratio and EVR1 against relative depth: ours in heavy lines with two standard errors, theirs thin.

    L and N are shares of a head's width; see `dimension_heatmaps` for the tables.
    """
    figure, axes = plt.subplots(2, 2, figsize=(8, 6), layout="constrained")
    dashes = ["-", "--", ":", "-.", (0, (5, 1, 1, 1)), (0, (1, 3)), (0, (8, 2))]
    colours = sns.color_palette("colorblind")
    greys = ["black", "dimgrey", "grey"]
    for table, width, palette in ((_in_widths(ours), 2.5, colours), (_in_widths(theirs), 1.0, greys)):
        for index, (model, rows) in enumerate(table.groupby("model", sort=False)):
            style = {"ls": dashes[index % len(dashes)], "color": palette[index % len(palette)], "lw": width}
            depth = rows["layer"] / rows["layer"].max()
            for ax, column in zip(axes.flat, COLUMNS, strict=True):
                ax.plot(depth, rows[column], label=model, **style)
                if f"{column}_se" in rows:
                    margin = 2 * rows[f"{column}_se"].fillna(0)
                    band = rows[column] - margin, rows[column] + margin
                    ax.fill_between(depth, *band, color=style["color"], alpha=0.2, lw=0)
    for ax, name in zip(
        axes.flat, ("L (PCA, 99 %) / head width", "N (TwoNN) / head width", "Ratio L/N", "EVR\u2081"), strict=True
    ):
        ax.set(xlabel="relative depth", title=name)
        ax.set_ylim(bottom=0)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return list(axes.flat)
