"""The data sets that need no network: drawn from Twemoji, or shipped with scikit-learn."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int64, UInt8
from PIL.Image import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from residual.artwork import load_artwork, vocabulary
from residual.render import draw_scenes

SPLITS = ("train", "validation", "test")
SIZE = 48  # pixels a side
COUNTS = {"train": 10_000, "validation": 2_000, "test": 2_000}  # drawn images in a split
GROUPS = {
    "emoji": None,
    "emoji-animals": "Animals & Nature",
    "emoji-food": "Food & Drink",
    "emoji-activities": "Activities",
    "emoji-flags": "Flags",
}
TEMPLATES = ("{}", "a picture of {}", "a photo of {}", "an emoji of {}", "an image of {}", "an icon of {}")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images in memory, RGB. labels index `classes`; templates have one `{}` each."""

    name: str
    split: str
    images: UInt8[Tensor, "n 3 h w"]
    labels: Int64[Tensor, "n"]
    classes: tuple[str, ...]
    templates: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels) or len(self.images) == 0:
            raise ValueError(f"{self.name}: {len(self.images)} images and {len(self.labels)} labels")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise ValueError(f"{self.name}: labels run from {low} to {high}, with {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self.images)

    def head(self, count: int) -> Dataset:
        """The first `count` images (drawn sets are in random order)."""
        if not 0 < count <= len(self):
            raise ValueError(f"{self.name}/{self.split} has {len(self)} images; count={count} does not fit")
        return Dataset(self.name, self.split, self.images[:count], self.labels[:count], self.classes, self.templates)

    def pil_images(self, count: int) -> list[Image]:
        """The first `count` images as `Encoder.preprocess` takes them."""
        return [to_pil_image(image) for image in self.head(count).images]

    def fingerprint(self) -> str:
        """SHA-256 of the images and labels."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        for value in (self.images, self.labels):
            digest.update(value.contiguous().numpy().data)
        return digest.hexdigest()


def dataset_names() -> tuple[str, ...]:
    return (*GROUPS, "digits")


def load_dataset(name: str, split: str = "train", *, seed: int = 0) -> Dataset:
    """Load one split of an embedded data set; the same seed gives the same images.

    Raises ValueError for an unknown name or split.
    """
    if name not in dataset_names():
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(dataset_names())}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    return _digits(split, seed) if name == "digits" else _drawn(name, split, seed)


@functools.cache
def _artwork():
    return load_artwork()


def _drawn(name: str, split: str, seed: int) -> Dataset:
    """New renderings of Twemoji. The artwork is that of the zoo's training set, the scenes are not."""
    group = GROUPS[name]
    members = [i for i, item in enumerate(vocabulary()) if group in (None, item.group)]
    # Training scenes are seeded with (seed, step), these with a hash of their name: none is shared.
    key = hashlib.sha256(f"{name}/{split}/{seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:6], "big"))
    labels = torch.arange(COUNTS[split]) % len(members)  # stratified
    labels = labels[torch.randperm(len(labels), generator=generator)]
    owners = torch.tensor(members)[labels]
    sprites = _artwork().sprites  # in the order of the vocabulary
    images = [draw_scenes(sprites[part], generator=generator, size=SIZE).images for part in owners.split(500)]
    return Dataset(name, split, torch.cat(images), labels, tuple(vocabulary()[i].name for i in members), TEMPLATES)


def _digits(split: str, seed: int) -> Dataset:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 grey values, enlarged; three fifths are for training."""
    source = load_digits()
    rows = range(len(source.target))
    train, rest = train_test_split(rows, test_size=0.4, stratify=source.target, random_state=seed)
    validation, test = train_test_split(rest, test_size=0.5, stratify=source.target[rest], random_state=seed)
    chosen: Sequence[int] = {"train": train, "validation": validation, "test": test}[split]
    grey = torch.tensor(source.images[chosen], dtype=torch.float32)[:, None] / 16
    images = F.interpolate(grey, SIZE, mode="bicubic").clamp(0, 1).expand(-1, 3, -1, -1)
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    classes = tuple(f"the number {i}, {word}" for i, word in enumerate(words))
    return Dataset(
        "digits", split, (images * 255).round().to(torch.uint8), torch.tensor(source.target[chosen]), classes, TEMPLATES
    )
