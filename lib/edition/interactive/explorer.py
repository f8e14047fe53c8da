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
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from edition.interactive import write_page
from residual.data.dataset import Dataset, Images
from residual.data.images import thumbnails
from residual.dimension import pca_dimension
from residual.files import file_name, write_bytes
from residual.heads import textspan_heads
from residual.store import StoredUnits
from residual.units import Unit

COMPONENTS = 3  # of every head
SHARES = 22  # components whose share is drawn
IMAGES = 6  # at each end of a component
MEASURES = {  # of heads, by the tables of other chapters: file, chapter, column
    "N: nonlinear dimension": ("intrinsic_dimension_heads", "dimension", "twonn_id"),
    "Z: agreement of OMP with TextSpan": ("textspan_agreement", "semantics", "z"),
}


def explore(
    folder: Path,
    units: StoredUnits,
    dataset: Dataset,
    *,
    texts: Sequence[str] = (),
    encodings: Tensor | None = None,
    measures: Mapping[str, Tensor] | None = None,
    descriptions: int = 5,
) -> dict[str, Any]:
    """An encoder as the page shows it; its pictures are written to a folder of its own in `folder`.

    dataset: from which `units` was extracted, with coordinates. texts, encodings: a dictionary and its
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
        shares = [round(share, 4) for share in ratios[at][:SHARES].tolist()]
        heads.append({"label": label, "descriptions": said[at], "shares": shares, "components": components})
    linear = torch.tensor([float(pca_dimension(spectra.eigenvalues[at])) for at in grid]).reshape(units.head_grid)
    own = {"EVR1: share of the first component": ratios[..., 0], "L: linear dimension": linear}
    return {
        "name": units.manifest.encoder,
        "grid": units.head_grid,
        "about": f"{len(dataset):,} images of {dataset.name}/{dataset.split}",
        "measures": {name: _numbers(values) for name, values in (own | dict(measures or {})).items()},
        "heads": heads,
    }


def write_explorer(folder: Path, encoders: Sequence[dict[str, Any]]) -> Path:
    """Write `folder/index.html` with what `explore` returned for each encoder; returns the page.

    `folder/encoders.js` lists them for the book's pages, which link the heads that they name.
    """
    names = json.dumps([encoder["name"] for encoder in encoders])
    write_bytes(folder / "encoders.js", f"window.exploredEncoders = {names};\n".encode())
    return write_page(folder, "explorer.html.jinja", {"encoders": list(encoders)})


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


def _component(
    folder: Path, file: str, scores: Tensor, share: Tensor, images: Images, captions: list[str]
) -> dict[str, Any]:
    """The images at the two ends of a component, on one sheet, with the words of their captions."""
    order = scores.argsort()
    ends = order[:IMAGES], order[-IMAGES:].flip(0)
    sheet, picture = make_grid(thumbnails(images[torch.cat(ends)]), IMAGES, padding=2, pad_value=255), io.BytesIO()
    to_pil_image(sheet).save(picture, "JPEG", quality=85)
    write_bytes(folder / file, picture.getvalue())
    low, high = (", ".join(dict.fromkeys(captions[i] for i in end.tolist())) for end in ends)
    _, height, width = sheet.shape
    return {"image": file, "width": width, "height": height, "share": f"{share:.0%}", "low": low, "high": high}
