"""The paper's Figure 1 made real: coloured, patterned shapes, each with the factors it was drawn from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from miniature.scenes import COLOURS, RENDERED, to_bytes, uniform

SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring")
HUES = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
PATTERNS = ("solid", "striped", "dotted", "chequered")
BACKGROUNDS = ("black", "grey", "white")
SIZES = (0.55, 0.9)  # of a shape's radius, as a fraction of half the image
RIM = 0.82  # where the pattern ends and the rim in the shape's own colour begins
SAMPLES = 3  # a side, for each pixel


@dataclass(frozen=True)
class ShapeScene:
    """Images and the factors they were drawn from.

    shape, colour, pattern, background: indices into SHAPES, HUES, PATTERNS, BACKGROUNDS.
    size: radius as a fraction of half the image. angle: in radians. position: x and y of the
    centre, from -1 at the left and upper edge to 1.
    """

    images: UInt8[Tensor, "n 3 s s"]
    shape: Int[Tensor, "n"]
    colour: Int[Tensor, "n"]
    pattern: Int[Tensor, "n"]
    background: Int[Tensor, "n"]
    size: Float[Tensor, "n"]
    angle: Float[Tensor, "n"]
    position: Float[Tensor, "n 2"]


def draw_shapes(combination: Int[Tensor, "n"], *, generator: torch.Generator, size: int = 48) -> ShapeScene:
    """Draw one shape on each image.

    combination: what to draw, an index into `combination_names()`. Everything else is random.
    """
    n = len(combination)
    pattern = combination % len(PATTERNS)
    colour = combination // len(PATTERNS) % len(HUES)
    shape = combination // len(PATTERNS) // len(HUES)
    background = torch.randint(len(BACKGROUNDS), (n,), generator=generator)
    radius = uniform(n, *SIZES, generator)
    angle = 0.2 * (2 * torch.rand(n, generator=generator) - 1)
    position = (2 * torch.rand(n, 2, generator=generator) - 1) * (1 - radius)[:, None]

    facts = shape, colour, pattern, background, radius, angle, position
    images = [_render(size, *(fact[rows] for fact in facts)) for rows in torch.arange(n).split(RENDERED)]
    return ShapeScene(torch.cat(images), *facts)


def _render(
    size: int, shape: Tensor, colour: Tensor, pattern: Tensor, background: Tensor, radius: Tensor, angle: Tensor,
    position: Tensor,
) -> UInt8[Tensor, "n 3 s s"]:  # fmt: skip
    across, down = _from_centre(size * SAMPLES, angle, position)
    u, v = across / radius[:, None, None], down / radius[:, None, None]
    inside, core = _covered(shape, u, v), _covered(shape, u / RIM, v / RIM)
    white = core & inside & _is_white(pattern, across * 24, down * 24)  # a fineness of the image, not of its pixels
    palette = torch.tensor([COLOURS[name] for name in HUES]) / 255
    grounds = torch.tensor([COLOURS[name] for name in BACKGROUNDS]) / 255
    image = torch.where(inside[:, None], palette[colour][:, :, None, None], grounds[background][:, :, None, None])
    image = torch.where(white[:, None], 1.0, image)
    return to_bytes(F.avg_pool2d(image, SAMPLES))


def shape_masks(
    shape: Int[Tensor, "n"], radius: Float[Tensor, "n"], angle: Float[Tensor, "n"], position: Float[Tensor, "n 2"], *,
    size: int = 48,
) -> Float[Tensor, "n s s"]:  # fmt: skip
    """The part of each pixel that the shape covers, its pattern included: where `draw_shapes` draws it."""
    u, v = (distance / radius[:, None, None] for distance in _from_centre(size * SAMPLES, angle, position))
    inside = _covered(shape, u, v)
    return F.avg_pool2d(inside[:, None].float(), SAMPLES)[:, 0]


def _from_centre(size: int, angle: Tensor, position: Tensor) -> tuple[Float[Tensor, "n s s"], Float[Tensor, "n s s"]]:
    """How far points are from a shape's centre, across and down it, in halves of the image."""
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    x, y = axis[None, None, :] - position[:, 0, None, None], axis[None, :, None] - position[:, 1, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return cos * x + sin * y, cos * y - sin * x


def _covered(shape: Tensor, u: Tensor, v: Tensor) -> Bool[Tensor, "n s s"]:
    """Which points lie in each image's shape, as `_inside` takes them."""
    inside = torch.zeros(u.shape, dtype=torch.bool)
    for index, name in enumerate(SHAPES):
        rows = shape == index
        inside[rows] = _inside(name, u[rows], v[rows])
    return inside


def combination_names() -> tuple[str, ...]:
    """ "striped blue circle" and so on; the pattern changes fastest, the shape slowest."""
    return tuple(f"{pattern} {hue} {shape}" for shape in SHAPES for hue in HUES for pattern in PATTERNS)


def _inside(name: str, u: Tensor, v: Tensor) -> Tensor:
    """Which points lie in a shape of radius 1 around the origin, v pointing down."""
    r = (u**2 + v**2).sqrt()
    if name == "circle":
        return r < 0.95
    if name == "ring":
        return (r < 1) & (r > 0.5)
    if name == "square":
        return torch.maximum(u.abs(), v.abs()) < 0.8
    if name == "diamond":
        return u.abs() / 0.7 + v.abs() < 1
    if name == "cross":
        return (torch.minimum(u.abs(), v.abs()) < 0.3) & (torch.maximum(u.abs(), v.abs()) < 0.95)
    if name == "triangle":
        return torch.maximum(v, (3**0.5 * u.abs() - v) / 2) < 0.5
    if name == "star":
        # In one tenth of the star, between a tip and the notch beside it, the rim is a straight line.
        turn = 2 * math.pi / 5
        theta = ((torch.atan2(u, -v) + turn / 2) % turn - turn / 2).abs()
        notch = 0.45
        normal = torch.tensor([notch * math.sin(turn / 2), 1 - notch * math.cos(turn / 2)])
        return normal[0] * r * theta.cos() + normal[1] * r * theta.sin() < normal[0]
    x, y = 1.2 * u, -1.2 * v + 0.15
    return (x**2 + y**2 - 1) ** 3 - x**2 * y**3 < 0


def _is_white(pattern: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Where a pattern is white instead of coloured. across, down: from the shape's centre, in pixels."""
    white = torch.zeros(across.shape, dtype=torch.bool)  # as "solid" stays
    for index, name in enumerate(PATTERNS):
        rows = pattern == index
        x, y = across[rows], down[rows]
        if name == "striped":
            white[rows] = (x / 6 % 1) < 0.5
        elif name == "dotted":
            white[rows] = ((x / 7 % 1 - 0.5) ** 2 + (y / 7 % 1 - 0.5) ** 2).sqrt() < 0.3
        elif name == "chequered":
            white[rows] = ((x / 5).floor() + (y / 5).floor()) % 2 == 0
    return white
