"""What a profile would run, before it does: `python -m residual.plan paper`. Needs no network and no weights."""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import jupytext
import torch
from huggingface_hub import constants
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from residual import load_encoder
from residual.catalogue import catalogue
from residual.chapters import ParameterError, check_parameters, project_root, read_profile, task_split
from residual.data import SPLITS, dataset_names, load_dataset, split_task
from residual.devices import one_gpu
from residual.embedded import ENTRIES
from residual.extraction import PRECISIONS, extract
from residual.hub import local_folder
from residual.sources import EMBEDDED, weights_repo
from residual.store import read_manifest
from residual.units import trace

MOST = 10**9  # images: all that there are
READERS = ("dimension", "pursuit", "semantics", "heads")  # chapters that read one set
EMULATED = 4  # images whose FLOPs are counted


@dataclass(frozen=True)
class Job:
    """One extraction: an encoder on a split of a data set. images: at most so many. balanced: over classes."""

    encoder: str
    dataset: str
    split: str
    images: int
    balanced: bool
    coordinates: bool
    seed: int
    batch: int
    precision: str = "float32"

    @property
    def name(self) -> str:
        """A file name that tells all of it."""
        kind = "coordinates" if self.coordinates else "moments"
        count = "all" if self.images == MOST else str(self.images)
        parts = (self.encoder, self.dataset, self.split, count, kind)
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:6]
        return "--".join(Path(part).name.replace(":", "_").replace("@", "_") for part in parts) + f"--{digest}"

    def count(self) -> int | None:
        """Images, where that is known without the data."""
        if self.dataset in ENTRIES:
            return min(self.images, ENTRIES[self.dataset].counts[self.split])
        entry = catalogue().get(self.dataset.partition("@")[0])
        return None if entry is None else min(self.images, entry.counts()[self.split])

    def run(
        self, *, device: str = "cpu", workers: int = 0, part: tuple[int, int] | None = None, compiled: bool = False
    ) -> None:
        """Extract, into where the chapters look."""
        with one_gpu(device):
            data = task_split(self.dataset, self.split, self.images, self.seed, balanced=self.balanced)
            encoder = load_encoder(self.encoder, seed=self.seed, device=device)
            if compiled:
                encoder.compile()
            extract(
                encoder, data, root=project_root() / "_build/units", batch=self.batch, precision=self.precision,
                workers=workers, part=part, coordinates="float32" if self.coordinates else None,
            )  # fmt: skip

    def ended(self) -> bool:
        """Whether a run of the graph has done it."""
        return (project_root() / "_build/units/jobs" / self.name).is_file()


def chapter_parameters(chapter: str, profile: Path) -> dict[str, Any]:
    """What a chapter runs with in a profile, its defaults included. Raises ParameterError for bad ones."""
    cells = jupytext.read(project_root() / "book" / f"{chapter}.md").cells
    source = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", ()))
    defaults = {s.targets[0].id: ast.literal_eval(s.value) for s in ast.parse(source).body if isinstance(s, ast.Assign)}
    given = defaults | read_profile(profile, chapter)
    check_parameters(**given)
    return given


def jobs_by_chapter(profile: Path) -> dict[str, list[Job]]:
    """The extractions that each chapter of a profile reads. Where one keeps coordinates, none is made without."""
    chapters = (*READERS, "similarity", "ground_truth", "selection", "alignment")
    found = {chapter: list(_chapter_jobs(chapter, chapter_parameters(chapter, profile))) for chapter in chapters}
    whole = {replace(job, coordinates=False): job for own in found.values() for job in own if job.coordinates}
    return {chapter: list(dict.fromkeys(whole.get(job, job) for job in own)) for chapter, own in found.items()}


def jobs(profile: Path) -> list[Job]:
    """Every extraction of a profile, each once."""
    return list(dict.fromkeys(job for own in jobs_by_chapter(profile).values() for job in own))


def _chapter_jobs(chapter: str, given: dict[str, Any]) -> Iterator[Job]:
    def job(encoder: str, dataset: str, split: str, images: int, *, balanced: bool = False, kept: bool = True) -> Job:
        made = Job(encoder, dataset, split, MOST, False, kept, given["seed"], given["batch"], given["precision"])
        return made if images >= (made.count() or MOST) else replace(made, images=images, balanced=balanced)

    for encoder in (*given["encoders"], *given.get("controls", ())):
        if chapter in READERS:
            yield job(encoder, given["dataset"], given["split"], given["images"])
        elif chapter == "ground_truth":
            yield job(encoder, "shapes", given["split"], given["images"])
        elif chapter == "similarity":
            yield job(encoder, given["dataset"], given["split"], given["reference_images"])
            for name in given["others"] or dataset_names():
                if name != given["dataset"]:
                    yield job(encoder, name, given["split"], given["images"], kept=False)
        else:
            yield job(encoder, given["dataset"], "train", given["reference_images"])
            tasks = [split_task(task)[0] for task in given["tasks"]] + ["shapes"] * (chapter == "alignment")
            for name, split in product(dict.fromkeys(tasks), SPLITS):
                images = given["images"] // 2 if split == "validation" else given["images"]
                yield job(encoder, name, split, images, balanced=split == "train")


