"""Crops of the photographs that ship with scikit-image."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from residual.data.miniature.scenes import to_bytes
from residual.data.miniature.splits import divide

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
CELLS = 6  # a photograph is cut into CELLS x CELLS pieces, which are divided among the splits


@functools.cache
def _photograph(name: str) -> Float[Tensor, "3 h w"]:
    import skimage.data

    image = getattr(skimage.data, name)()
    image = torch.tensor(image[0] if isinstance(image, tuple) else image)  # a stereo pair and its disparities
    return (image[:, :, None].expand(-1, -1, 3) if image.ndim == 2 else image).permute(2, 0, 1).float()


def photo_crops(
    which: Int64[Tensor, "n"], split: str, generator: torch.Generator, seed: int, size: int
) -> tuple[UInt8[Tensor, "n 3 s s"], Int64[Tensor, "n"]]:
    """Square crops, each inside one cell of this split, and which cell of which photograph."""
    images, cells = torch.empty(len(which), 3, size, size), torch.empty_like(which)
    zoom = 0.6 + 0.4 * torch.rand(len(which), generator=generator)
    place = torch.rand(len(which), 2, generator=generator)
    for index, name in enumerate(PHOTOGRAPHS):
        photograph = _photograph(name)
        height, width = (side // CELLS for side in photograph.shape[1:])
        pool = torch.tensor(divide(range(CELLS**2), split, f"{name}/{seed}"))
        for row in (which == index).nonzero().flatten().tolist():
            cell = int(pool[torch.randint(len(pool), (1,), generator=generator)])
            side = int(zoom[row] * min(height, width))
            top = cell // CELLS * height + int(place[row, 0] * (height - side))
            left = cell % CELLS * width + int(place[row, 1] * (width - side))
            crop = photograph[None, :, top : top + side, left : left + side]
            images[row] = F.interpolate(crop, size, mode="bilinear", antialias=True)[0]
            cells[row] = index * CELLS**2 + cell
    return to_bytes(images / 255), cells
