"""Every plot of the book. Each returns the matplotlib axes it drew."""

from __future__ import annotations

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from torch import Tensor
from torchvision.utils import make_grid

COLUMNS = {"linear_id": "L", "twonn_id": "N", "ratio": "Ratio", "evr1": "EVR$_1$"}
DECIMALS = {"linear_id": 1, "twonn_id": 1, "ratio": 2, "evr1": 2}


def dimension_heatmaps(table: pd.DataFrame) -> list[Axes]:
    """Fig. 2: for each model, layers in rows and L, N, their ratio and EVR1 in columns.

    table: columns model, layer, linear_id, twonn_id, ratio, evr1. Shades run from the smallest
    to the largest value of each column of each model.
    """
    models = list(dict.fromkeys(table["model"]))
    across = min(len(models), 3)
    down = -(-len(models) // across)
    height = down * (0.23 * table.groupby("model").size().max() + 0.8)
    _, axes = plt.subplots(down, across, figsize=(3 * across, height), squeeze=False, layout="constrained")
    for ax, model in zip(axes.flat, models, strict=False):
        own = table[table["model"] == model].set_index("layer")[list(COLUMNS)]
        shades = (own - own.min()) / (own.max() - own.min()).replace(0, 1)
        text = own.apply(lambda column: column.map(lambda v, c=column.name: f"{v:.{DECIMALS[c]}f}"))
        sns.heatmap(shades, annot=text, fmt="", cmap="Blues", vmax=1.25, cbar=False, ax=ax, annot_kws={"size": 8})
        ax.set_xticklabels(COLUMNS.values())
        ax.set_yticklabels(own.index, rotation=0)
        ax.xaxis.tick_top()
        ax.tick_params(length=0)
        ax.set(xlabel="", ylabel="Layer", title=model)
    for ax in axes.flat[len(models) :]:
        ax.remove()
    return list(axes.flat[: len(models)])


def dimension_curves(ours: pd.DataFrame, theirs: pd.DataFrame) -> list[Axes]:
    """L, N, their ratio and EVR1 against relative depth: ours in heavy lines with two standard errors, theirs thin."""
    figure, axes = plt.subplots(2, 2, figsize=(8, 6), layout="constrained")
    dashes = ["-", "--", ":", "-.", (0, (5, 1, 1, 1)), (0, (1, 3)), (0, (8, 2))]
    colours = sns.color_palette("colorblind")
    for table, width, palette in ((ours, 2.5, colours), (theirs, 1.0, ["black", "dimgrey", "grey"])):
        for index, (model, own) in enumerate(table.groupby("model", sort=False)):
            style = {"ls": dashes[index % len(dashes)], "color": palette[index % len(palette)], "lw": width}
            depth = own["layer"] / own["layer"].max()
            for ax, column in zip(axes.flat, COLUMNS, strict=True):
                ax.plot(depth, own[column], label=model, **style)
                if f"{column}_se" in own:
                    margin = 2 * own[f"{column}_se"].fillna(0)
                    band = own[column] - margin, own[column] + margin
                    ax.fill_between(depth, *band, color=style["color"], alpha=0.2, lw=0)
    for ax, name in zip(axes.flat, ("L (PCA, 99 %)", "N (TwoNN)", "Ratio L/N", "EVR$_1$"), strict=True):
        ax.set(xlabel="relative depth", title=name)
        ax.set_ylim(bottom=0)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return list(axes.flat)


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
    for model, own in table.groupby("model", sort=False):
        order = own.groupby("dataset")["similarity"].mean().sort_values(ascending=False).index
        grids[model] = own.pivot(index="dataset", columns=["layer", "head"], values="similarity").loc[order]
    return _head_rows(grids, "similarity to the reference set")


def factor_rows(table: pd.DataFrame) -> list[Axes]:
    """Factors in rows, all heads in columns by layer, one panel for each model.

    table: columns model, factor, layer, head, share.
    """
    order = list(dict.fromkeys(table["factor"]))
    grids = {
        model: own.pivot(index="factor", columns=["layer", "head"], values="share").loc[order]
        for model, own in table.groupby("model", sort=False)
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


def by_share(table: pd.DataFrame, total: dict[str, int]) -> list[Axes]:
    """Mean accuracy over data sets against the share of heads kept, one panel for each model.

    table: columns model, strategy, ablation, heads, accuracy. total: heads of each model.
    """
    figure, axes = plt.subplots(
        1, len(total), figsize=(3.2 * len(total) + 0.5, 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, (model, heads) in zip(axes.flat, total.items(), strict=True):
        own = table[(table["model"] == model) & (table["ablation"] != "mean")]
        means = own.groupby(["strategy", "heads"])["accuracy"].mean()
        for index, method in enumerate(("U", "U|T", "S")):
            line = pd.concat([means[method], means["H"]])
            style = {
                "color": sns.color_palette("colorblind")[index],
                "ls": ("-", "--", "-.")[index],
                "marker": "osD"[index],
            }
            ax.plot(line.index / heads, line, label=method, ms=4, **style)
        ax.axhline(means["B"].item(), color="grey", lw=1, label="B")
        ax.axhline(means["O"].item(), color="black", lw=1, ls=":", label="O")
        ax.set(title=model, xlabel="share of heads", ylim=(0, 1))
    axes.flat[0].set_ylabel("accuracy")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return list(axes.flat)


def radar(table: pd.DataFrame, methods: dict[str, str], tasks: list[str]) -> list[Axes]:
    """Fig. 5 and 16: accuracy by task on spokes, one panel for each model.

    table: columns model, dataset, method, accuracy. methods: key -> name in the legend.
    """
    models = list(dict.fromkeys(table["model"]))
    figure, axes = plt.subplots(
        1, len(models), figsize=(3.9 * len(models), 4.4), subplot_kw={"projection": "polar"}, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    angles = np.linspace(0, 2 * np.pi, len(tasks), endpoint=False)
    colours, dashes = sns.color_palette("colorblind"), [":", "--", "-", "-."]
    for ax, model in zip(axes.flat, models, strict=True):
        values = table[table["model"] == model].pivot(index="dataset", columns="method", values="accuracy")
        for index, (method, name) in enumerate(methods.items()):
            if method not in set(table["method"]):
                continue
            own = values[method].reindex(tasks).to_numpy() if method in values else np.full(len(tasks), np.nan)
            style = {"color": colours[index], "ls": dashes[index], "marker": "osD^"[index], "ms": 3.5, "label": name}
            ax.plot([*angles, angles[0]], [*own, own[0]], **style)
        ax.set_xticks(angles, tasks, fontsize=7)
        for label, angle in zip(ax.get_xticklabels(), angles, strict=True):
            label.set_ha("center" if abs(np.cos(angle)) < 0.1 else "left" if np.cos(angle) > 0 else "right")
        ax.tick_params(axis="x", pad=-2)
        ax.set_ylim(0, 1)
        ax.set_yticks([0.25, 0.5, 0.75], ["", "0.5", ""], fontsize=7)
        ax.set_title(model, pad=18)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return list(axes.flat)


def frontier(panels: dict[str, pd.DataFrame]) -> list[Axes]:
    """Mean accuracy against trainable parameters: a panel for each table, a colour for each model, a mark by method.

    panels: title -> columns model, method, accuracy, params.
    """
    _, axes = plt.subplots(1, len(panels), figsize=(9.5, 3.8), squeeze=False, layout="constrained")
    colours, marks = sns.color_palette("colorblind"), {"RD_Y": "^", "RD*": "s", "RD": "D", "Lin": "o"}
    for ax, (title, table) in zip(axes.flat, panels.items(), strict=True):
        for index, (model, own) in enumerate(table.groupby("model", sort=False)):
            own = own.set_index("method").reindex([m for m in marks if m in set(own["method"])])
            ax.plot(own["params"], own["accuracy"], color=colours[index], lw=1, label=model)
            for method, row in own.iterrows():
                ax.plot(row["params"], row["accuracy"], marks[method], color=colours[index], ms=6)
        for method, mark in marks.items():
            ax.plot([], [], mark, color="grey", label=method)
        ax.set(xscale="log", title=title, xlabel="trainable parameters", ylabel="mean accuracy")
        ax.grid(color="#e5e5e5", lw=0.6)
        ax.legend(fontsize=7)
    return list(axes.flat)


def gain_rows(table: pd.DataFrame) -> list[Axes]:
    """By what every unit was multiplied: tasks in rows, units in columns by layer, one panel for each model.

    table: columns model, task, unit, gain. Shown as log2, up to a factor of four either way.
    """
    grids = {}
    for model, own in table.groupby("model", sort=False):
        where = own["unit"].str.extract(r"L(\d+)\.(?:H(\d+)|MLP)").astype(float)
        own = own.assign(layer=where[0].astype(int), head=where[1].fillna(np.inf), value=np.log2(own["gain"]))
        grid = own.pivot(index="task", columns=["layer", "head"], values="value").sort_index(axis=1)
        grids[model] = grid.loc[list(dict.fromkeys(own["task"]))]
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
        ax.set(title=model)
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


def sampling_curves(table: pd.DataFrame) -> Axes:
    """How alike a head is to itself on other images of one data set: by number of images, for early and late layers.

    table: columns images, layers, similarity, low, high (5 % and 95 % of heads).
    """
    _, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for index, (name, own) in enumerate(table.groupby("layers", sort=False)):
        colour = sns.color_palette("colorblind")[index]
        ax.plot(own["images"], own["similarity"], marker="os^"[index], color=colour, label=name)
        ax.fill_between(own["images"], own["low"], own["high"], color=colour, alpha=0.2, lw=0)
    ax.set(xscale="log", xlabel="images in each half", ylabel="similarity of two halves")
    ax.legend(frameon=False)
    ax.grid(axis="y", color="#e5e5e5", lw=0.6)
    return ax


def residual_block() -> Axes:
    """Fig. 6: a pre-norm block writes its heads and its MLP into the residual stream."""
    _, ax = plt.subplots(figsize=(9, 3.1), layout="constrained")
    ax.set(xlim=(0, 18), ylim=(0, 6))
    ax.axis("off")
    arrow = {"arrowstyle": "-|>", "lw": 1.4, "color": "black"}
    ax.annotate("", (17.9, 1), (0.1, 1), arrowprops=arrow | {"lw": 3})
    ax.text(0.2, 0.35, "residual stream of the class token", va="center")
    ax.text(17.8, 0.35, "to final LayerNorm and projection", ha="right", va="center")
    for start, name, shade in ((1.5, "attention heads", "#cfe3f3"), (10, "MLP", "#f6dfc4")):
        _box(ax, start, 3.9, 2.4, "LayerNorm", "#eeeeee")
        width = 3.4 if name != "MLP" else 2.4
        _box(ax, start + 3.1, 3.9, width, name, shade)
        end = start + 3.1 + width + 0.7
        ax.plot([start - 0.5, start - 0.5], [1, 4.5], color="black", lw=1.4)
        ax.annotate("", (start, 4.5), (start - 0.5, 4.5), arrowprops=arrow)
        ax.annotate("", (start + 3.1, 4.5), (start + 2.4, 4.5), arrowprops=arrow)
        ax.plot([start + 3.1 + width, end], [4.5, 4.5], color="black", lw=1.4)
        ax.annotate("", (end, 1.35), (end, 4.5), arrowprops=arrow)
        ax.text(end, 1, "+", ha="center", va="center", fontsize=13, bbox={"boxstyle": "circle", "fc": "white"})
        unit = "$\\sum_h H_{l,h}$" if name != "MLP" else "$M_l$"
        ax.text(end - 0.2, 2.6, unit, ha="right", va="center", fontsize=12)
    ax.text(9.2, 5.75, "block $l$, repeated $L$ times", ha="center", va="center")
    return ax


def _box(ax: Axes, x: float, y: float, width: float, text: str, colour: str) -> None:
    ax.add_patch(plt.Rectangle((x, y), width, 1.2, fc=colour, ec="black"))
    ax.text(x + width / 2, y + 0.6, text, ha="center", va="center")


def unit_norms(norms: pd.DataFrame) -> Axes:
    """How far each unit takes the output: mean length over images, by layer and unit, one panel's worth.

    norms: layers in index, units ("H0", ..., "MLP") in columns.
    """
    _, ax = plt.subplots(figsize=(0.5 * norms.shape[1] + 2, 0.32 * norms.shape[0] + 1), layout="constrained")
    sns.heatmap(norms, cmap="cividis", ax=ax, cbar_kws={"label": "mean length, share of the output's"})
    ax.set(xlabel="unit", ylabel="layer")
    ax.tick_params(length=0, rotation=0)
    return ax


def dataset_sheet(rows: dict[str, Tensor]) -> Axes:
    """One row of images [n 3 h w] for each data set, with its name at the left."""
    sheet = make_grid(torch.cat(list(rows.values())), len(next(iter(rows.values()))), padding=2, pad_value=255)
    height, width = sheet.shape[1:]
    _, ax = plt.subplots(figsize=(9, 7.6 * height / width), layout="constrained")
    ax.imshow(sheet.permute(1, 2, 0))
    ax.set_xticks([])
    ax.set_yticks((torch.arange(len(rows)) + 0.5).numpy() * height / len(rows), rows)
    ax.tick_params(length=0)
    sns.despine(ax=ax, left=True, bottom=True)
    return ax


def captioned(images: Tensor, captions: list[str], columns: int) -> list[Axes]:
    """Images [n 3 h w], each with a caption of a few words under it."""
    down = -(-len(images) // columns)
    _, axes = plt.subplots(down, columns, figsize=(9, 9 * down / columns + 0.4 * down), layout="constrained")
    for ax, image, caption in zip(axes.flat, images, captions, strict=True):
        ax.imshow(image.permute(1, 2, 0))
        ax.set(xticks=[], yticks=[])
        ax.set_xlabel(textwrap.fill(caption, 18), fontsize=9)
        sns.despine(ax=ax, left=True, bottom=True)
    return list(axes.flat)


def training_curves(logs: dict[str, pd.DataFrame], losses: dict[str, str]) -> list[Axes]:
    """The loss of every zoo encoder against its steps, from its training log. losses: what each is called."""
    _, axes = plt.subplots(1, len(logs), figsize=(1.9 * len(logs) + 0.5, 2.3), squeeze=False, layout="constrained")
    for ax, (name, log) in zip(axes.flat, logs.items(), strict=True):
        ax.plot(log["step"], log["loss"], color="black")
        ax.set(xlabel="step", title=name, ylabel=losses[name])
        ax.set_ylim(bottom=0)
        ax.title.set_fontsize(10)
        ax.set_xticks([0, int(log["step"].max())])
        ax.grid(axis="y", color="#dddddd", lw=0.6)
    return list(axes.flat)


def accuracy_dots(table: pd.DataFrame, measures: dict[str, str]) -> list[Axes]:
    """Accuracies with two standard errors: tasks in rows, one panel for each model, a mark for each measure.

    table: columns model, task, chance, and for each key of `measures` the accuracy and key + "_se".
    measures: column -> its name in the legend.
    """
    models, tasks = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["task"]))
    figure, axes = plt.subplots(
        1, len(models), figsize=(9.5, 0.3 * len(tasks) + 1.2), sharey=True, squeeze=False, layout="constrained"
    )
    colours = sns.color_palette("colorblind")
    for ax, model in zip(axes.flat, models, strict=True):
        own = table[table["model"] == model].set_index("task").reindex(tasks)
        places = np.arange(len(tasks))
        ax.scatter(own["chance"], places, marker="|", color="black", s=70, label="chance")
        for index, (column, name) in enumerate(measures.items()):
            style = {
                "fmt": "osD^vP"[index],
                "color": colours[index],
                "ms": 5,
                "lw": 1.2,
                "mfc": ("none", None)[index % 2],
            }
            ax.errorbar(own[column], places, xerr=2 * own[f"{column}_se"], label=name, **style)
        ax.set(xlim=(-0.03, 1.03), title=model, xlabel="accuracy")
        ax.set_yticks(places, tasks)
        ax.grid(axis="both", color="#e5e5e5", lw=0.6)
        ax.set_axisbelow(True)
    axes.flat[0].invert_yaxis()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    return list(axes.flat)
