"""Images as they lie in files, decoded when an encoder asks for them."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image, ImageOps
from torch import Tensor

if TYPE_CHECKING:
    import datasets


DECODING = 2  # raised when the same file would give other pixels


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Images of a table. Indexed by a tensor or a slice it gives the same of fewer; iterated, RGB images."""

    table: datasets.Dataset  # one column, not decoded
    checksums: tuple[str, ...] = field(repr=False)  # of all rows of the table
    rows: Int64[Tensor, "n"]
    ground: str = "white"  # that shows where they are transparent

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice) -> EncodedImages:
        return replace(self, rows=self.rows[index])

    def __iter__(self) -> Iterator[Image.Image]:
        for row in self.rows.tolist():
            yield decode(encoded_bytes(next(iter(self.table[row].values()))), self.ground)

    def split(self, size: int) -> list[EncodedImages]:
        return [self[start : start + size] for start in range(0, len(self), size)]

    def fingerprint(self) -> str:
        """SHA-256 of the files' checksums, in order, and of how they are decoded."""
        files = "".join(self.checksums[row] for row in self.rows.tolist())
        return hashlib.sha256(f"{DECODING} {self.ground} {files}".encode()).hexdigest()


def thumbnails(images: Tensor | EncodedImages, side: int = 96) -> UInt8[Tensor, "n 3 h w"]:
    """Images as pages show them: encoded ones, which differ in size, as squares of `side` pixels."""
    if isinstance(images, Tensor):
        return images
    squares = (np.asarray(ImageOps.fit(image, (side, side))) for image in images)
    return torch.stack([torch.tensor(square).permute(2, 0, 1) for square in squares])


def encoded_bytes(value: dict) -> bytes:
    """The file of an image, from a column of `datasets` that is not decoded."""
    return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()


def decode(data: bytes, ground: str = "white") -> Image.Image:
    """An image file in RGB, as a person sees it. Raises whatever a corrupt file makes Pillow raise.

    The orientation in its EXIF data is applied, and what is transparent shows the ground, a colour. CLIP's own loader
    does neither: it drops transparency, and a black drawing on a transparent ground is all black.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # palettes, EXIF
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
            pixels = np.asarray(image).clip(0, 65535)
            wide = image.mode != "I" or pixels.max() > 255
            image = Image.fromarray((pixels >> 8 if wide else pixels).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
        return image.convert("RGB")


def rank_in_class(labels: Int64[Tensor, "n"]) -> Int64[Tensor, "n"]:
    """Each image's rank within its class, from 0."""
    ranks = torch.empty_like(labels)
    for label in labels.unique():
        ranks[labels == label] = torch.arange(int((labels == label).sum()))
    return ranks
