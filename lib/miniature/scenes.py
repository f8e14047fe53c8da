"""Draws scenes: a sprite, placed, scaled and rotated at random on a random backdrop.

Everything is a batched tensor operation, so a training step draws its images in
a few milliseconds, and everything random comes from the caller's generator.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

Drawn = TypeVar("Drawn")  # images with the factors they were drawn from
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
RENDERED = 64  # images at once, whose intermediate layers a CPU's cache holds
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


@dataclass(frozen=True)
class Draws:
    """All that is random about a batch of scenes, so that they can be rendered on any device.

    backdrop: None where scenes are drawn on images that are given.
    """

    backdrop: BackdropDraws | None
    kind: Int[Tensor, "n"]
    colour: Int[Tensor, "n"]
    size: Float[Tensor, "n"]
    angle: Float[Tensor, "n"]
    position: Float[Tensor, "n 2"]

    def to(self, device: torch.device | str) -> Draws:
        return self._each(lambda values: values.to(device))

    def rows(self, rows: Int[Tensor, "m"]) -> Draws:
        return self._each(lambda values: values[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Draws:
        changed = {f.name: change(getattr(self, f.name)) for f in fields(self) if f.name != "backdrop"}
        return Draws(self.backdrop and self.backdrop.each(change), **changed)


@dataclass(frozen=True)
class BackdropDraws:
    """All that is random about a batch of backdrops. noise: of clouds, on four grids. crop: of photographs."""

    kind: Int[Tensor, "n"]
    first: Float[Tensor, "n 3"]
    second: Float[Tensor, "n 3"]
    angle: Float[Tensor, "n"]
    frequency: Float[Tensor, "n"]
    noise: tuple[Float[Tensor, "n 1 _ _"], ...]
    photograph: Int[Tensor, "n"]
    crop: Float[Tensor, "n 2 3"]

    def each(self, change: Callable[[Tensor], Tensor]) -> BackdropDraws:
        """The same with every tensor changed."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        noise = tuple(map(change, values.pop("noise")))
        return BackdropDraws(noise=noise, **{name: change(value) for name, value in values.items()})


def draw_scenes(
    sprites: UInt8[Tensor, "n 4 p p"],
    *,
    generator: torch.Generator,
    onto: Float[Tensor, "n 3 s s"] | None = None,
    sizes: tuple[float, float] = SIZES,
    size: int = 48,
) -> Scene:
    """Draw each sprite once, on its own backdrop.

    onto: images in [0, 1] to draw on, instead of random backdrops. sizes: least and greatest
    side of a sprite as a fraction of the image's. size: pixels a side of the images.
    """
    draws = sample_scenes(len(sprites), generator, sizes, backdrops=onto is None)
    return joined(
        render_scenes(draws.rows(rows), sprites[rows], onto=None if onto is None else onto[rows], size=size)
        for rows in torch.arange(len(sprites)).split(RENDERED)
    )


def joined(parts: Iterable[Drawn]) -> Drawn:
    """Parts of a batch of drawn images, one after another."""
    parts = list(parts)
    return type(parts[0])(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(parts[0])))


def sample_scenes(
    n: int, generator: torch.Generator, sizes: tuple[float, float] = SIZES, *, backdrops: bool = True
) -> Draws:
    """The random numbers of `n` scenes."""
    kind = torch.randint(len(BACKDROPS), (n,), generator=generator)
    colour = torch.randint(len(COLOURS), (n,), generator=generator)
    backdrop = sample_backdrops(kind, colour, generator) if backdrops else None
    fraction = uniform(n, *sizes, generator)
    angle = uniform(n, -0.3, 0.3, generator)
    shift = (torch.rand(n, 2, generator=generator) * 2 - 1) * (1 - 0.9 * fraction)[:, None]
    return Draws(backdrop, kind, colour, fraction, angle, shift)


def render_scenes(
    draws: Draws,
    sprites: UInt8[Tensor, "n 4 p p"],
    *,
    line: Tensor | None = None,
    onto: Float[Tensor, "n 3 s s"] | None = None,
    size: int = 48,
) -> Scene:
    """The scenes of some draws, on the device of the sprites; see `draw_scenes`.

    line: boolean [n], sprites that are bare lines and turn white on a dark backdrop.
    """
    backdrop = render_backdrops(draws.backdrop, size) if onto is None else onto
    rgb, alpha = sprites[:, :3] / 255, sprites[:, 3:] / 255
    if line is not None:
        dark = backdrop.mean((1, 2, 3)) < 0.4
        rgb = torch.where((line & dark)[:, None, None, None], 1 - rgb, rgb)
    # Colours are multiplied by alpha before resampling, against dark fringes.
    layers = F.interpolate(torch.cat([rgb * alpha, alpha], 1), size, mode="bilinear", antialias=True)
    cos, sin = draws.angle.cos() / draws.size, draws.angle.sin() / draws.size
    rotation = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], 1)
    affine = torch.cat([rotation, -rotation @ draws.position[:, :, None]], 2)
    drawn = F.grid_sample(layers, F.affine_grid(affine, list(layers.shape), align_corners=False), align_corners=False)
    images = drawn[:, :3] + backdrop * (1 - drawn[:, 3:])
    return Scene(to_bytes(images), draws.kind, draws.colour, draws.size, draws.angle, draws.position)


