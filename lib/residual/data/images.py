"""Images as they lie in files, decoded when an encoder asks for them."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Images of a table. Indexed by a tensor or a slice it gives the same of fewer; iterated, RGB images."""

    table: datasets.Dataset  # one column, not decoded
    checksums: tuple[str, ...] = field(repr=False)  # of all rows of the table
    rows: Int64[Tensor, "n"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice) -> EncodedImages:
        return EncodedImages(self.table, self.checksums, self.rows[index])

    def __iter__(self) -> Iterator[Image.Image]:
        for row in self.rows.tolist():
            yield decode(encoded_bytes(next(iter(self.table[row].values()))))

    def split(self, size: int) -> list[EncodedImages]:
        return [self[start : start + size] for start in range(0, len(self), size)]

    def fingerprint(self) -> str:
        """SHA-256 of the files' checksums, in order."""
        return hashlib.sha256("".join(self.checksums[row] for row in self.rows.tolist()).encode()).hexdigest()


def encoded_bytes(value: dict) -> bytes:
    """The file of an image, from a column of `datasets` that is not decoded."""
    return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()


def decode(data: bytes) -> Image.Image:
    """An image file in RGB. Raises whatever a corrupt file makes Pillow raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # palettes, EXIF
        image = Image.open(io.BytesIO(data))
        if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
            pixels = np.asarray(image).clip(0, 65535)
            wide = image.mode != "I" or pixels.max() > 255
            image = Image.fromarray((pixels >> 8 if wide else pixels).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        return image.convert("RGB")


def rank_in_class(labels: Int64[Tensor, "n"]) -> Int64[Tensor, "n"]:
    """Each image's rank within its class, from 0."""
    ranks = torch.empty_like(labels)
    for label in labels.unique():
        ranks[labels == label] = torch.arange(int((labels == label).sum()))
    return ranks
