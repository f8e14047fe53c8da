"""Accuracy of encodings, whole or of some heads alone (section 4.1): zero-shot, and by nearest neighbours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from residual.data.dataset import Dataset
from residual.encoders.encoder import Encoder
from residual.extraction import pixels_for
from residual.store import StoredUnits

METHODS = ("U", "U|T", "S", "R")
READINGS = ("text", "code")  # where the paper's text and its authors' code differ

log = logging.getLogger(__name__)


@torch.no_grad()
def encode_images(encoder: Encoder, dataset: Dataset, *, batch: int = 256) -> Float[Tensor, "n d"]:
    """The model's output for every image of a data set, on the CPU."""
    parts = dataset.images.split(batch)
    return torch.cat([encoder.encode_image(pixels_for(encoder, part)).float().cpu() for part in parts])


@torch.no_grad()
def encode_texts(encoder: Encoder, texts: Sequence[str], *, batch: int = 256) -> Float[Tensor, "t d"]:
    """Normalised encodings of texts, on the CPU. Raises ValueError for an encoder without a text tower."""
    return F.normalize(encoder.encode_text(texts, batch=batch).cpu().float(), dim=1)


@torch.no_grad()
def class_encodings(encoder: Encoder, dataset: Dataset) -> Float[Tensor, "c d"]:
    """One direction for each class, on the CPU: the normalised mean over templates of normalised text encodings.

    Where names repeat, as two of ImageNet's do, classes have equal directions, and the first of them is always chosen.
    Raises ValueError for an encoder without a text tower, and a single class.
    """
    if len(dataset.classes) < 2:
        raise ValueError(f"{dataset.name} has one class, {dataset.classes[0]!r}; classification needs at least two")
    said = dataset.prompts()[:: len(dataset.templates)]
    if repeated := sorted({name for name, own in zip(dataset.classes, said, strict=True) if said.count(own) > 1}):
        later = torch.tensor([said.index(own) != label for label, own in enumerate(said)])
        log.warning(
            "%s: class names %s repeat, and their classes cannot be told apart; at most %.1f %% of the images can be "
            "right", dataset.name, repeated[:5], 100 * (1 - later[dataset.labels].double().mean()),
        )  # fmt: skip
    encodings = encode_texts(encoder, dataset.prompts()).unflatten(0, (-1, len(dataset.templates)))
    return F.normalize(encodings.mean(1), dim=1)


def class_means(
    outputs: Float[Tensor, "n d"], labels: Int64[Tensor, "n"], count: int | None = None
) -> Float[Tensor, "c d"]:
    """One direction for each class of an encoder that reads no text: the normalised mean of its images' encodings.

    count: of classes, by default the largest label and one. Source: the authors' code.
    Raises ValueError for a class without an image.
    """
    one_hot = F.one_hot(labels, -1 if count is None else count).to(outputs)
    if empty := (one_hot.sum(0) == 0).nonzero()[:, 0].tolist():
        raise ValueError(f"no image of classes {empty[:10]}; take more images")
    return F.normalize(one_hot.T @ F.normalize(outputs, dim=1), dim=1)


def score_units(
    units: StoredUnits,
    method: str,
    classes: Float[Tensor, "c d"] | None = None,
    *,
    labels: Int64[Tensor, "n"] | None = None,
    seed: int = 0,
    reading: str = "text",
) -> Float64[Tensor, "l h"]:
    """A score for every head, by which `select_top` chooses (section 4.1).

    method: "U" Pearson's correlation of head and output over the d dimensions, averaged over images; "U|T" the
    same after projecting both on the span of the class encodings; "S" the zero-shot accuracy of the
    head alone; "R" random scores from `seed`. The optimised weights, O, are trained: see `residual.alignment`.
    units: extracted with coordinates. classes: normalised, for "U|T" and "S". labels: for "S", in place of the units'.
    reading: "text", as above, or "code": U and U|T over the images, see `_scores_over_images`.
    Raises ValueError for an unknown method or reading, or without the classes it needs.
    """
    if reading not in READINGS:
        raise ValueError(f"reading must be one of {list(READINGS)}, not {reading!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, not {method!r}")
    shape = units.head_grid
    if method == "R":
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if method != "U" and classes is None:
        raise ValueError(f"method {method!r} needs class encodings")
    if reading == "code" and method != "S":
        return _scores_over_images(units, units.outputs() if method == "U" else classes)
    labels = units.class_labels() if labels is None else labels
    output, scores = units.outputs().double(), torch.empty(shape, dtype=torch.float64)
    if method == "U|T":
        span = _span(classes.double().cpu())
        output = output @ span.T @ span
    for layer, head in product(*map(range, shape)):
        samples = units.head_outputs(layer, head)
        if method == "S":
            scores[layer, head], _ = zero_shot_accuracy(samples, classes.to(samples), labels)
        else:
            scores[layer, head] = _pearson(samples @ span.T @ span if method == "U|T" else samples, output).mean()
    return scores


