"""How well encodings tell classes apart: against texts that name them, and by their neighbours."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from residual.data import Dataset
from residual.encoders import Encoder
from residual.extraction import pixels_for


@torch.no_grad()
def encode_images(encoder: Encoder, dataset: Dataset, *, batch: int = 256) -> Float[Tensor, "n d"]:
    """The model's output for every image of a data set."""
    parts = dataset.images.split(batch)
    return torch.cat([encoder.encode_image(pixels_for(encoder, part)).float() for part in parts])


@torch.no_grad()
def encode_texts(encoder: Encoder, texts: Sequence[str], *, batch: int = 256) -> Float[Tensor, "t d"]:
    """Normalised encodings of texts. Raises ValueError for an encoder without a text tower."""
    parts = [encoder.encode_text(texts[start : start + batch]) for start in range(0, len(texts), batch)]
    return F.normalize(torch.cat(parts).float(), dim=1)


@torch.no_grad()
def class_encodings(encoder: Encoder, dataset: Dataset, *, batch: int = 256) -> Float[Tensor, "c d"]:
    """One direction for each class: the normalised mean over templates of normalised text encodings.

    Raises ValueError for an encoder without a text tower.
    """
    texts = [template.format(name) for name in dataset.classes for template in dataset.templates]
    encodings = encode_texts(encoder, texts, batch=batch).unflatten(0, (-1, len(dataset.templates)))
    return F.normalize(encodings.mean(1), dim=1)


def zero_shot_accuracy(
    outputs: Float[Tensor, "n d"], classes: Float[Tensor, "c d"], labels: Int64[Tensor, "n"]
) -> tuple[float, float]:
    """Share of images whose nearest class encoding by cosine is their own, and its standard error."""
    if len(outputs) != len(labels) or len(outputs) == 0:
        raise ValueError(f"{len(outputs)} outputs and {len(labels)} labels")
    hits = (outputs.to(classes) @ classes.T).argmax(1) == labels.to(classes.device)
    share = hits.double().mean().item()
    return share, (share * (1 - share) / len(labels)) ** 0.5


def knn_accuracy(
    train: tuple[Float[Tensor, "n d"], Int64[Tensor, "n"]],
    test: tuple[Float[Tensor, "m d"], Int64[Tensor, "m"]],
    *,
    neighbours: int = 10,
) -> tuple[float, float]:
    """Share of test images named by their nearest training images, and its standard error.

    Neighbours by cosine, each with a vote of 1 / distance.
    """
    if len(train[0]) < neighbours:
        raise ValueError(f"{len(train[0])} training images, fewer than neighbours={neighbours}")
    model = KNeighborsClassifier(neighbours, weights="distance", metric="cosine")
    (seen, known), (outputs, labels) = ([value.cpu().numpy() for value in pair] for pair in (train, test))
    with warnings.catch_warnings():  # many classes, few images each: that is meant
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        share = float(model.fit(seen, known).score(outputs, labels))
    return share, (share * (1 - share) / len(labels)) ** 0.5
