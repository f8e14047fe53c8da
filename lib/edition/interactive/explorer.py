"""The head explorer: one static page with every head of some encoders, its descriptions and images that excite it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from edition.interactive import write_page, write_script
from residual.data.dataset import Dataset, Images
from residual.data.images import thumbnails
from residual.dimension import pca_dimension
from residual.encoders.encoder import Encoder
from residual.extraction import pixels_for, read_pictures
from residual.files import file_name, write_bytes
from residual.heads import textspan_heads
from residual.spectrum import PCA
from residual.store import StoredUnits
from residual.units import Unit, head_tokens

COMPONENTS = 3  # of every head
SHARES = 22  # components whose share is drawn
IMAGES = 6  # at each end of a component
ORANGE, PURPLE = (230.0, 97.0, 1.0), (94.0, 60.0, 153.0)  # for more and less
MEASURES = {  # of heads, by the tables of other chapters: file, chapter, column
    "N: nonlinear dimension": ("intrinsic_dimension_heads", "dimension", "twonn_id"),
    "Z: agreement of OMP with TextSpan": ("textspan_agreement", "semantics", "z"),
}


def explore(
    folder: Path,
    units: StoredUnits,
    dataset: Dataset,
    encoder: Encoder,
    *,
    texts: Sequence[str] = (),
    encodings: Tensor | None = None,
    measures: Mapping[str, Tensor] | None = None,
    descriptions: int = 5,
) -> dict[str, Any]:
    """An encoder as the page shows it; its pictures are written to a folder of its own in `folder`.

    dataset, encoder: from which `units` was extracted, with coordinates. texts, encodings: a dictionary and its
    encodings [t d], for encoders that read text; without them heads have pictures only. measures: values of every
    head [l h] by name, beside EVR1 and L; NaN where there is none.
    Raises ValueError where data set and units have different numbers of images, StoreError without coordinates.
    """
    if len(dataset) != units.manifest.count:
        raise ValueError(f"{len(dataset)} images, but units of {units.manifest.count}")
    place = file_name(units.manifest.encoder)
    (folder / place).mkdir(parents=True, exist_ok=True)
    grid = list(product(*map(range, units.head_grid)))
    said: dict[tuple[int, int], list[str]] = {at: [] for at in grid}
    if encodings is not None:
        spans = textspan_heads(units, encodings, descriptions)
        said = {at: [texts[i] for i in spans.indices[at].tolist() if i >= 0] for at in grid}
    captions, spectra = dataset.captions(), units.head_pca()
    ratios, heads = spectra.explained_variance_ratio, []
    for at in grid:
        label, scores = str(Unit("head", *at)), units.head_scores(*at)
        components = [
            _component(folder, f"{place}/{label}-{k}.jpg", scores[:, k], ratios[at][k], dataset.images, captions)
            for k in range(min(COMPONENTS, scores.shape[1]))
        ]
        components[0]["map"] = f"{place}/{label}-map.jpg"
        images = dataset.images[ends := _ends(scores[:, 0])]
        parts = head_map(encoder, spectra, at, images, scores[ends, 0])
        _write_sheet(folder / components[0]["map"], heated(thumbnails(read_pictures(encoder, images)), parts))
        shares = [round(share, 4) for share in ratios[at][:SHARES].tolist()]
        heads.append({"label": label, "descriptions": said[at], "shares": shares, "components": components})
    linear = torch.tensor([float(pca_dimension(spectra.eigenvalues[at])) for at in grid]).reshape(units.head_grid)
    own = {"EVR1: share of the first component": ratios[..., 0], "L: linear dimension": linear}
    return {
        "name": units.manifest.encoder,
        "place": place,
        "grid": units.head_grid,
        "about": f"{len(dataset):,} images of {dataset.name}/{dataset.split}",
        "measures": {name: _numbers(values) for name, values in (own | dict(measures or {})).items()},
        "heads": heads,
    }


def write_explorer(folder: Path, encoders: Sequence[dict[str, Any]]) -> Path:
    """Write `folder/index.html`, and what `explore` returned in a script for each encoder; returns the page.

    `folder/encoders.js` lists them, also for the book's pages, which link the heads that they name.
    """
    for encoder in encoders:
        write_script(folder / encoder["place"] / "heads.js", f"explored[{json.dumps(encoder['name'])}]", encoder)
    names = {encoder["name"]: f"{encoder['place']}/heads.js" for encoder in encoders}
    write_script(folder / "encoders.js", "window.exploredEncoders", names)
    return write_page(folder, "explorer.html.jinja")


def head_map(
    encoder: Encoder, spectra: PCA, at: tuple[int, int], images: Images, scores: Float[Tensor, "n"]
) -> Float64[Tensor, "n r c"]:
    """What each patch of some images adds to their scores along a head's first component, in rows and columns.

    spectra: of all heads. scores: of the images, which have the component's sign.
    """
    pixels = pixels_for(encoder, images)
    tokens = head_tokens(encoder, pixels, *at).cpu().double()
    parts = (tokens - spectra.mean[at] / tokens.shape[1]) @ spectra.components[at][0]
    parts = parts * (parts.sum(1) @ scores.double()).sign()
    rows, columns = encoder.patch_grid(pixels)
    return parts[:, -rows * columns :].unflatten(1, (rows, columns))


def heated(images: UInt8[Tensor, "n 3 h w"], maps: Float[Tensor, "n r c"]) -> UInt8[Tensor, "n 3 h w"]:
    """Images in grey under their maps: orange where these are positive, purple where they are negative."""
    grey = images.float().mean(1, keepdim=True)
    strength = interpolate((maps / maps.abs().max().clamp(min=1e-12)).float()[:, None], images.shape[2:])
    colours = torch.where(strength > 0, *(torch.tensor(c).view(1, 3, 1, 1) for c in (ORANGE, PURPLE)))
    return (grey + (colours - grey) * strength.abs() ** 0.5).round().to(torch.uint8)


def measured_heads(table: pd.DataFrame, column: str, encoder: str, grid: tuple[int, int]) -> Tensor:
    """A column of another chapter's table of heads, as [l h]; NaN where it has no row for a head."""
    values = torch.full(grid, float("nan"))
    rows = table[table["model"] == encoder].drop_duplicates(["layer", "head"])
    for layer, head, value in zip(rows["layer"], rows["head"], rows[column], strict=True):
        values[int(layer), int(head)] = value
    return values


