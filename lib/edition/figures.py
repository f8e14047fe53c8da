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
# One colour and mark for each method, and one colour for each encoder, in all figures.
METHODS = ("RD", "Lin", "RD*", "RD_Y", "B", "FT", "Lin, tuned", "U", "U|T", "S")
ENCODERS = (
    *("dinov2-s-saliency", "mini-openclip", "mini-clip", "mini-blip", "mini-dinov2", "mini-vit", "dinov2-minilm"),
    *("OpenCLIP-L", "CLIP-L", "BLIP-L", "OpenCLIP-B", "CLIP-B", "BLIP-B", "DINOv2-L", "ViT-L"),
)


def set_style() -> None:
    """Figures that are the same from every run, and whose text can be read and searched."""
    set_matplotlib_formats("svg", metadata={"Date": None})
    plt.rcParams["text.parse_math"] = False  # a dollar in the name of a folder or a class is a dollar
    fonts = {"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Verdana"]}  # text stays text
    plt.rcParams.update({"svg.hashsalt": "residual"} | fonts)


def style(name: str, otherwise: int = 0) -> dict[str, Any]:
    """Colour, mark and dash of a method or an encoder, of a control as its encoder's but dotted.

    otherwise: which of them a name has that is neither.
    """
    base = name.removesuffix("@random")
    known = METHODS if base in METHODS else ENCODERS
    at = known.index(base) if base in known else otherwise
    dash = ":" if name != base else DASHES[at % len(DASHES)]
    return {"color": COLOURS[at % len(COLOURS)], "marker": MARKS[at % len(MARKS)], "ls": dash, "label": name}


def panels(count: int, height: float, width: float = 3.2, across: int = 3, **options: Any) -> tuple[Figure, list[Axes]]:
    """Axes side by side, at most `across` of them in a row. height, width: inches of each."""
    across = min(count, across)
    down = -(-count // across)
    options = {"figsize": (width * across + 0.5, height * down), "squeeze": False, "layout": "constrained"} | options
    figure, axes = plt.subplots(down, across, **options)
    for ax in axes.flat[count:]:
        ax.remove()
    return figure, list(axes.flat[:count])


def legend(figure: Figure, columns: int = 4, where: str = "outside lower center") -> None:
    """One legend for all panels, with each name once. where: as Matplotlib names places."""
    pairs = [pair for ax in figure.axes for pair in zip(*ax.get_legend_handles_labels()[::-1], strict=True)]
    named = dict(reversed(pairs))
    order = dict.fromkeys(name for name, _ in pairs)
    figure.legend([named[name] for name in order], order, loc=where, ncols=columns, frameon=False)


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
            ax.plot(rows[x], rows[y], ms=4, **style(value, index))
        ax.set(**{"title": name, "xlabel": x} | axes)
        ax.set_ylabel(y if ax.get_subplotspec().is_first_col() else "")
    legend(figure)
    return drawn


def head_rows(
    table: pd.DataFrame, row: str, value: str, label: str, *, unit: str = "heads",
    cmap: str = "Blues", limits: tuple[float, float] = (0, 1),
) -> list[Axes]:  # fmt: skip
    """Values in rows, with all heads in columns by layer, one panel for each model.

    table: columns model, layer, head (infinite for an MLP, which comes last), `row` and `value`.
    """
    grids = {}
    for model, part in table.groupby("model", sort=False):
        grid = part.pivot(index=row, columns=["layer", "head"], values=value)
        grids[model] = grid.sort_index(axis=1).loc[part[row].unique()]
    size = 9.5, sum(0.2 * len(grid) + 0.7 for grid in grids.values())
    figure, axes = plt.subplots(len(grids), 1, figsize=size, squeeze=False, layout="constrained")
    for ax, (model, grid) in zip(axes.flat, grids.items(), strict=True):
        image = ax.imshow(grid, aspect="auto", cmap=cmap, vmin=limits[0], vmax=limits[1], interpolation="nearest")
        layers = grid.columns.get_level_values("layer")
        for edge in np.flatnonzero(np.diff(layers)):
            ax.axvline(edge + 0.5, color="grey", lw=1)
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
        options = {"annot": annotate, "fmt": ".2f", "cmap": "Blues", "vmin": 0, "vmax": 1}
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
