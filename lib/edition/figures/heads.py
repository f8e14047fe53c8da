"""Figures with every head, or every unit, in a place of its own."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from edition.figures.axes import plain_numbers
from residual.units import Unit


def agreement_grids(table: pd.DataFrame) -> list[Axes]:
    """Fig. 3 and 8: agreement of two sets of descriptions, layers in columns and heads in rows, for each model.

    table: columns model, layer, head, z.
    """
    models = list(dict.fromkeys(table["model"]))
    size = 0.55 * table["layer"].nunique() + 1, 0.3 * table["head"].nunique() + 0.9
    size = size[0] * len(models), size[1]
    _, axes = plt.subplots(1, len(models), figsize=size, squeeze=False, layout="constrained")
    for ax, model in zip(axes.flat, models, strict=True):
        grid = table[table["model"] == model].pivot(index="head", columns="layer", values="z")
        sns.heatmap(grid, annot=True, fmt=".2f", cmap="Blues", vmin=0, vmax=4, cbar=False, ax=ax, annot_kws={"size": 8})
        ax.set(title=model, xlabel="layer", ylabel="head")
        ax.tick_params(length=0, rotation=0)
    return list(axes.flat)


def similarity_rows(table: pd.DataFrame) -> list[Axes]:
    """Fig. 4a and 10-15: data sets in rows by falling mean, all heads in columns by layer, one panel for each model.

    table: columns model, dataset, layer, head, similarity.
    """
    grids = {}
    for model, rows in table.groupby("model", sort=False):
        order = rows.groupby("dataset")["similarity"].mean().sort_values(ascending=False).index
        grids[model] = rows.pivot(index="dataset", columns=["layer", "head"], values="similarity").loc[order]
    return _head_rows(grids, "similarity to the reference set")


def factor_rows(table: pd.DataFrame) -> list[Axes]:
    """Factors in rows, all heads in columns by layer, one panel for each model.

    table: columns model, factor, layer, head, share.
    """
    order = list(dict.fromkeys(table["factor"]))
    grids = {
        model: rows.pivot(index="factor", columns=["layer", "head"], values="share").loc[order]
        for model, rows in table.groupby("model", sort=False)
    }
    return _head_rows(grids, "share of the head's variance")


def chosen_rows(chosen: dict[tuple[str, str, str], list[int]], shapes: dict[str, tuple[int, int]]) -> list[Axes]:
    """Tasks in rows, all heads in columns by layer, one panel for each model; brighter where more methods choose.

    chosen: (model, task, method) -> heads, numbered through all layers. shapes: layers and heads of each model.
    """
    methods = {method for *_, method in chosen}
    tasks = list(dict.fromkeys(task for _, task, _ in chosen))
    grids = {}
    for model, shape in shapes.items():
        columns = pd.MultiIndex.from_product([*map(range, shape)], names=["layer", "head"])
        grids[model] = pd.DataFrame(0.0, index=tasks, columns=columns)
    for (model, task, _), heads in chosen.items():
        grids[model].loc[task, grids[model].columns[heads]] += 1 / len(methods)
    return _head_rows(grids, "share of the scores")


def gain_rows(table: pd.DataFrame) -> list[Axes]:
    """The factor that multiplies every unit: tasks in rows, units in columns by layer, one panel for each model.

    table: columns model, task, unit, gain. Shown as log2, up to a factor of four either way.
    """
    grids = {}
    for model, rows in table.groupby("model", sort=False):
        units = rows["unit"].map(Unit.parse)
        heads = [np.inf if unit.kind == "MLP" else unit.head for unit in units]  # the MLP comes last
        rows = rows.assign(layer=[unit.layer for unit in units], head=heads, value=np.log2(rows["gain"]))
        grid = rows.pivot(index="task", columns=["layer", "head"], values="value").sort_index(axis=1)
        grids[model] = grid.loc[list(dict.fromkeys(rows["task"]))]
    axes = _head_rows(grids, "factor", cmap="PuOr", limits=(-2, 2), unit="units")
    axes[0].figure.axes[-1].set_yticks([-2, -1, 0, 1, 2], ["1/4", "1/2", "1", "2", "4"])
    return axes


def _head_rows(
    grids: dict[str, pd.DataFrame],
    label: str,
    *,
    cmap: str = "cividis",
    limits: tuple[float, float] = (0, 1),
    unit: str = "heads",
) -> list[Axes]:
    """Values in rows, with columns (layer, head)."""
    size = 9.5, sum(0.2 * len(grid) + 0.7 for grid in grids.values())
    figure, axes = plt.subplots(len(grids), 1, figsize=size, squeeze=False, layout="constrained")
    for ax, (model, grid) in zip(axes.flat, grids.items(), strict=True):
        image = ax.imshow(grid, aspect="auto", cmap=cmap, vmin=limits[0], vmax=limits[1], interpolation="nearest")
        layers = grid.columns.get_level_values("layer")
        middles = [np.flatnonzero(layers == layer).mean() for layer in layers.unique()]
        for edge in np.flatnonzero(np.diff(layers)):
            ax.axvline(edge + 0.5, color="white" if cmap == "cividis" else "black", lw=1)
        ax.set_xticks(middles, layers.unique())
        ax.set_yticks(range(len(grid)), grid.index)
        ax.set_title(model, loc="left")  # in sight on a phone, which shows a part of the width
        ax.tick_params(length=0, labelsize=8)
    axes.flat[-1].set_xlabel(f"layer (its {unit} side by side)")
    figure.colorbar(image, ax=axes, label=label, shrink=0.5, aspect=30)
    return list(axes.flat)


def correlations(matrix: pd.DataFrame) -> Axes:
    """Fig. 9: a square table of correlations, annotated."""
    side = 0.75 * len(matrix) + 1.6
    _, ax = plt.subplots(figsize=(side, 0.75 * side), layout="constrained")
    sns.heatmap(matrix, annot=True, fmt=".2f", cmap="Blues", vmin=0, vmax=1, cbar=False, ax=ax)
    ax.set(xlabel="", ylabel="")
    ax.tick_params(length=0)
    ax.set_xticks(ax.get_xticks(), ax.get_xticklabels(), rotation=30, ha="right")
    ax.set_yticks(ax.get_yticks(), ax.get_yticklabels(), rotation=0)
    return ax


def overlap_grids(grids: dict[str, pd.DataFrame]) -> list[Axes]:
    """Square tables of overlaps from 0 to 1, one panel for each."""
    side = 0.3 * max(map(len, grids.values())) + 1
    _, axes = plt.subplots(
        1, len(grids), figsize=(side * len(grids) + 1, side + 1), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, (name, grid) in zip(axes.flat, grids.items(), strict=True):
        sns.heatmap(grid, cmap="cividis", vmin=0, vmax=1, cbar=ax is axes.flat[-1], square=True, ax=ax)
        ax.set(title=name, xlabel="", ylabel="")
        ax.tick_params(length=0, labelsize=8)
        ax.set_xticks(ax.get_xticks(), ax.get_xticklabels(), rotation=90)
    return list(axes.flat)


def sampling_curves(table: pd.DataFrame) -> Axes:
    """How alike a head is to itself on other images of one data set: by number of images, for early and late layers.

    table: columns images, layers, similarity, low, high (5 % and 95 % of heads).
    """
    _, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for index, (name, rows) in enumerate(table.groupby("layers", sort=False)):
        colour = sns.color_palette("colorblind")[index]
        ax.plot(rows["images"], rows["similarity"], marker="os^"[index], color=colour, label=name)
        ax.fill_between(rows["images"], rows["low"], rows["high"], color=colour, alpha=0.2, lw=0)
    ax.set(xscale="log", xlabel="images in each half", ylabel="similarity of two halves")
    plain_numbers(ax.xaxis)
    ax.legend(frameon=False)
    ax.grid(axis="y", color="#e5e5e5", lw=0.6)
    return ax


def unit_norms(norms: pd.DataFrame) -> Axes:
    """How far each unit takes the output: mean length over images, by layer and unit, one panel's worth.

    norms: layers in index, units ("H0", ..., "MLP") in columns.
    """
    _, ax = plt.subplots(figsize=(0.5 * norms.shape[1] + 2, 0.32 * norms.shape[0] + 1), layout="constrained")
    sns.heatmap(norms, cmap="cividis", ax=ax, cbar_kws={"label": "mean length, share of the output's"})
    ax.set(xlabel="unit", ylabel="layer")
    ax.tick_params(length=0, rotation=0)
    return ax
