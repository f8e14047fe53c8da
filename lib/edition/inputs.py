"""What chapters read: one list of extractions for the chapters themselves, the plan and the Snakefile.

`python -m edition.inputs PROFILE JOB` does one of them. Imports no torch,
so that the graph of a run is known in seconds.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edition.pages import ParameterError, chapters, find_profile, project_root
from edition.parameters import chapter_parameters
from miniature import NOISE, counts, fourteen
from residual.data.catalogue import catalogue
from residual.data.names import SPLITS, split_task
from residual.encoders.names import SHIPPED, joining, needs_no_hub, split_tag, tower_name
from residual.files import file_name
from residual.sources import encoder_folders

if TYPE_CHECKING:
    from torch import Tensor

    from residual.data.dataset import Dataset
    from residual.encoders.encoder import Encoder
    from residual.store import StoredUnits

ALL = 10**9  # images
SIDE, BLIP_SIDE = 224, 384  # pixels, of images drawn for encoders that read larger ones than the embedded
CLASSES = 270  # more than any drawn set has
SHIPPED_SIDE = 112  # the same for the shipped encoder, where a chapter has no parameter for it


def encoder_for(name: str, side: int = SHIPPED_SIDE, **options: Any) -> Encoder:
    """An encoder as chapters use it: one with the shipped tower reads the images that are drawn for it as they are."""
    from residual import load_encoder

    if (joined := joining(name)) and split_tag(name)[1] == "random":
        options["seed"] = joined.random_seed  # the one that has maps
    encoder = load_encoder(name, **options)
    return encoder.at_size(side) if tower_name(name) == SHIPPED else encoder


@dataclass(frozen=True)
class Extraction:
    """An encoder on a split of a data set. images: at most so many. balanced: over classes.

    coordinates: whether they are kept, beside moments and outputs. size: pixels a side of images that are drawn; None
    for the sets' own.
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
    size: int | None = None

    @property
    def name(self) -> str:
        """A file name that says all of it."""
        kind = "coordinates" if self.coordinates else "moments"
        count = "all" if self.images == ALL else str(self.images)
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:6]
        return file_name(Path(self.encoder).name, Path(self.dataset).name, self.split, count, kind, digest)

    def count(self) -> int | None:
        """Images, where that is known without the data."""
        if (most := counts(self.dataset)) is not None:
            return min(self.images, most[self.split])
        entry = catalogue().get(self.dataset.partition("@")[0])
        return None if entry is None else min(self.images, entry.counts()[self.split])

    def data(self) -> Dataset:
        return task_split(self.dataset, self.split, self.images, self.seed, self.balanced, self.size)

    def units(self, encoder: Encoder, data: Dataset, **options: Any) -> StoredUnits:
        """Extract, unless a chapter or a job has before, be it with coordinates that are not needed here.

        Of an encoder that maps another's output, the other's units are extracted, and mapped.
        """
        from residual.extraction import extract, find_units
        from residual.store import mapped_units

        if (tower := encoder.unmapped()) is not None:
            sha256 = options.pop("weights_hash", None)
            own = replace(self, encoder=tower.name).units(tower, data, **options)
            return mapped_units(own, encoder, sha256)
        common = {"root": project_root() / "_build/units", "batch": self.batch, "precision": self.precision}
        common["weights_hash"] = options.pop("weights_hash", None)
        if not self.coordinates and (units := find_units(encoder, data, coordinates="float32", **common)):
            return units
        return extract(encoder, data, coordinates="float32" if self.coordinates else None, **common, **options)


def extractions(chapter: str, parameters: dict[str, Any]) -> list[Extraction]:
    """Every extraction that a chapter reads: of each encoder first the set it is about, or the reference set."""
    if (find := _EXTRACTIONS.get(chapter)) is None:
        return []
    encoders = (*parameters.get("encoders", ()), *parameters.get("controls", ()))
    found = [e for name in encoders for e in find(name, parameters)]
    for name in parameters.get("without_text", ()):
        found += _tasks(name, parameters | {"tasks": every_third(parameters["tasks"])})
    return list(dict.fromkeys(found))


def every_third(tasks: Sequence[str]) -> list[str]:
    """The tasks on which encoders without text are tried, to save time."""
    return list(tasks[::3])


def find_extraction(every: list[Extraction], encoder: str, dataset: str | None, split: str | None) -> Extraction | None:
    """Of a chapter's extractions, an encoder's first, or that of a data set's split; None where there is none."""
    ours = [e for e in every if e.encoder == encoder]
    if dataset is not None:
        ours = [e for e in reversed(ours) if (e.dataset, e.split) == (dataset, split)]
    return ours[0] if ours else None


def jobs_by_chapter(profile: Path) -> dict[str, list[Extraction]]:
    """The extractions of each chapter of a profile, those that another makes with coordinates aside.

    Beside a hub's encoders, those of installed sources are left to the chapters.
    """
    wanted = {chapter: extractions(chapter, chapter_parameters(chapter, profile)) for chapter in chapters()}
    whole = {job for needed in wanted.values() for job in needed if job.coordinates}
    remote = any(not needs_no_hub(job.encoder) for needed in wanted.values() for job in needed)
    left = encoder_folders() if remote else ()
    found = {}
    for chapter, needed in wanted.items():
        own = [one if (one := replace(job, coordinates=True)) in whole else job for job in needed]
        found[chapter] = [job for job in own if split_tag(job.encoder)[0] not in left]
    return {chapter: needed for chapter, needed in found.items() if needed}


