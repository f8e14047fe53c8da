"""Pieces of photographs that ship with scikit-image, scikit-learn and matplotlib.

A photograph is cut into cells, which are divided among the splits. The set `photographs` crops them at random; the
reference set has tiles, which do not overlap.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from miniature.scenes import to_bytes
from miniature.splits import divide, seed_of

PHOTOGRAPHS = {  # functions of skimage.data, of which all ship with the package
    "astronaut": "an astronaut",
    "brick": "a brick wall",
    "camera": "a man with a camera",
    "chelsea": "a cat",
    "coffee": "a cup of coffee",
    "coins": "ancient coins",
    "grass": "grass",
    "gravel": "gravel",
    "hubble_deep_field": "galaxies in the night sky",
    "immunohistochemistry": "stained tissue under a microscope",
    "moon": "the surface of the moon",
    "page": "a printed page",
    "retina": "the retina of an eye",
    "rocket": "a rocket on its launch pad",
    "stereo_motorcycle": "a motorcycle",
}
MORE = ("cell", "text", "china.jpg", "flower.jpg", "grace_hopper.jpg")  # in the reference set only
CELLS = 6  # a photograph is cut into CELLS x CELLS pieces, which are divided among the splits
SMALLEST = 24  # pixels a side of a tile
FLAT = 2  # standard deviation of all values of a tile, of 255, below which it is black, white or grey throughout


@dataclass(frozen=True)
class Tile:
    """A square of a photograph, in its pixels."""

    photograph: str
    top: int
    left: int
    side: int


@functools.cache
def photograph(name: str) -> Float[Tensor, "3 h w"]:
    """One of PHOTOGRAPHS or MORE, with values up to 255."""
    image = torch.tensor(_pixels(name))
    return (image[:, :, None].expand(-1, -1, 3) if image.ndim == 2 else image).permute(2, 0, 1).float()


def _pixels(name: str):
    if name == "grace_hopper.jpg":
        import matplotlib.cbook
        import matplotlib.image

        with matplotlib.cbook.get_sample_data(name) as file:
            return matplotlib.image.imread(file, format="jpg").copy()
    if name.endswith(".jpg"):
        from sklearn.datasets import load_sample_image

        return load_sample_image(name).copy()
    import skimage.data

    image = getattr(skimage.data, name)()
    return image[0] if isinstance(image, tuple) else image  # a stereo pair and its disparities


def photo_crops(
    which: Int64[Tensor, "n"], split: str, generator: torch.Generator, seed: int, size: int
) -> tuple[UInt8[Tensor, "n 3 s s"], Int64[Tensor, "n"]]:
    """Square crops, each inside one cell of this split, and which cell of which photograph."""
    images, cells = torch.empty(len(which), 3, size, size), torch.empty_like(which)
    zoom = 0.6 + 0.4 * torch.rand(len(which), generator=generator)
    place = torch.rand(len(which), 2, generator=generator)
    for index, name in enumerate(PHOTOGRAPHS):
        height, width = _cell(name)
        pool = torch.tensor(_own_cells(name, split, seed))
        for row in (which == index).nonzero().flatten().tolist():
            cell = int(pool[torch.randint(len(pool), (1,), generator=generator)])
            side = int(zoom[row] * min(height, width))
            top = cell // CELLS * height + int(place[row, 0] * (height - side))
            left = cell % CELLS * width + int(place[row, 1] * (width - side))
            images[row] = _resized(Tile(name, top, left, side), size)
            cells[row] = index * CELLS**2 + cell
    return to_bytes(images / 255), cells


def photo_tiles(split: str, seed: int) -> list[Tile]:
    """All tiles of a split: none overlaps another, none is black, white or grey throughout. Photographs take turns.

    Each cell is cut into k x k tiles, or more where it is not square, with k at random, so that they differ in scale.
    """
    generator = torch.Generator().manual_seed(seed_of(f"tiles/{split}/{seed}"))
    piles = []
    for name in (*PHOTOGRAPHS, *MORE):
        height, width = _cell(name)
        pile = []
        for cell in _own_cells(name, split, seed):
            most = max(1, min(height, width) // SMALLEST)
            side = min(height, width) // int(torch.randint(1, most + 1, (1,), generator=generator))
            top, left = cell // CELLS * height, cell % CELLS * width
            places = ((y, x) for y in range(0, height - side + 1, side) for x in range(0, width - side + 1, side))
            pile += [Tile(name, top + y, left + x, side) for y, x in places]
        order = torch.randperm(len(pile), generator=generator).tolist()
        piles.append([pile[i] for i in order if _content(pile[i]).std() >= FLAT])
    turns = range(max(map(len, piles)))
    return [pile[turn] for turn in turns for pile in piles if turn < len(pile)]


def draw_tiles(tiles: list[Tile], size: int) -> UInt8[Tensor, "n 3 s s"]:
    """Tiles as images of `size` pixels a side."""
    if not tiles:
        return torch.empty(0, 3, size, size, dtype=torch.uint8)
    return to_bytes(torch.stack([_resized(tile, size) for tile in tiles]) / 255)


def _cell(name: str) -> tuple[int, int]:
    """Height and width of a photograph's cells."""
    height, width = photograph(name).shape[1:]
    return height // CELLS, width // CELLS


def _own_cells(name: str, split: str, seed: int) -> list[int]:
    return divide(range(CELLS**2), split, f"{name}/{seed}")


def _content(tile: Tile) -> Float[Tensor, "3 s s"]:
    return photograph(tile.photograph)[:, tile.top : tile.top + tile.side, tile.left : tile.left + tile.side]


def _resized(tile: Tile, size: int) -> Float[Tensor, "3 s s"]:
    return F.interpolate(_content(tile)[None], size, mode="bilinear", antialias=True)[0]
