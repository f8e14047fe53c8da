"""The head explorer: one static page for an encoder, with what every head says and what excites it."""

from __future__ import annotations

import importlib.resources
import io
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
import torch
from jaxtyping import UInt8
from PIL import ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from residual.data import Dataset, Images
from residual.pursuit import textspan_heads
from residual.store import StoredUnits, write_bytes
from residual.units import unit_labels

COMPONENTS = 3  # of every head
IMAGES = 6  # at each end of a component
SIDE = 96


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

    dataset: what `units` was extracted from, with coordinates. texts, encodings: a dictionary and its
    encodings [t d], for encoders that read words; without them heads have pictures only.
    Raises ValueError where data set and units have different numbers of images, StoreError without coordinates.
    """
    if len(dataset) != units.manifest.count:
        raise ValueError(f"{len(dataset)} images, but units of {units.manifest.count}")
    folder.mkdir(parents=True, exist_ok=True)
    shape = units.heads.mean.shape[:2]
    labels = [label for label in unit_labels(*shape) if ".H" in label]
    said = [[] for _ in labels]
    if encodings is not None:
        found = textspan_heads(units, encodings, descriptions, rank=units.frames.heads.shape[2] - 2)
        said = [[texts[i] for i in row if i >= 0] for row in found.indices.flatten(0, 1).tolist()]
    captions, ratios = dataset.captions(), units.head_pca().explained_variance_ratio
    heads = []
    for index, label in enumerate(labels):
        at = divmod(index, shape[1])
        shares, scores = ratios[at], units.head_scores(*at)[:, :COMPONENTS]
        components = []
        for k in range(scores.shape[1]):
            order = scores[:, k].argsort()
            low, high = order[:IMAGES], order[-IMAGES:].flip(0)
            sheet = make_grid(_small(dataset.images[torch.cat([low, high])]), IMAGES, padding=2, pad_value=255)
            name = f"{label}-{k}.jpg"
            picture = io.BytesIO()
            to_pil_image(sheet).save(picture, "JPEG", quality=85)
            write_bytes(folder / name, picture.getvalue())
            words = [", ".join(dict.fromkeys(captions[i] for i in ends.tolist())) for ends in (low, high)]
            components.append({
                "image": name, "width": sheet.shape[2], "height": sheet.shape[1], "share": f"{shares[k]:.0%}",
                "low": words[0], "high": words[1],
            })  # fmt: skip
        shown = " ".join([label, *said[index], *(c[end] for c in components for end in ("low", "high"))])
        heads.append({
            "label": label, "descriptions": said[index], "shares": shares[:22].tolist(), "components": components,
            "words": " " + " ".join(re.findall(r"[\w.-]+", shown.lower())),
        })  # fmt: skip
    template = importlib.resources.files(__name__).joinpath("heads.html.jinja").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    about = f"{len(dataset):,} images of {dataset.name}/{dataset.split}."
    page = environment.from_string(template).render(model=units.manifest.encoder, about=about, heads=heads)
    write_bytes(folder / "index.html", page.encode())
    return folder / "index.html"


def _small(images: Images) -> UInt8[Tensor, "n 3 h w"]:
    """Images as they are shown: those of files, which have sizes of their own, as squares of 96 pixels."""
    if isinstance(images, Tensor):
        return images
    return torch.stack([pil_to_tensor(ImageOps.fit(image, (SIDE, SIDE))) for image in images])
