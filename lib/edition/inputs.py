"""What chapters read: one list of extractions for the chapters themselves, the plan and the Snakefile."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from edition.pages import ParameterError, chapters, project_root
from edition.parameters import chapter_parameters
from residual.alignment import Bases, component_scores
from residual.data.dataset import Dataset, load_dataset
from residual.data.hub.catalogue import catalogue
from residual.data.miniature.sets import ENTRIES, SIZE
from residual.data.names import NOISE, SPLITS, dataset_names, split_task
from residual.encoders.encoder import Encoder, load_encoder
from residual.encoders.names import EMBEDDED, SHIPPED, split_tag
from residual.extraction import extract
from residual.files import file_name, locked
from residual.store import StoredUnits

ALL = 10**9  # images
SIDE, BLIP_SIDE = 224, 384  # pixels, of images drawn for encoders that read larger ones than the embedded
SHIPPED_SIDE = 112  # the same for the shipped encoder, where a chapter has no parameter for it
IN_MEMORY = 2 * 10**9  # bytes of component scores; more are kept in files


def encoder_for(name: str, side: int = SHIPPED_SIDE, **options: Any) -> Encoder:
    """An encoder as chapters use it: the shipped one reads the images that are drawn for it as they are."""
    encoder = load_encoder(name, **options)
    return encoder.at_size(side) if split_tag(name)[0] == SHIPPED else encoder


@dataclass(frozen=True)
class Extraction:
    """An encoder on a split of a data set. images: at most so many. balanced: over classes.

    coordinates: whether they are kept, beside moments and outputs. size: pixels a side of images that are drawn.
    """

    encoder: str
    dataset: str
    split: str
    images: int
    balanced: bool
    coordinates: bool
    seed: int
    batch: int
    precision: str = "float32"
    size: int = SIZE

    @property
    def name(self) -> str:
        """A file name that says all of it."""
        kind = "coordinates" if self.coordinates else "moments"
        count = "all" if self.images == ALL else str(self.images)
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:6]
        return file_name(Path(self.encoder).name, Path(self.dataset).name, self.split, count, kind, digest)

    def count(self) -> int | None:
        """Images, where that is known without the data."""
        if self.dataset in ENTRIES:
            return min(self.images, ENTRIES[self.dataset].counts[self.split])
        entry = catalogue().get(self.dataset.partition("@")[0])
        return None if entry is None else min(self.images, entry.counts()[self.split])

    def data(self) -> Dataset:
        return task_split(self.dataset, self.split, self.images, self.seed, self.balanced, self.size)

    def units(self, encoder: Encoder, data: Dataset, **options: Any) -> StoredUnits | None:
        """Extract, unless a chapter or a job has before."""
        kept = "float32" if self.coordinates else None
        common = {"root": project_root() / "_build/units", "batch": self.batch, "precision": self.precision}
        return extract(encoder, data, coordinates=kept, **common, **options)


def extractions(chapter: str, parameters: dict[str, Any], profile: Path | None = None) -> list[Extraction]:
    """Every extraction that a chapter reads with these parameters, once.

    profile: where any of its chapters needs coordinates of the same images, they are kept for all.
    """
    kept = _coordinates_of(profile) if profile else frozenset()
    return [whole if (whole := replace(e, coordinates=True)) in kept else e for e in _read(chapter, parameters)]


def _read(chapter: str, parameters: dict[str, Any]) -> list[Extraction]:
    find = _EXTRACTIONS.get(chapter)
    encoders = (*parameters.get("encoders", ()), *parameters.get("controls", ()))
    return list(dict.fromkeys(e for name in encoders for e in find(name, parameters))) if find else []


@functools.cache
def _coordinates_of(profile: Path) -> frozenset[Extraction]:
    """The extractions of which some chapter of a profile needs coordinates; one with wrong parameters will say so."""
    found: set[Extraction] = set()
    for chapter in chapters():
        with suppress(ParameterError):
            found |= {e for e in _read(chapter, chapter_parameters(chapter, profile)) if e.coordinates}
    return frozenset(found)


def _extraction(encoder: str, p: dict[str, Any], dataset: str, split: str, images: int, **more: bool) -> Extraction:
    options = {"balanced": False, "coordinates": True} | more
    options |= {key: p[key] for key in ("seed", "batch", "precision")}
    base = split_tag(encoder)[0]
    if base == SHIPPED:  # fewer, and drawn larger
        fewer = min(images, _shipped_limit(p, dataset, split))
        return Extraction(encoder, dataset, split, fewer, size=p.get("shipped_side", SHIPPED_SIDE), **options)
    if dataset in NOISE.values() and base not in EMBEDDED:  # enlarged, neighbouring pixels would be alike
        size, count = BLIP_SIDE if base.startswith("BLIP") else SIDE, min(images, ENTRIES[dataset].counts[split])
        return Extraction(encoder, dataset, split, count, size=size, **options)
    bounded = Extraction(encoder, dataset, split, images, **options)
    whole = replace(bounded, images=ALL, balanced=False)
    return whole if images >= (whole.count() or ALL) else bounded


def _shipped_limit(p: dict[str, Any], dataset: str, split: str) -> int:
    """The most images that the shipped encoder reads: `shipped_images` of a chapter's own set, of others a tenth."""
    most = p.get("shipped_images", ALL)
    return most if dataset == p.get("dataset") else split_limit(split, most // 10)


def _one_set(encoder: str, p: dict[str, Any]) -> Iterator[Extraction]:
    yield _extraction(encoder, p, p["dataset"], p["split"], p["images"])


def _shapes(encoder: str, p: dict[str, Any]) -> Iterator[Extraction]:
    """All splits, as tasks read them."""
    return _splits(encoder, p | {"tasks": ["shapes"]})


def _reference_and_others(encoder: str, p: dict[str, Any]) -> Iterator[Extraction]:
    yield _extraction(encoder, p, p["dataset"], p["split"], p["reference_images"])
    for name in other_sets(p):
        balanced = p["split"] == "train" and name not in NOISE.values()  # as in tasks
        yield _extraction(encoder, p, name, p["split"], p["images"], balanced=balanced, coordinates=False)


def other_sets(p: dict[str, Any]) -> list[str]:
    """The sets that the reference set is compared with: those asked for, or all. The reading draws random images."""
    names = p["others"] or dataset_names()
    names = [NOISE[p["reading"]] if name == NOISE["text"] else name for name in names]
    return [name for name in dict.fromkeys(names) if name != p["dataset"]]


def _tasks(encoder: str, p: dict[str, Any]) -> Iterator[Extraction]:
    yield _extraction(encoder, p, p["dataset"], "train", p["reference_images"])
    yield from _splits(encoder, p)


def _splits(encoder: str, p: dict[str, Any], **more: bool) -> Iterator[Extraction]:
    for name, split in product(dict.fromkeys(split_task(task)[0] for task in p["tasks"]), SPLITS):
        options = {"balanced": split == "train"} | more
        yield _extraction(encoder, p, name, split, split_limit(split, p["images"]), **options)


def _outputs(encoder: str, p: dict[str, Any]) -> Iterator[Extraction]:
    yield from _splits(encoder, p, coordinates=False)


def _tasks_and_parity(encoder: str, p: dict[str, Any]) -> Iterator[Extraction]:
    yield from _tasks(encoder, p | {"tasks": [*p["tasks"], "shapes"]})


def _tasks_and_noise(encoder: str, p: dict[str, Any]) -> Iterator[Extraction]:
    yield from _tasks(encoder, p)
    for name in NOISE.values():
        yield _extraction(encoder, p, name, "train", p["images"], coordinates=False)


_EXTRACTIONS = dict.fromkeys(("dimension", "pursuit", "semantics", "heads"), _one_set) | {
    "ground_truth": _shapes,
    "similarity": _reference_and_others,
    "zoo": _outputs,
    "selection": _tasks,
    "alignment": _tasks_and_parity,
    "learned": _tasks,
    "class_means": _tasks,
    "playground": _tasks,
    "text_and_code": _tasks_and_noise,
}


def split_limit(split: str, images: int) -> int:
    """The most images that are taken of a task's split; of validation half as many."""
    return images // 2 if split == "validation" else images


@functools.lru_cache(maxsize=64)
def task_split(name: str, split: str, images: int, seed: int, balanced: bool, size: int, /) -> Dataset:
    """At most `images` of a data set: the first ones, or balanced over classes. size: of images that are drawn.

    Without names of arguments, so that the cache knows a call again.
    """
    larger = {} if size == SIZE else {"size": size, "count": images}  # as many as are needed: they take longer to draw
    data = load_dataset(name, split, seed=seed, **larger)
    count = min(images, len(data))
    return data.balanced(count) if balanced else data.head(count)


def task_parts(task: str, images: int, seed: int) -> dict[str, tuple[Dataset, Tensor]]:
    """Every split of a task: its data set, at most `images` of it (half of that for validation), and the task's labels.

    Tasks of one data set share their images. Training images are balanced over its classes.
    Raises ValueError where a class has no training image.
    """
    name, factor = split_task(task)
    parts = {}
    for split in SPLITS:
        data = task_split(name, split, split_limit(split, images), seed, split == "train", SIZE)
        parts[split] = data, data.factors[factor].values if factor else data.labels
    data, labels = parts["train"]
    count = len(data.factors[factor].names if factor else data.classes)
    if missing := count - len(labels.unique()):
        raise ValueError(f"images = {images}: {missing} of {count} classes of {task} have no training image; take more")
    return parts


@contextmanager
def residual_inputs(units: dict[str, StoredUnits], bases: Bases) -> Iterator[dict[str, Tensor]]:
    """`component_scores` of every split. Above 2 GB they are in half precision in files, removed after use."""
    if 4 * bases.width * sum(stored.manifest.count for stored in units.values()) <= IN_MEMORY:
        yield {split: component_scores(stored, bases) for split, stored in units.items()}
        return
    manifest = next(iter(units.values())).manifest
    folder = project_root() / "_build/scores" / file_name(
        Path(manifest.encoder).name, Path(manifest.dataset).name, bases.kind
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock"), str(folder)):
        yield {split: component_scores(stored, bases, folder) for split, stored in units.items()}
        shutil.rmtree(folder, ignore_errors=True)  # an interrupted run leaves it; the next one uses and removes it
