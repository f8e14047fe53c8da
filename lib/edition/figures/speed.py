"""Figures of speed and memory."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from edition.figures.axes import plain_numbers

MARKERS = "osD^vP"
TICKS = (1000, 5000, 20_000, 80_000)  # images


def speed_ratios(table: pd.DataFrame) -> Axes:
    """How many times as long the other way takes, on a logarithmic scale. table: what, against, ratio."""
    names = table["what"] + "\nagainst " + table["against"]
    _, ax = plt.subplots(figsize=(8.5, 0.48 * len(table) + 0.8), layout="constrained")
    ax.axvline(1, color="grey", lw=1)
    ax.hlines(range(len(table)), 1, table["ratio"], color="lightgrey", lw=2, zorder=1)
    ax.scatter(table["ratio"], range(len(table)), color=sns.color_palette("colorblind")[0], zorder=2)
    for row, ratio in enumerate(table["ratio"]):
        ax.annotate(
            f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}", (ratio, row), (7, -3), textcoords="offset points", size=8
        )
    ax.set(xscale="log", xlabel="time of the other way over ours", yticks=range(len(table)))
    ax.set_yticklabels(names, size=8)
    ax.set_xlim(right=3 * table["ratio"].max())
    ax.xaxis.set_major_formatter("{x:g}")
    ax.invert_yaxis()
    return ax


def growth(tables: dict[str, pd.DataFrame]) -> list[Axes]:
    """A cost against the number of images, both logarithmic, one panel for each kind of cost.

    tables: label of the vertical axis -> columns what, images, cost.
    """
    _, axes = plt.subplots(1, len(tables), figsize=(4.6 * len(tables), 4.4), squeeze=False, layout="constrained")
    for ax, (label, table) in zip(axes.flat, tables.items(), strict=True):
        for index, (what, rows) in enumerate(table.groupby("what", sort=False)):
            colour, style = sns.color_palette("colorblind")[index], ("-", "--", "-.", ":")[index % 4]
            ax.plot(rows["images"], rows["cost"], style, color=colour, marker=MARKERS[index], ms=5, label=what)
        ax.set(xscale="log", yscale="log", xlabel="images", ylabel=label)
        ax.set_xticks([n for n in TICKS if table["images"].min() <= n <= table["images"].max()])
        plain_numbers(ax.xaxis)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False, fontsize=8)
    return list(axes.flat)
