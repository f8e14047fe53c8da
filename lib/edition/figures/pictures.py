"""Pictures of data, and the diagram of a block."""

from __future__ import annotations

import textwrap

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from torch import Tensor


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
        ax.text(end - 0.2, 2.6, unit, ha="right", va="center", fontsize=12, parse_math=True)
    ax.text(9.2, 5.75, "block $l$, repeated $L$ times", ha="center", va="center", parse_math=True)
    return ax


def _box(ax: Axes, x: float, y: float, width: float, text: str, colour: str) -> None:
    ax.add_patch(plt.Rectangle((x, y), width, 1.2, fc=colour, ec="black"))
    ax.text(x + width / 2, y + 0.6, text, ha="center", va="center")


def idea(shares: pd.DataFrame, factor: str, methods: pd.DataFrame, names: dict[str, str]) -> list[Axes]:
    """Fig. 1: units are split into components and scaled; heads that carry a factor; what scaling achieves.

    shares: layers in rows, heads in columns, of the factor in each head's variance. methods: columns method, accuracy,
    params. names: method -> what it is called.
    """
    places = {"figsize": (5.6, 8), "height_ratios": (2, 3, 3), "layout": "constrained"}  # narrow, for phones
    figure, axes = plt.subplot_mosaic([["steps"], ["map"], ["gain"]], **places)
    _steps(axes["steps"])
    image = axes["map"].imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="none")
    axes["map"].set(title=f"heads that carry {factor}", xlabel="head", ylabel="layer")
    axes["map"].set_xticks(range(shares.shape[1]))
    figure.colorbar(image, ax=axes["map"], label="share of the head's variance")
    ax, known = axes["gain"], methods.set_index("method").loc[list(names)].sort_values("params")
    at_least = known["params"].clip(lower=10)
    for index, method in enumerate(known.index):
        at = at_least[method], known.loc[method, "accuracy"]
        ax.plot(*at, "osD^v"[index % 5], color=sns.color_palette("colorblind")[index], ms=8)
        up = index % 2 == 0  # names of neighbours on different sides
        options = {"va": "bottom" if up else "top", "ha": "center", "fontsize": 9}
        ax.annotate(names[method], at, xytext=(0, 8 if up else -8), textcoords="offset points", **options)
    ax.set(xscale="log", title="what scaling achieves", xlabel="trained parameters", ylabel="mean accuracy")
    ax.set(xlim=(1, 20 * at_least.max()), ylim=(0, 1.15))
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
    ax.set_xticks([10, 1e3, 1e5, 1e7], ["0", "thousand", "100,000", "10 million"])
    return list(axes.values())


def _steps(ax: Axes) -> None:
    """Four boxes, clockwise."""
    ax.set(xlim=(-0.1, 10.1), ylim=(0, 5))
    ax.axis("off")
    steps = {
        "residual stream:\na sum of units": (0, 2.9, "#eeeeee"),
        "each unit along its\nprincipal components": (5.6, 2.9, "#cfe3f3"),
        "times one trained\n$\\lambda$ each": (5.6, 0.1, "#f6dfc4"),
        "sum of scaled units,\ncloser to the words": (0, 0.1, "#d8ead2"),
    }
    for text, (left, low, shade) in steps.items():
        ax.add_patch(plt.Rectangle((left, low), 4.4, 1.9, fc=shade, ec="black"))
        ax.text(left + 2.2, low + 0.95, text, ha="center", va="center", fontsize=10, parse_math=True)
    for tip, tail in (((5.6, 3.85), (4.4, 3.85)), ((7.8, 2), (7.8, 2.9)), ((4.4, 1.05), (5.6, 1.05))):
        ax.annotate("", tip, tail, arrowprops={"arrowstyle": "-|>", "lw": 1.4})


def dataset_sheet(rows: dict[str, Tensor]) -> Axes:
    """One row of images [n 3 h w] for each data set, with its name at the left."""
    from torchvision.utils import make_grid  # takes a second to import

    sheet = make_grid(torch.cat(list(rows.values())), len(next(iter(rows.values()))), padding=2, pad_value=255)
    height, width = sheet.shape[1:]
    _, ax = plt.subplots(figsize=(9, 7.6 * height / width), layout="constrained")
    ax.imshow(sheet.permute(1, 2, 0), interpolation="none")
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
        ax.imshow(image.permute(1, 2, 0), interpolation="none")
        ax.set(xticks=[], yticks=[])
        ax.set_xlabel(textwrap.fill(caption, 18), fontsize=9)
        sns.despine(ax=ax, left=True, bottom=True)
    return list(axes.flat)
