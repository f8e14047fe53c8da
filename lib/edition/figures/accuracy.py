"""Figures of accuracies, and of trainings."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from edition.figures.axes import plain_numbers


def by_share(table: pd.DataFrame, total: dict[str, int]) -> list[Axes]:
    """Mean accuracy over data sets against the share of heads kept, one panel for each model.

    table: columns model, strategy, ablation, heads, accuracy. total: heads of each model.
    """
    figure, axes = plt.subplots(
        1, len(total), figsize=(3.2 * len(total) + 0.5, 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, (model, heads) in zip(axes.flat, total.items(), strict=True):
        rows = table[(table["model"] == model) & (table["ablation"] != "mean")]
        means = rows.groupby(["strategy", "heads"])["accuracy"].mean()
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


def by_layer(table: pd.DataFrame) -> list[Axes]:
    """Mean accuracy over data sets of each layer alone, and of all units up to it, one panel for each model.

    table: columns model, group ("one layer", "up to a layer"), layer, accuracy.
    """
    models = list(dict.fromkeys(table["model"]))
    size = 3.2 * len(models) + 0.5, 3.0
    figure, axes = plt.subplots(1, len(models), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for ax, model in zip(axes.flat, models, strict=True):
        for index, group in enumerate(("up to a layer", "one layer")):
            rows = table[(table["model"] == model) & (table["group"] == group)]
            line = rows.groupby("layer")["accuracy"].mean()
            colour, style = sns.color_palette("colorblind")[index], ("-", "--")[index]
            ax.plot(line.index, line, style, color=colour, marker="os"[index], ms=4, label=group)
        ax.set(title=model, xlabel="layer", ylim=(0, 1))
    axes.flat[0].set_ylabel("accuracy")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
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
    colours, dashes = sns.color_palette("colorblind"), [":", "--", "-", "-.", (0, (4, 1, 1, 1)), (0, (1, 2))]
    for ax, model in zip(axes.flat, models, strict=True):
        values = table[table["model"] == model].pivot(index="dataset", columns="method", values="accuracy")
        for index, (method, name) in enumerate(methods.items()):
            if method not in set(table["method"]):
                continue
            rows = values[method].reindex(tasks).to_numpy() if method in values else np.full(len(tasks), np.nan)
            style = {"color": colours[index], "ls": dashes[index], "marker": "osD^vP"[index], "ms": 3.5, "label": name}
            ax.plot([*angles, angles[0]], [*rows, rows[0]], **style)
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
        for index, (model, rows) in enumerate(table.groupby("model", sort=False)):
            rows = rows.set_index("method").reindex([m for m in marks if m in set(rows["method"])])
            ax.plot(rows["params"], rows["accuracy"], color=colours[index], lw=1, label=model)
            for method, row in rows.iterrows():
                ax.plot(row["params"], row["accuracy"], marks[method], color=colours[index], ms=6)
        for method, mark in marks.items():
            ax.plot([], [], mark, color="grey", label=method)
        ax.set(xscale="log", title=title, xlabel="trainable parameters", ylabel="mean accuracy")
        plain_numbers(ax.xaxis)
        ax.grid(color="#e5e5e5", lw=0.6)
        ax.legend(fontsize=7)
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
        rows = table[table["model"] == model].set_index("task").reindex(tasks)
        places = np.arange(len(tasks))
        ax.scatter(rows["chance"], places, marker="|", color="black", s=70, label="chance")
        for index, (column, name) in enumerate(measures.items()):
            style = {
                "fmt": "osD^vP"[index],
                "color": colours[index],
                "ms": 5,
                "lw": 1.2,
                "mfc": ("none", None)[index % 2],
            }
            ax.errorbar(rows[column], places, xerr=2 * rows[f"{column}_se"], label=name, **style)
        ax.set(xlim=(-0.03, 1.03), title=model, xlabel="accuracy")
        ax.set_yticks(places, tasks)
        ax.grid(axis="both", color="#e5e5e5", lw=0.6)
        ax.set_axisbelow(True)
    axes.flat[0].invert_yaxis()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
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