def to_bytes(images: Float[Tensor, "*any"]) -> UInt8[Tensor, "*any"]:
    """Values in [0, 1] as bytes, rounded; others are clamped."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator)


def draw_backdrops(
    kind: Int[Tensor, "n"], colour: Int[Tensor, "n"], size: int, generator: torch.Generator
) -> Float[Tensor, "n 3 s s"]:
    """Backdrops in [0, 1]. kind: indices into BACKDROPS. colour: into COLOURS, of their first colours."""
    return render_backdrops(sample_backdrops(kind, colour, generator), size)


def sample_backdrops(kind: Int[Tensor, "n"], colour: Int[Tensor, "n"], generator: torch.Generator) -> BackdropDraws:
    """The random numbers of backdrops; see `draw_backdrops`."""
    n = len(kind)
    palette = torch.tensor(list(COLOURS.values())) / 255
    other = torch.randint(len(COLOURS), (n,), generator=generator)
    first, second = ((palette[c] + 0.06 * torch.randn(n, 3, generator=generator)).clamp(0, 1) for c in (colour, other))
    angle = uniform(n, 0.0, math.pi, generator)
    frequency = uniform(n, 4.0, 16.0, generator)
    noise = tuple(torch.randn(n, 1, cells, cells, generator=generator) / cells for cells in (3, 6, 12, 24))
    photograph, crop = _sample_crops(n, generator)
    return BackdropDraws(kind, first, second, angle, frequency, noise, photograph, crop)


def render_backdrops(draws: BackdropDraws, size: int) -> Float[Tensor, "n 3 s s"]:
    axis = torch.linspace(-1, 1, size, device=draws.kind.device)
    angle, frequency = draws.angle[:, None, None], draws.frequency[:, None, None]
    along = angle.cos() * axis[None, None, :] + angle.sin() * axis[None, :, None]
    across = angle.cos() * axis[None, :, None] - angle.sin() * axis[None, None, :]
    waves, crossed = (frequency * along).sin(), (frequency * across).sin()
    mixes = torch.stack(
        [
            torch.zeros_like(along),
            (along + 1) / 2,
            (_clouds(draws.noise, size) + 0.5),
            (4 * waves + 0.5),
            (4 * (waves * crossed - 0.3)),
        ]
    ).clamp(0, 1)
    rows = torch.arange(len(draws.kind), device=axis.device)
    mix = mixes[draws.kind.clamp(max=4), rows][:, None]
    drawn = draws.first[:, :, None, None] * (1 - mix) + draws.second[:, :, None, None] * mix
    of_photograph = (draws.kind == BACKDROPS.index("photograph"))[:, None, None, None]
    return torch.where(of_photograph, _render_crops(draws.photograph, draws.crop, size), drawn)


def _clouds(noise: tuple[Tensor, ...], size: int) -> Tensor:
    field = noise[0].new_zeros(len(noise[0]), 1, size, size)
    for grid in noise:
        field += F.interpolate(grid, size, mode="bilinear", align_corners=False)
    return 1.5 * field[:, 0]


@functools.cache
def _photos(device: torch.device) -> Float[Tensor, "2 3 h w"]:
    from sklearn.datasets import load_sample_images

    photos = torch.stack([torch.tensor(photo) for photo in load_sample_images().images])
    return (photos.permute(0, 3, 1, 2) / 255).to(device)


def _sample_crops(n: int, generator: torch.Generator) -> tuple[Int[Tensor, "n"], Float[Tensor, "n 2 3"]]:
    zoom = uniform(n, 0.12, 0.6, generator)
    centre = (torch.rand(n, 2, generator=generator) * 2 - 1) * (1 - zoom)[:, None]
    flip = torch.randint(2, (n,), generator=generator) * 2 - 1
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1], affine[:, :, 2] = zoom * flip, zoom, centre
    return torch.randint(2, (n,), generator=generator), affine


def _render_crops(which: Int[Tensor, "n"], affine: Float[Tensor, "n 2 3"], size: int) -> Float[Tensor, "n 3 s s"]:
    grid = F.affine_grid(affine, [len(which), 3, size, size], align_corners=False)
    # One photograph at a time: grid_sample wants a batch, and expand is free. Selecting rows would make a GPU wait.
    crops = [F.grid_sample(p.expand(len(grid), -1, -1, -1), grid, align_corners=False) for p in _photos(grid.device)]
    return torch.where((which == 0)[:, None, None, None], *crops)


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
