"""The emoji of the reference set: each drawing at most once in each style as the main picture, on varied grounds.

Smaller ones, which may come again, stand behind half of them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from miniature.photographs import Tile, draw_tiles
from miniature.scenes import BACKDROPS, COLOURS, RESTYLES, draw_backdrops, draw_scenes
from miniature.textures import TEXTURES, draw_textures

GROUNDS = {"photograph": 0.15, "texture": 0.25, "drawn": 0.35, "white": 0.25}  # shares of the emoji's backgrounds
DRAWN = [index for index, name in enumerate(BACKDROPS) if name != "photograph"]  # whose crops might overlap
COMPANY = (0.2, 0.3)  # least sides of the two emoji that stand behind one, each on half of the grounds


def pick_drawings(
    sprites: UInt8[Tensor, "a 4 p p"], count: int, generator: torch.Generator
) -> tuple[Int64[Tensor, "count"], Int64[Tensor, "count"]]:
    """Indices of sprites, and of RESTYLES: no pair twice before every pair was used.

    Of sprites with the same outline, such as most flags, one is drawn as a silhouette.
    """
    outlines = {sprite[3].numpy().tobytes(): index for index, sprite in enumerate(sprites)}
    pairs = torch.tensor(
        [
            (index, style)
            for style, name in enumerate(RESTYLES)
            for index in (outlines.values() if name == "silhouette" else range(len(sprites)))
        ]
    )
    rounds = [torch.randperm(len(pairs), generator=generator) for _ in range(-(-count // len(pairs)))]
    index, style = pairs[torch.cat(rounds)[:count]].T
    return index, style


def pick_grounds(count: int, tiles: int, generator: torch.Generator) -> Int64[Tensor, "count"]:
    """Kinds of ground, indices into GROUNDS. Photographs no more often than there are tiles: others are white."""
    shares = torch.tensor(list(GROUNDS.values()))
    kinds = torch.multinomial(shares, count, replacement=True, generator=generator)
    of_photographs = (kinds == 0).nonzero().flatten()
    kinds[of_photographs[tiles:]] = list(GROUNDS).index("white")
    return kinds


def draw_emoji(
    sprites: UInt8[Tensor, "n 4 p p"],
    kinds: Int64[Tensor, "n"],
    tiles: list[Tile],
    generator: torch.Generator,
    size: int,
) -> UInt8[Tensor, "n 3 s s"]:
    """Scenes of sprites on grounds of some kinds, half of them with another sprite behind, and a quarter with two.

    tiles: of photographs, as many as there are grounds of that kind.
    """
    ground = _grounds(kinds, tiles, generator, size)
    for least in COMPANY:
        others = sprites[torch.randperm(len(sprites), generator=generator)]
        sizes = (least, least + 0.25)
        crowded = draw_scenes(others, generator=generator, onto=ground, sizes=sizes, size=size).images / 255
        with_company = torch.rand(len(sprites), 1, 1, 1, generator=generator) < 0.5
        ground = torch.where(with_company, crowded, ground)
    return draw_scenes(sprites, generator=generator, onto=ground, sizes=(0.4, 1.0), size=size).images


def _grounds(
    kinds: Int64[Tensor, "n"], tiles: list[Tile], generator: torch.Generator, size: int
) -> Float[Tensor, "n 3 s s"]:
    ground = torch.ones(len(kinds), 3, size, size)
    photograph, texture, drawn = ((kinds == index).nonzero().flatten() for index in range(3))
    ground[photograph] = draw_tiles(tiles, size) / 255
    pattern = torch.randint(len(TEXTURES), (len(texture),), generator=generator)
    ground[texture] = draw_textures(pattern, generator=generator, size=size) / 255
    kind = torch.tensor(DRAWN)[torch.randint(len(DRAWN), (len(drawn),), generator=generator)]
    colour = torch.randint(len(COLOURS), (len(drawn),), generator=generator)
    ground[drawn] = draw_backdrops(kind, colour, size, generator)
    return ground