@dataclass(frozen=True)
class Cost:
    """Of one encoder, an image: floating-point operations; bytes of its coordinates. Of a shard: bytes of moments."""

    flops: float
    coordinates: int
    moments: int
    weights: int


@functools.cache
def encoder_cost(name: str) -> Cost | None:
    """Counted on the encoder with random weights; None for one whose configuration cannot be had."""
    try:
        encoder = load_encoder(name.partition("@")[0], False)
    except (RuntimeError, OSError):
        return None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trace(encoder, torch.zeros(EMULATED, 3, *encoder.tower.image_size, dtype=torch.uint8))
    heads, own, d = encoder.layers * encoder.heads, encoder.head_width + 2, encoder.output_dim
    return Cost(
        counter.get_total_flops() / EMULATED,
        4 * (heads * own + (encoder.layers + 2) * d),
        8 * (heads * own * (own + 1) + (encoder.layers + 2) * d * (d + 1)),
        4 * sum(p.numel() for p in encoder.model.parameters()),
    )


@functools.cache
def measured_speed(device: str, precision: str = "float32") -> float:
    """Floating-point operations a second of tracing ViT-B/16 on a device, at the batch that the chapters use."""
    encoder = load_encoder("OpenCLIP-B", False, device=device)
    pixels = torch.randn(8 if device == "cpu" else 128, 3, *encoder.tower.image_size)
    with torch.no_grad(), torch.autocast(encoder.device.type, PRECISIONS[precision], enabled=precision != "float32"):
        trace(encoder, pixels).output.sum().item()
        start, runs = time.monotonic(), 0
        while runs < 3 or time.monotonic() - start < 1:
            trace(encoder, pixels).output.sum().item()
            runs += 1
    return runs * len(pixels) * encoder_cost("OpenCLIP-B").flops / (time.monotonic() - start)


def done(root: Path) -> set[tuple[str, str, str, int, bool, bool]]:
    """What lies whole in a folder of extractions.

    Encoder, data set, split, images, whether with coordinates, whether in single precision.
    """
    found = (read_manifest(folder) for folder in root.glob("*--*")) if root.is_dir() else ()
    return {
        (m.encoder, m.dataset, m.split, m.count, m.coordinates is not None, m.precision == "float32")
        for m in found if m and m.complete
    }  # fmt: skip