def _scores_over_images(units: StoredUnits, spanning: Float[Tensor, "m d"]) -> Float64[Tensor, "l h"]:
    """U and U|T of the authors' code: Pearson's correlation of a head with the sum of heads, over images.

    There is one along each axis of an orthonormal basis of the span of vectors, made by QR in their order; the score is
    their mean.
    """
    axes = torch.linalg.qr(spanning.double().cpu().T).Q
    heads = list(product(*map(range, units.head_grid)))
    total = sum(units.head_outputs(*head) @ axes for head in heads)
    scores = [_pearson((units.head_outputs(*head) @ axes).T, total.T).mean() for head in heads]
    return torch.stack(scores).view(units.head_grid)


def select_top(scores: Float[Tensor, "l h"], k: int) -> Bool[Tensor, "l h"]:
    """The k heads with the highest scores; among equals the first. Raises ValueError for a k that does not fit."""
    if not 1 <= k <= scores.numel():
        raise ValueError(f"k must be from 1 to {scores.numel()}, the number of heads, not {k}")
    if scores.isnan().any():
        raise ValueError("scores hold NaN")
    order = scores.flatten().argsort(descending=True, stable=True)
    return torch.zeros(scores.numel(), dtype=torch.bool).index_fill(0, order[:k].cpu(), True).view(scores.shape)


def ablate(units: StoredUnits, selected: Bool[Tensor, "l h"], means: StoredUnits | None = None) -> Float[Tensor, "n d"]:
    """The output of the selected heads alone (Eq. 5).

    means: every other unit, X0 and MLPs included, is replaced by its mean over these units' images; by
    default it is zero. Raises ValueError if `selected` does not match the heads.
    """
    shape = units.head_grid
    if tuple(selected.shape) != shape:
        raise ValueError(f"selected must have shape {list(shape)}, a value for each head, not {list(selected.shape)}")
    selected = selected.cpu()
    total = units.sum_of_heads(selected)
    if means is not None:
        heads = means.head_means()
        total += (heads * ~selected[..., None]).sum((0, 1)) + means.block_moments.mean.double().sum(0)
    return total.float()


def _pearson(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, "n"]:
    """Of each pair of rows; 0 where either is constant."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return F.cosine_similarity(a, b, dim=1)


def _span(vectors: Float[Tensor, "c d"]) -> Float[Tensor, "r d"]:
    """An orthonormal basis of what the vectors span."""
    _, values, basis = torch.linalg.svd(vectors, full_matrices=False)
    return basis[values > values[0] * max(vectors.shape) * torch.finfo(torch.float32).eps]


def zero_shot_hits(
    outputs: Float[Tensor, "n d"], classes: Float[Tensor, "c d"], labels: Int64[Tensor, "n"]
) -> Bool[Tensor, "n"]:
    """Whether the nearest class encoding by cosine is that of an image's class, for each image.

    Raises ValueError for a single class, no image, and labels out of range.
    """
    if len(outputs) != len(labels) or len(outputs) == 0:
        raise ValueError(f"{len(outputs)} outputs and {len(labels)} labels")
    if len(classes) < 2:
        raise ValueError(f"{len(classes)} class; classification needs at least two")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"labels run from {int(labels.min())} to {int(labels.max())}, with {len(classes)} classes")
    return (outputs.to(classes) @ classes.T).argmax(1) == labels.to(classes.device)


def zero_shot_accuracy(
    outputs: Float[Tensor, "n d"], classes: Float[Tensor, "c d"], labels: Int64[Tensor, "n"]
) -> tuple[float, float]:
    """Share of `zero_shot_hits`, and its standard error; errors as there."""
    return share_right(zero_shot_hits(outputs, classes, labels))


def share_right(hits: Bool[Tensor, "n"]) -> tuple[float, float]:
    """The share of images that are right, and its standard error."""
    share = hits.double().mean().item()
    return share, (share * (1 - share) / len(hits)) ** 0.5


def knn_accuracy(
    train: tuple[Float[Tensor, "n d"], Int64[Tensor, "n"]],
    test: tuple[Float[Tensor, "m d"], Int64[Tensor, "m"]],
    *,
    neighbours: int = 10,
) -> tuple[float, float]:
    """Share of test images classified correctly by their nearest training images, and its standard error.

    Neighbours are by cosine; each votes with weight 1 / distance.
    """
    from sklearn.neighbors import KNeighborsClassifier

    if len(train[0]) < neighbours:
        raise ValueError(f"{len(train[0])} training images, fewer than neighbours={neighbours}")
    model = KNeighborsClassifier(neighbours, weights="distance", metric="cosine")
    (seen, known), (outputs, labels) = ([value.cpu().numpy() for value in pair] for pair in (train, test))
    with warnings.catch_warnings():  # many classes of few images are expected
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        share = float(model.fit(seen, known).score(outputs, labels))
    return share, (share * (1 - share) / len(labels)) ** 0.5
