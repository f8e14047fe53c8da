"""Textures drawn from formulas: two colours, mixed by a pattern of random scale, angle and phase."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from miniature.scenes import to_bytes

TEXTURES = (
    "striped", "chequered", "dotted", "wavy", "zigzagged", "gridded",
    "ringed", "spiralled", "bricked", "marbled", "grainy", "cracked",
)  # fmt: skip
SAMPLES = 2  # a side, for each pixel
SMALLEST = 0.35  # distance of the two colours, in units of a channel's range


def draw_textures(kind: Int[Tensor, "n"], *, generator: torch.Generator, size: int = 48) -> UInt8[Tensor, "n 3 s s"]:
    """kind: indices into TEXTURES. Colours, scale, angle and phase are random."""
    n, side = len(kind), size * SAMPLES
    first, second = _colours(n, generator)
    angle = math.pi * torch.rand(n, 1, 1, generator=generator)
    period = 0.25 + 0.35 * torch.rand(n, 1, 1, generator=generator)  # in halves of the image
    phase = torch.rand(n, 2, 1, 1, generator=generator)
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    x, y = axis[None, None, :], axis[None, :, None]
    u = (angle.cos() * x + angle.sin() * y) / period + phase[:, 0]
    v = (angle.cos() * y - angle.sin() * x) / period + phase[:, 1]
    mix = torch.empty(n, side, side)
    for index, name in enumerate(TEXTURES):
        rows = kind == index
        if rows.any():
            mix[rows] = _pattern(name, u[rows], v[rows], generator).float()
    mix = F.avg_pool2d(mix[:, None], SAMPLES)
    return to_bytes(first * (1 - mix) + second * mix)


def _colours(n: int, generator: torch.Generator) -> tuple[Float[Tensor, "n 3 1 1"], Float[Tensor, "n 3 1 1"]]:
    """Pairs of random colours that differ clearly."""
    first, second = torch.rand(2, n, 3, generator=generator)
    while (close := (first - second).norm(dim=1) < SMALLEST).any():
        second[close] = torch.rand(int(close.sum()), 3, generator=generator)
    return first[:, :, None, None], second[:, :, None, None]


def _pattern(name: str, u: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
    """Share of the second colour. u, v: rotated coordinates of every point, in periods of the pattern."""
    n, side, _ = u.shape
    if name == "striped":
        return u % 1 < 0.5
    if name == "chequered":
        return (u.floor() + v.floor()) % 2 == 0
    if name == "dotted":
        return (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.1
    if name == "wavy":
        return (v + 0.25 * (2 * math.pi * u / 1.5).sin()) % 1 < 0.5
    if name == "zigzagged":
        return (v + 0.8 * (u % 1 - 0.5).abs()) % 1 < 0.5
    if name == "gridded":
        return torch.minimum(u % 1, v % 1) < 0.16
    if name == "bricked":
        return torch.minimum((u + 0.5 * (2 * v).floor()) % 1, 2 * v % 1 / 2) < 0.1
    centre = torch.rand(n, 2, 1, 1, generator=generator) - 0.5
    r = ((u - centre[:, 0]) ** 2 + (v - centre[:, 1]) ** 2).sqrt()
    if name == "ringed":
        return 1.2 * r % 1 < 0.5
    if name == "spiralled":
        return (1.2 * r + torch.atan2(v - centre[:, 1], u - centre[:, 0]) / (2 * math.pi)) % 1 < 0.5
    if name == "grainy":
        return F.interpolate(torch.rand(n, 1, side // 2, side // 2, generator=generator), side)[:, 0]
    if name == "marbled":
        field = F.interpolate(torch.randn(n, 1, 6, 6, generator=generator), side, mode="bicubic", align_corners=False)
        return 0.5 + 0.5 * (2 * math.pi * (u / 2 + 0.6 * field[:, 0])).sin()
    cells = 4 * torch.rand(n, 40, 2, generator=generator) * 2 - 4  # "cracked": lines between the cells of seeds
    points = torch.stack([u - u.mean((1, 2), keepdim=True), v - v.mean((1, 2), keepdim=True)], -1).flatten(1, 2)
    near = torch.cdist(points, cells).topk(2, largest=False).values
    return (near[..., 1] - near[..., 0] < 0.12).reshape(n, side, side)