def jobs(profile: Path) -> list[Extraction]:
    """Every extraction of a profile, each once."""
    return list(dict.fromkeys(job for needed in jobs_by_chapter(profile).values() for job in needed))


def _extraction(encoder: str, p: dict[str, Any], dataset: str, split: str, images: int, **more: bool) -> Extraction:
    options = {"balanced": False, "coordinates": True} | more
    options |= {key: p[key] for key in ("seed", "batch", "precision")}
    base = split_tag(encoder)[0]
    if tower_name(encoder) == SHIPPED:  # fewer, and drawn larger
        fewer = min(images, _shipped_limit(p, dataset, split, images))
        return Extraction(encoder, dataset, split, fewer, size=p.get("shipped_side", SHIPPED_SIDE), **options)
    if dataset in NOISE.values() and base not in encoder_folders():  # enlarged, neighbouring pixels would be alike
        size, count = BLIP_SIDE if base.startswith("BLIP") else SIDE, min(images, counts(dataset)[split])
        return Extraction(encoder, dataset, split, count, size=size, **options)
    bounded = Extraction(encoder, dataset, split, images, **options)
    whole = replace(bounded, images=ALL, balanced=False)
    return whole if images >= (whole.count() or ALL) else bounded


def _shipped_limit(p: dict[str, Any], dataset: str, split: str, images: int) -> int:
    """The most images that the shipped tower reads, where other encoders read `images`.

    Two thirds of a chapter's own set, and half of others, though enough of a training split for a class each.
    """
    if dataset == p.get("dataset"):
        return 2 * images // 3
    return max(images // 2, CLASSES) if split == "train" else images // 2


def _one_set(encoder: str, p: dict[str, Any]) -> Iterator[Extraction]:
    yield _extraction(encoder, p, p["dataset"], p["split"], p["images"])


def sampled_encoder(p: dict[str, Any]) -> str:
    """The encoder that a chapter runs on more images: the first of an installed source, or else the first."""
    return next((name for name in p["encoders"] if name in encoder_folders() and not joining(name)), p["encoders"][0])


def _two_sizes(encoder: str, p: dict[str, Any]) -> Iterator[Extraction]:
    yield from _one_set(encoder, p)
    if encoder == sampled_encoder(p):
        yield _extraction(encoder, p, p["dataset"], p["split"], max(p["images"], p["most_images"]))


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
    names = p["others"] or fourteen()
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


_EXTRACTIONS = dict.fromkeys(("pursuit", "semantics"), _one_set) | {
    "dimension": _two_sizes,
    "ground_truth": _shapes,
    "similarity": _reference_and_others,
    "data": _outputs,
    "selection": _tasks,
    "alignment": _tasks_and_parity,
    "heads": _tasks,
    "text_and_code": _tasks_and_noise,
}


def split_limit(split: str, images: int) -> int:
    """The most images that are taken of a task's split; of validation half as many."""
    return images // 2 if split == "validation" else images


@functools.lru_cache(maxsize=64)
def task_split(name: str, split: str, images: int, seed: int, balanced: bool, size: int | None, /) -> Dataset:
    """At most `images` of a data set: the first ones, or balanced over classes. size: of images that are drawn.

    Without names of arguments, so that the cache knows a call again.
    """
    from residual import load_dataset

    larger = {"size": size, "count": images} if size else {}  # as many as are needed: they take longer to draw
    data = load_dataset(name, split, seed=seed, **larger)
    count = min(images, len(data))
    return data.balanced(count) if balanced else data.head(count)


def task_parts(task: str, images: int, seed: int) -> dict[str, tuple[Dataset, Tensor]]:
    """Every split of a task: its data set, at most `images` of it (half of that for validation), and the task's labels.

    Tasks of one data set share their images. Training images are balanced over its classes.
    Raises ParameterError where a class has no training image.
    """
    name, factor = split_task(task)
    parts = {}
    for split in SPLITS:
        data = task_split(name, split, split_limit(split, images), seed, split == "train", None)
        parts[split] = data, task_labels(data, factor)[0]
    check_classes(parts["train"][0], factor, task, images)
    return parts


def task_checksum(parts: dict[str, tuple[Dataset, Tensor]]) -> str:
    """Twelve digits that change with the images and labels of any of a task's splits, from `task_parts`."""
    from residual.tensors import cache_key

    return cache_key(*(fact for data, labels in parts.values() for fact in (data.fingerprint(), labels)))


def task_labels(data: Dataset, factor: str) -> tuple[Tensor, tuple[str, ...]]:
    """The labels of images and their names: those of a factor, or, for "", of the set's classes."""
    return (data.factors[factor].values, data.factors[factor].names) if factor else (data.labels, data.classes)


def check_classes(data: Dataset, factor: str, task: str, images: int) -> None:
    """Raises ParameterError where a class of a task has no image among these of its training split."""
    labels, names = task_labels(data, factor)
    if missing := len(names) - len(labels.unique()):
        raise ParameterError(
            f"images = {images}: {missing} of {len(names)} classes of {task} have no training image; take more"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m edition.inputs", description="Extract what one job says.")
    parser.add_argument("profile", help="a file, or the name of one in profiles/")
    parser.add_argument("job", help="as `make plan` lists them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    args = parser.parse_args(arguments)
    try:
        job = {job.name: job for job in jobs(find_profile(args.profile))}.get(args.job)
        if job is None:
            raise ParameterError(f"{args.profile} has no job {args.job!r}; make plan lists them")
        encoder = encoder_for(job.encoder, job.size or SHIPPED_SIDE, seed=job.seed, device=args.device)
        job.units(encoder, job.data(), workers=args.workers)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
