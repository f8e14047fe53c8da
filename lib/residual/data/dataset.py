"""Labelled images by name: `load_dataset("shapes", split="train")`."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass, field

import torch
from jaxtyping import Int64, UInt8
from PIL.Image import Image
from torch import Tensor

from residual.data.images import EncodedImages, rank_in_class
from residual.data.names import SPLITS, split_task
from residual.sources import drawn_sets
from residual.tensors import tensor_bytes

Images = UInt8[Tensor, "n 3 h w"] | EncodedImages


@dataclass(frozen=True)
class Factor:
    """One property of drawn images: an index into `names`, or a measure where there are no names."""

    values: Tensor
    names: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, RGB, in memory or still encoded. labels index `classes`; each template has one `{}`.

    factors: what each image was drawn from, where that is known. excluded: names of images that could not be decoded.
    in_words: whether names of classes are as people say them, and not those of folders.
    """

    name: str
    split: str
    images: Images
    labels: Int64[Tensor, "n"]
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    factors: dict[str, Factor] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    in_words: bool = False

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels) or len(self.images) == 0:
            raise ValueError(f"{self.name}: {len(self.images)} images and {len(self.labels)} labels")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise ValueError(f"{self.name}: labels run from {low} to {high}, with {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, {self.split!r}: {len(self):,} images, {len(self.classes)} classes)"

    def head(self, count: int) -> Dataset:
        """The first `count` images (embedded sets are in random order)."""
        if not 0 < count <= len(self):
            raise ValueError(f"{self.name}/{self.split} has {len(self)} images; count={count} does not fit")
        return self._take(torch.arange(count))

    def balanced(self, count: int) -> Dataset:
        """`count` images, balanced over classes: the first of every class, then the second, and so on."""
        if not 0 < count <= len(self):
            raise ValueError(f"{self.name}/{self.split} has {len(self)} images; count={count} does not fit")
        return self._take(rank_in_class(self.labels).argsort(stable=True)[:count].sort().values)

    def _take(self, rows: Int64[Tensor, "m"]) -> Dataset:
        factors = {name: Factor(factor.values[rows], factor.names) for name, factor in self.factors.items()}
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows], factors=factors)

    def prompts(self) -> list[str]:
        """Every template of the first class, then of the second, and so on.

        Names of folders and files are said as words: "golden_retriever" is "golden retriever".
        """
        names = self.classes
        if not self.in_words:
            names = [name.replace("_", " ").replace("-", " ") for name in names]
        return [template.format(name) for name in names for template in self.templates]

    def captions(self) -> list[str]:
        """A description of each image, from its class: "a striped blue circle"."""
        return [self.templates[0].format(self.classes[label]) for label in self.labels.tolist()]

    def pil_images(self, count: int) -> list[Image]:
        """The first `count` images as `Encoder.preprocess` takes them."""
        from torchvision.transforms.functional import to_pil_image  # takes a second to import

        images = self.head(count).images
        return [to_pil_image(image) for image in images] if isinstance(images, Tensor) else list(images)

    def fingerprint(self) -> str:
        """SHA-256 of the images and labels."""
        if isinstance(self.images, Tensor):
            digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
            digest.update(tensor_bytes(self.images))
        else:
            digest = hashlib.sha256(self.images.fingerprint().encode())
        digest.update(tensor_bytes(self.labels))
        return digest.hexdigest()


def load_dataset(
    name: str | os.PathLike[str],
    split: str = "train",
    *,
    seed: int = 0,
    size: int | None = None,
    count: int | None = None,
    ground: str = "white",
) -> Dataset:
    """Load one split of a data set; the same seed gives the same images.

    name: one of `dataset_names()`, or of `task_names()`: "shapes" asks for all of "striped blue
    circle", "shapes-colour" for "blue" alone. Or a data set of the paper ("cifar10"), a hub id ("org/name", pinned
    by "@revision"), or a local folder in one of the layouts of `residual.data.layouts`.
    size: pixels a side of a set that is drawn, by default its own. count: how many images of it are drawn, by default
    and at most as many as the set has; another count gives other images. ground: the colour that shows where images of
    files are transparent, as Pillow names it.
    Raises ValueError for an unknown name or split, DataError where a set cannot be fetched or read.
    """
    name = os.fspath(name)
    base, factor = split_task(name)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    if source := drawn_sets().get(base):
        return source.load(base, factor, split, seed=seed, size=size, count=count)
    from residual.data.hub import read_split

    return read_split(base, split, seed=seed, ground=ground)