def _numbers(values: Tensor) -> list[float | None]:
    """As JSON has them: None for NaN."""
    return [None if value != value else round(value, 4) for value in values.flatten().tolist()]


def _ends(scores: Tensor) -> Tensor:
    """The images with the lowest scores, and those with the highest."""
    order = scores.argsort()
    return torch.cat([order[:IMAGES], order[-IMAGES:].flip(0)])


def _write_sheet(path: Path, images: Tensor) -> tuple[int, int]:
    """Write two rows of pictures as one; returns its width and height."""
    sheet, picture = make_grid(images, IMAGES, padding=2, pad_value=255), io.BytesIO()
    to_pil_image(sheet).save(picture, "JPEG", quality=85)
    write_bytes(path, picture.getvalue())
    return sheet.shape[2], sheet.shape[1]


def _component(
    folder: Path, file: str, scores: Tensor, share: Tensor, images: Images, captions: list[str]
) -> dict[str, Any]:
    """The images at the two ends of a component, on one sheet, with the words of their captions."""
    ends = _ends(scores)
    width, height = _write_sheet(folder / file, thumbnails(images[ends]))
    low, high = (", ".join(dict.fromkeys(captions[i] for i in end.tolist())) for end in ends.split(len(ends) // 2))
    return {"image": file, "width": width, "height": height, "share": f"{share:.0%}", "low": low, "high": high}
