"""Images as they lie in files, decoded when an encoder asks for them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from residual.files import cache_folder, write_bytes
from residual.tensors import cache_key

if TYPE_CHECKING:
    import datasets

DECODING = 3  # raised when the same file would give other pixels
MISSING, BROKEN = "are missing", "cannot be decoded"


@dataclass(frozen=True, eq=False)
class Blobs:
    """The bytes of images, by row: files, parts of tars, or a column of a table.

    files: path, and first byte and length in it, of length -1 for whole files. table: of one column, not decoded, in
    place of files. names: of images, for messages. stamp: changes when the files do.
    """

    files: tuple[tuple[str, int, int], ...]
    names: tuple[str, ...]
    stamp: str
    table: datasets.Dataset | None = None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, row: int) -> bytes:
        """Raises FileNotFoundError for a missing file, and for no image in a row."""
        path, start, length = self.files[row] if self.table is None else ("", 0, -1)
        if self.table is not None:
            value = next(iter(self.table[row].values())) or {}
            if value.get("bytes") is not None:
                return value["bytes"]
            path = value.get("path") or ""
        if not path:
            raise FileNotFoundError(f"row {row} holds no image")
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(length)


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Rows of `Blobs`. Indexed by a tensor or a slice it gives the same of fewer; iterated, RGB images.

    checksums: of all blobs that were checked, by row. ground: what shows where images are transparent.
    """

    blobs: Blobs
    checksums: dict[int, str] = field(repr=False)
    rows: Int64[Tensor, "n"]
    ground: str = "white"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice) -> EncodedImages:
        return replace(self, rows=self.rows[index])

    def __iter__(self) -> Iterator[Image.Image]:
        return (decode(self.blobs.read(row), self.ground) for row in self.rows.tolist())

    def split(self, size: int) -> list[EncodedImages]:
        return [self[start : start + size] for start in range(0, len(self), size)]

    def fingerprint(self) -> str:
        """SHA-256 of the files' checksums, in order, and of how they are decoded."""
        files = "".join(self.checksums[row] for row in self.rows.tolist())
        return hashlib.sha256(f"{DECODING} {self.ground} {files}".encode()).hexdigest()


def checked(blobs: Blobs, rows: Int64[Tensor, "n"]) -> tuple[dict[int, str], dict[int, str]]:
    """Checksums of the images that can be decoded, and what is wrong with the others, by row.

    Computed once for files that do not change, and kept in the cache.
    """
    path = cache_folder() / "checks" / f"{cache_key(DECODING, blobs.stamp, rows)}.json"
    with suppress(OSError, ValueError):
        return tuple({int(row): text for row, text in part.items()} for part in json.loads(path.read_text()))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        found = dict(zip(rows.tolist(), pool.map(lambda row: _check(blobs, row), rows.tolist()), strict=True))
    sums = {row: text for row, text in found.items() if text not in (MISSING, BROKEN)}
    wrong = {row: text for row, text in found.items() if text in (MISSING, BROKEN)}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, json.dumps([sums, wrong]).encode())
    return sums, wrong


def _check(blobs: Blobs, row: int) -> str:
    """The checksum of an image, or what is wrong with it."""
    try:
        data = blobs.read(row)
    except OSError:
        return MISSING
    try:
        decode(data)
    except Exception:  # whatever a corrupt file makes a decoder raise
        return BROKEN
    return hashlib.sha256(data).hexdigest()


def thumbnails(images: Tensor | EncodedImages, side: int = 96) -> UInt8[Tensor, "n 3 h w"]:
    """Images as pages show them: encoded ones, which differ in size, as squares of `side` pixels."""
    if isinstance(images, Tensor):
        return images
    squares = (np.asarray(ImageOps.fit(image, (side, side))) for image in images)
    return torch.stack([torch.tensor(square).permute(2, 0, 1) for square in squares])


def decode(data: bytes, ground: str = "white") -> Image.Image:
    """An image file in RGB, as a person sees it. Raises whatever a corrupt file makes Pillow raise.

    The orientation in its EXIF data is applied where that can be read, and what is transparent shows the ground, a
    colour. CLIP's own loader does neither: it drops transparency, and a black drawing on a transparent ground is black.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # palettes, EXIF
        image = Image.open(io.BytesIO(data))
        image.load()
        with suppress(Exception):  # malformed EXIF or XMP: the pixels are whole
            image = ImageOps.exif_transpose(image)
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


def stamp_of(paths: list[Path]) -> str:
    """Changes when one of the files is changed, replaced or moved."""
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.exists()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()