def plan(profile: Path, speed: Callable[[str], float]) -> dict[str, Any]:
    """Every job with what it costs, and the sums. speed: floating-point operations a second in a precision.

    Where a set or an encoder that is not known must be downloaded first, the costs of the job are None.
    """
    there, rows = done(project_root() / "_build/units"), []
    for job in jobs(profile):
        cost, count = encoder_cost(job.encoder), job.count()
        row = {"job": job.name, "images": count, "flops": None, "hours": None, "bytes": None}
        if count is not None and cost is not None:
            shards = -(-count // 4096)
            row |= {"flops": count * cost.flops, "hours": count * cost.flops / speed(job.precision) / 3600}
            row["bytes"] = count * cost.coordinates * job.coordinates + shards * cost.moments
        about = job.encoder, job.dataset, job.split, count, job.coordinates, job.precision == "float32"
        row["done"] = job.ended() or about in there
        rows.append(row)
    return {"jobs": rows, "downloads": _downloads(jobs(profile)), "speed": speed(jobs(profile)[0].precision)}


def _downloads(own: list[Job]) -> dict[str, dict[str, Any]]:
    """What jobs need from a hub: bytes where they are known, bytes that stay on disk, and whether it is there.

    `datasets` keeps a set twice: as it was downloaded, and as the tables that it reads from.
    """
    found = {}
    for name in sorted({job.dataset.partition("@")[0] for job in own} - set(ENTRIES)):
        entry = catalogue().get(name)
        if entry is None and local_folder(name):
            continue
        repo, size = (entry.repo, int(entry.gigabytes * 1e9)) if entry else (name, None)
        tables = Path(datasets.config.HF_DATASETS_CACHE) / repo.replace("/", "___")
        fetched = Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}"
        here = any(tables.glob("**/dataset_info.json")) or any(fetched.glob("snapshots/**/*.tar*"))
        here = here and not any((*tables.glob("**/*.incomplete"), *fetched.glob("blobs/*.incomplete")))
        found[name] = {"bytes": size, "kept": size and 2 * size, "gated": bool(entry and entry.gated), "there": here}
    for name in sorted({job.encoder for job in own}):
        if name.partition("@")[0] in EMBEDDED or name.endswith("@random") or local_folder(name):
            continue
        cost, repo = encoder_cost(name), weights_repo(name)
        here = bool(repo) and any(
            (Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}").glob("snapshots/*/*")
        )
        size = cost.weights if cost else None
        found[name] = {"bytes": size, "kept": size, "gated": False, "there": here}
    return found


def download(own: list[Job]) -> list[str]:
    """Fetch all that jobs need into the caches, and prepare it; what could not be had is told, one line each."""
    wanted = dict.fromkeys([(job.encoder, "") for job in own] + [(job.dataset, job.split) for job in own])
    failed = []
    with tqdm(wanted, unit="item") as bar:
        for name, split in bar:
            bar.set_description(f"{name} {split}")
            try:
                load_dataset(name, split, seed=own[0].seed) if split else load_encoder(name)
            except (OSError, ValueError, RuntimeError) as error:
                failed.append(f"{name}: {error}")
    return list(dict.fromkeys(failed))


def _table(found: dict[str, Any]) -> str:
    """The plan as a reader sees it."""
    lines = [f"{'job':<90} {'images':>8} {'TFLOP':>9} {'hours':>8} {'GB':>7}  there"]
    for row in found["jobs"]:
        known = row["flops"] is not None
        figures = (
            f"{row['images']:>8,} {row['flops'] / 1e12:>9,.0f} {row['hours']:>8.2f} {row['bytes'] / 1e9:>7.2f}"
            if known else f"{row['images'] or '?':>8} {'?':>9} {'?':>8} {'?':>7}"
        )  # fmt: skip
        lines.append(f"{row['job']:<90} {figures}  {'yes' if row['done'] else ''}")
    left = [row for row in found["jobs"] if not row["done"] and row["flops"] is not None]
    sums = {key: sum(row[key] for row in left) for key in ("images", "flops", "hours", "bytes")}
    lines += ["", "downloads, about:" if found["downloads"] else "downloads: none"]
    for name, own in found["downloads"].items():
        notes = " ".join(["gated: ask for access first"] * own["gated"] + ["there"] * own["there"])
        size = "?" if own["bytes"] is None else f"{own['bytes'] / 1e9:.1f}"
        lines.append(f"  {name:<30} {size:>7} GB  {notes}")
    missing = [own for own in found["downloads"].values() if not own["there"]]
    fetched, kept = (sum(own[key] or 0 for own in missing) for key in ("bytes", "kept"))
    free = shutil.disk_usage(project_root()).free
    unknown = sum(row["flops"] is None and not row["done"] for row in found["jobs"])
    lines += [
        "",
        f"{len(found['jobs'])} extractions, {len(found['jobs']) - len(left) - unknown} of them there"
        + (f", {unknown} of a size not known yet" if unknown else ""),
        f"to do: {sums['images']:,} images, {sums['flops'] / 1e15:,.1f} PFLOP, about {sums['hours']:,.1f} hours at "
        f"{found['speed'] / 1e12:.2f} TFLOP/s, one after the other",
        f"to download: {fetched / 1e9:,.1f} GB, which take {kept / 1e9:,.1f} GB on disk: `datasets` keeps them twice",
        f"to store: {sums['bytes'] / 1e9:,.1f} GB of units; free here: {free / 1e9:,.1f} GB",
        "Hours are of extraction alone; decoding images, training and analysis come on top.",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m residual.plan", description=__doc__.split("\n")[0])
    parser.add_argument("profile", type=Path, help="a file, or the name of one in profiles/")
    parser.add_argument("--device", default="cpu", help="on which speed is measured, and jobs run")
    parser.add_argument("--tflops", type=float, help="of another device, sustained, in place of a measurement")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--list", action="store_true", help="names of the jobs alone, at once")
    parser.add_argument("--download", action="store_true", help="fetch what jobs need, for machines without a network")
    parser.add_argument("--run", metavar="JOB", help="run one job")
    parser.add_argument("--part", metavar="I/N", help="with --run: every N-th shard from the I-th on, from 0")
    parser.add_argument("--compile", action="store_true", help="with --run: compile the encoder's MLPs first")
    parser.add_argument("--workers", type=int, default=max(0, min(8, (os.cpu_count() or 1) - 1)), help="that decode")
    args = parser.parse_args(arguments)
    path = args.profile if args.profile.suffix else project_root() / "profiles" / f"{args.profile}.yml"
    try:
        known = {job.name: job for job in jobs(path)}
        if args.run:
            if args.run not in known:
                raise ParameterError(f"{path.stem} has no job {args.run!r}; --list shows them")
            part = tuple(int(value) for value in args.part.split("/")) if args.part else None
            known[args.run].run(device=args.device, workers=args.workers, part=part, compiled=args.compile)
        elif args.download:
            if failed := download(list(known.values())):
                raise RuntimeError("these could not be had; the others are there\n" + "\n".join(failed))
        elif args.list:
            print("\n".join(known))
        else:
            given = args.tflops and args.tflops * 1e12
            found = plan(path, lambda precision: given or measured_speed(args.device, precision))
            print(json.dumps(found, indent=2) if args.json else _table(found))
    except (ParameterError, OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
