"""Draws scenes: a sprite, placed, scaled and rotated at random on a random backdrop.

Everything is a batched tensor operation, so a training step draws its images in
a few milliseconds, and everything random comes from the caller's generator.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from sklearn.datasets import load_sample_images
from torch import Tensor

COLOURS = {
    "red": (220, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (245, 220, 60),
    "green": (50, 160, 70),
    "blue": (45, 95, 210),
    "purple": (130, 60, 170),
    "pink": (245, 150, 190),
    "brown": (125, 80, 45),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
    "grey": (135, 135, 135),
}
BACKDROPS = ("plain", "shaded", "cloudy", "striped", "spotted", "photograph")


@dataclass(frozen=True)
class Scene:
    """Images and the factors they were drawn from.

    backdrop: index into BACKDROPS. colour: index into COLOURS of its first colour.
    size: the sprite's side as a fraction of the image's.
    """

    images: UInt8[Tensor, "n 3 s s"]
    backdrop: Int[Tensor, "n"]
    colour: Int[Tensor, "n"]
    size: Float[Tensor, "n"]


def draw_scenes(
    sprites: UInt8[Tensor, "n 4 p p"],
    *,
    generator: torch.Generator,
    line: Tensor | None = None,
    size: int = 48,
) -> Scene:
    """Draw each sprite once, on its own backdrop.

    line: boolean [n], sprites that are bare lines and turn white on a dark backdrop.
    size: pixels a side of the images.
    """
    n = len(sprites)
    kind = torch.randint(len(BACKDROPS), (n,), generator=generator)
    colour = torch.randint(len(COLOURS), (n,), generator=generator)
    backdrop = _backdrops(kind, colour, size, generator)
    fraction = _uniform(n, 0.45, 1.0, generator)
    angle = _uniform(n, -0.4, 0.4, generator)
    shift = (torch.rand(n, 2, generator=generator) * 2 - 1) * (1 - 0.9 * fraction)[:, None]

    rgb, alpha = sprites[:, :3] / 255, sprites[:, 3:] / 255
    if line is not None:
        dark = backdrop.mean((1, 2, 3)) < 0.4
        rgb = torch.where((line & dark)[:, None, None, None], 1 - rgb, rgb)
    # Colours are multiplied by alpha before resampling (no dark fringes), at twice the size (no jaggies).
    layers = torch.cat([rgb * alpha, alpha], 1)
    cos, sin = angle.cos() / fraction, angle.sin() / fraction
    rotation = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], 1)
    affine = torch.cat([rotation, -rotation @ shift[:, :, None]], 2)
    grid = F.affine_grid(affine, [n, 4, 2 * size, 2 * size], align_corners=False)
    drawn = F.avg_pool2d(F.grid_sample(layers, grid, align_corners=False), 2)
    images = drawn[:, :3] + backdrop * (1 - drawn[:, 3:])
    return Scene((images.clamp(0, 1) * 255).round().to(torch.uint8), kind, colour, fraction)


def _uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator)


def _backdrops(kind: Tensor, colour: Tensor, size: int, generator: torch.Generator) -> Float[Tensor, "n 3 s s"]:
    n = len(kind)
    palette = torch.tensor(list(COLOURS.values())) / 255
    other = torch.randint(len(COLOURS), (n,), generator=generator)
    first, second = (
        (palette[c] + 0.06 * torch.randn(n, 3, generator=generator)).clamp(0, 1)[:, :, None, None]
        for c in (colour, other)
    )
    axis = torch.linspace(-1, 1, size)
    angle = _uniform(n, 0.0, math.pi, generator)[:, None, None]
    frequency = _uniform(n, 4.0, 16.0, generator)[:, None, None]
    along = angle.cos() * axis[None, None, :] + angle.sin() * axis[None, :, None]
    across = angle.cos() * axis[None, :, None] - angle.sin() * axis[None, None, :]
    waves, crossed = (frequency * along).sin(), (frequency * across).sin()
    mixes = torch.stack(
        [
            torch.zeros_like(along),
            (along + 1) / 2,
            (_clouds(n, size, generator) + 0.5),
            (4 * waves + 0.5),
            (4 * (waves * crossed - 0.3)),
        ]
    ).clamp(0, 1)
    mix = mixes[kind.clamp(max=4), torch.arange(n)][:, None]
    drawn = first * (1 - mix) + second * mix
    photos = _photo_crops(n, size, generator)
    return torch.where((kind == BACKDROPS.index("photograph"))[:, None, None, None], photos, drawn)


def _clouds(n: int, size: int, generator: torch.Generator) -> Tensor:
    field = torch.zeros(n, 1, size, size)
    for cells in (3, 6, 12, 24):
        noise = torch.randn(n, 1, cells, cells, generator=generator) / cells
        field += F.interpolate(noise, size, mode="bilinear", align_corners=False)
    return 1.5 * field[:, 0]


@functools.cache
def _photos() -> Float[Tensor, "2 3 h w"]:
    return torch.stack([torch.tensor(p) for p in load_sample_images().images]).permute(0, 3, 1, 2) / 255


def _photo_crops(n: int, size: int, generator: torch.Generator) -> Float[Tensor, "n 3 s s"]:
    photos = _photos()
    zoom = _uniform(n, 0.12, 0.6, generator)
    centre = (torch.rand(n, 2, generator=generator) * 2 - 1) * (1 - zoom)[:, None]
    flip = torch.randint(2, (n,), generator=generator) * 2 - 1
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1], affine[:, :, 2] = zoom * flip, zoom, centre
    which = torch.randint(len(photos), (n,), generator=generator)
    crops = torch.empty(n, 3, size, size)
    for index, photo in enumerate(photos):  # one photograph at a time: grid_sample wants a batch, expand is free
        rows = which == index
        grid = F.affine_grid(affine[rows], [int(rows.sum()), 3, size, size], align_corners=False)
        crops[rows] = F.grid_sample(photo.expand(len(grid), -1, -1, -1), grid, align_corners=False)
    return crops
