"""The head explorer: one static page for an encoder, with descriptions of every head and the images that excite it."""

from __future__ import annotations

import importlib.resources
import io
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from residual.data.dataset import Dataset, Images
from residual.data.images import thumbnails
from residual.files import write_bytes
from residual.heads import textspan_heads
from residual.store import StoredUnits
from residual.units import Unit

COMPONENTS = 3  # of every head
SHARES = 22  # components whose share is drawn
IMAGES = 6  # at each end of a component


def write_explorer(
    folder: Path,
    units: StoredUnits,
    dataset: Dataset,
    *,
    texts: Sequence[str] = (),
    encodings: Tensor | None = None,
    descriptions: int = 5,
) -> Path:
    """Write `folder/index.html` and its pictures; returns the page.

    dataset: from which `units` was extracted, with coordinates. texts, encodings: a dictionary and its
    encodings [t d], for encoders that read text; without them heads have pictures only.
    Raises ValueError where data set and units have different numbers of images, StoreError without coordinates.
    """
    if len(dataset) != units.manifest.count:
        raise ValueError(f"{len(dataset)} images, but units of {units.manifest.count}")
    folder.mkdir(parents=True, exist_ok=True)
    grid = list(product(*map(range, units.head_grid)))
    said: dict[tuple[int, int], list[str]] = {at: [] for at in grid}
    if encodings is not None:
        spans = textspan_heads(units, encodings, descriptions)
        said = {at: [texts[i] for i in spans.indices[at].tolist() if i >= 0] for at in grid}
    captions, ratios = dataset.captions(), units.head_pca().explained_variance_ratio
    heads = []
    for at in grid:
        label, scores = str(Unit("head", *at)), units.head_scores(*at)
        components = [
            _component(folder, f"{label}-{k}.jpg", scores[:, k], ratios[at][k], dataset.images, captions)
            for k in range(min(COMPONENTS, scores.shape[1]))
        ]
        heads.append(_card(label, said[at], ratios[at][:SHARES].tolist(), components))
    template = importlib.resources.files(__name__).joinpath("heads.html.jinja").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    about = f"{len(dataset):,} images of {dataset.name}/{dataset.split}."
    page = environment.from_string(template).render(model=units.manifest.encoder, about=about, heads=heads)
    write_bytes(folder / "index.html", page.encode())
    return folder / "index.html"


def _card(label: str, said: list[str], shares: list[float], components: list[dict[str, Any]]) -> dict[str, Any]:
    """A head as the template shows it, and the words by which it is found."""
    shown = " ".join([label, *said, *(c[end] for c in components for end in ("low", "high"))])
    words = " " + " ".join(re.findall(r"[\w.-]+", shown.lower()))
    return {"label": label, "descriptions": said, "shares": shares, "components": components, "words": words}


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
