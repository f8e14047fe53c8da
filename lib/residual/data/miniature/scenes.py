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
SIZES = (0.55, 1.0)  # of a sprite, as a fraction of the image's side
RESTYLES = ("colour", "grey", "line", "silhouette", "blocky", "negative")
BACKDROPS = ("plain", "shaded", "cloudy", "striped", "spotted", "photograph")


@dataclass(frozen=True)
class Scene:
    """Images and the factors they were drawn from.

    backdrop: index into BACKDROPS. colour: index into COLOURS of its first colour.
    size: the sprite's side as a fraction of the image's. angle: of its rotation, in radians.
    position: x and y of its centre, from -1 at the left and upper edge to 1.
    """

    images: UInt8[Tensor, "n 3 s s"]
    backdrop: Int[Tensor, "n"]
    colour: Int[Tensor, "n"]
    size: Float[Tensor, "n"]
    angle: Float[Tensor, "n"]
    position: Float[Tensor, "n 2"]


def draw_scenes(
    sprites: UInt8[Tensor, "n 4 p p"],
    *,
    generator: torch.Generator,
    line: Tensor | None = None,
    onto: Float[Tensor, "n 3 s s"] | None = None,
    sizes: tuple[float, float] = SIZES,
    size: int = 48,
) -> Scene:
    """Draw each sprite once, on its own backdrop.

    line: boolean [n], sprites that are bare lines and turn white on a dark backdrop.
    onto: images in [0, 1] to draw on, instead of random backdrops. sizes: least and greatest
    side of a sprite as a fraction of the image's. size: pixels a side of the images.
    """
    n = len(sprites)
    kind = torch.randint(len(BACKDROPS), (n,), generator=generator)
    colour = torch.randint(len(COLOURS), (n,), generator=generator)
    backdrop = backdrops(kind, colour, size, generator) if onto is None else onto
    fraction = uniform(n, *sizes, generator)
    angle = uniform(n, -0.3, 0.3, generator)
    shift = (torch.rand(n, 2, generator=generator) * 2 - 1) * (1 - 0.9 * fraction)[:, None]

    rgb, alpha = sprites[:, :3] / 255, sprites[:, 3:] / 255
    if line is not None:
        dark = backdrop.mean((1, 2, 3)) < 0.4
        rgb = torch.where((line & dark)[:, None, None, None], 1 - rgb, rgb)
    # Colours are multiplied by alpha before resampling, against dark fringes.
    layers = F.interpolate(torch.cat([rgb * alpha, alpha], 1), size, mode="bilinear", antialias=True)
    cos, sin = angle.cos() / fraction, angle.sin() / fraction
    rotation = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], 1)
    affine = torch.cat([rotation, -rotation @ shift[:, :, None]], 2)
    drawn = F.grid_sample(layers, F.affine_grid(affine, list(layers.shape), align_corners=False), align_corners=False)
    images = drawn[:, :3] + backdrop * (1 - drawn[:, 3:])
    return Scene(to_bytes(images), kind, colour, fraction, angle, shift)


def to_bytes(images: Float[Tensor, "*any"]) -> UInt8[Tensor, "*any"]:
    """Values in [0, 1] as bytes, rounded; others are clamped."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator)


def backdrops(
    kind: Int[Tensor, "n"], colour: Int[Tensor, "n"], size: int, generator: torch.Generator
) -> Float[Tensor, "n 3 s s"]:
    """Backdrops in [0, 1]. kind: indices into BACKDROPS. colour: into COLOURS, of their first colours."""
    n = len(kind)
    palette = torch.tensor(list(COLOURS.values())) / 255
    other = torch.randint(len(COLOURS), (n,), generator=generator)
    first, second = (
        (palette[c] + 0.06 * torch.randn(n, 3, generator=generator)).clamp(0, 1)[:, :, None, None]
        for c in (colour, other)
    )
    axis = torch.linspace(-1, 1, size)
    angle = uniform(n, 0.0, math.pi, generator)[:, None, None]
    frequency = uniform(n, 4.0, 16.0, generator)[:, None, None]
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
    from sklearn.datasets import load_sample_images

    return torch.stack([torch.tensor(p) for p in load_sample_images().images]).permute(0, 3, 1, 2) / 255


def _photo_crops(n: int, size: int, generator: torch.Generator) -> Float[Tensor, "n 3 s s"]:
    photos = _photos()
    zoom = uniform(n, 0.12, 0.6, generator)
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


def restyle(sprites: UInt8[Tensor, "n 4 p p"], style: str) -> UInt8[Tensor, "n 4 p p"]:
    """The same drawings in one of RESTYLES. A line drawing is black where the original has edges."""
    if style not in RESTYLES:
        raise ValueError(f"unknown style {style!r}; choose from {RESTYLES}")
    rgb, alpha = sprites[:, :3] / 255, sprites[:, 3:] / 255
    if style == "grey":
        rgb = _luminance(rgb).expand(-1, 3, -1, -1)
    elif style == "negative":
        rgb = 1 - rgb
    elif style == "silhouette":
        rgb = torch.zeros_like(rgb)
    elif style == "line":
        rgb, alpha = torch.zeros_like(rgb), _edges(torch.cat([rgb * alpha + 1 - alpha, alpha], 1))
    elif style == "blocky":
        side = sprites.shape[-1]
        layers = F.adaptive_avg_pool2d(torch.cat([rgb * alpha, alpha], 1), 12)
        layers = F.interpolate(layers, side, mode="nearest")
        alpha = layers[:, 3:]
        rgb = layers[:, :3] / alpha.clamp_min(1e-6)
    return to_bytes(torch.cat([rgb, alpha], 1))


def _luminance(rgb: Tensor) -> Tensor:
    return (rgb * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def _edges(channels: Float[Tensor, "n c p p"]) -> Float[Tensor, "n 1 p p"]:
    """Strength of the strongest edge among the channels, by Sobel's filter, as ink from 0 to 1."""
    p = F.pad(channels, (1, 1, 1, 1), mode="replicate")
    rows = p[:, :, :-2] + 2 * p[:, :, 1:-1] + p[:, :, 2:]
    columns = p[:, :, :, :-2] + 2 * p[:, :, :, 1:-1] + p[:, :, :, 2:]
    across, down = rows[:, :, :, 2:] - rows[:, :, :, :-2], columns[:, :, 2:] - columns[:, :, :-2]
    strength = torch.hypot(across, down).amax(1, keepdim=True) / 4
    return (2.5 * strength - 0.25).clamp(0, 1)
