"""Pictures of data, and the diagram of a block."""

from __future__ import annotations

import textwrap

import matplotlib.pyplot as plt
import seaborn as sns
import torch
from matplotlib.axes import Axes
from torch import Tensor
from torchvision.utils import make_grid


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
