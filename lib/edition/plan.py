"""What a profile would run, before it does: `python -m edition.plan paper`. Needs no network and no weights."""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from edition.devices import one_gpu
from edition.downloads import data_cached, weights_cached
from edition.inputs import SHIPPED_SIDE, Extraction, encoder_for, extractions
from edition.pages import ParameterError, chapters, find_profile, project_root
from edition.parameters import chapter_parameters
from residual.data.dataset import load_dataset
from residual.data.hub.catalogue import catalogue
from residual.data.names import is_embedded, split_task
from residual.encoders.encoder import Encoder, load_encoder
from residual.encoders.names import EMBEDDED, SHIPPED, needs_no_hub, split_tag
from residual.extraction import DTYPES, SHARD
from residual.store import read_manifest
from residual.training import EPOCHS
from residual.units import trace


def jobs_by_chapter(profile: Path) -> dict[str, list[Extraction]]:
    """The extractions of each chapter of a profile. Beside a hub's encoders, embedded ones are left to the chapters."""
    wanted = {chapter: extractions(chapter, chapter_parameters(chapter, profile), profile) for chapter in chapters()}
    if not all(needs_no_hub(job.encoder) for needed in wanted.values() for job in needed):
        wanted = {
            chapter: [job for job in needed if split_tag(job.encoder)[0] not in EMBEDDED]
            for chapter, needed in wanted.items()
        }
    return {chapter: needed for chapter, needed in wanted.items() if needed}


def jobs(profile: Path) -> list[Extraction]:
    """Every extraction of a profile, each once."""
    return list(dict.fromkeys(job for needed in jobs_by_chapter(profile).values() for job in needed))


def run_job(job: Extraction, *, device: str, workers: int, part: tuple[int, int] | None, compiled: bool) -> None:
    """Extract, into the folder where the chapters look."""
    with one_gpu(device):
        data, encoder = job.data(), encoder_for(job.encoder, job.size, seed=job.seed, device=device)
        if compiled:
            encoder.compile()
        job.units(encoder, data, workers=workers, part=part)


@dataclass(frozen=True)
class Cost:
    """Of an encoder: floating-point operations, bytes of coordinates and of outputs per image; moments per shard."""

    flops: float
    coordinates: int
    outputs: int
    moments: int
    weights: int


@functools.lru_cache(maxsize=1)
def _untrained(name: str, side: int, device: str = "cpu") -> tuple[Encoder, Tensor] | None:
    """An encoder with random weights, and a picture as it reads it [1 3 h w]; None without its configuration."""
    try:
        encoder = encoder_for(split_tag(name)[0], side, pretrained=False, device=device)
    except (RuntimeError, OSError):
        return None
    return encoder, encoder.preprocess(Image.new("RGB", (side, side)))[None].to(device)


@functools.cache
def encoder_cost(name: str, side: int) -> Cost | None:
    """Counted on the encoder with random weights; None where `_untrained` is."""
    from torch.utils.flop_counter import FlopCounterMode

    if not (loaded := _untrained(name, side)):
        return None
    encoder, pixels = loaded
    with FlopCounterMode(display=False) as once:
        trace(encoder, pixels)
    with FlopCounterMode(display=False) as twice:  # a trace's fixed part, the frames of heads, is not an image's
        trace(encoder, pixels.expand(2, -1, -1, -1))
    heads, k, d = encoder.layers * encoder.heads, encoder.head_width + 2, encoder.output_dim
    return Cost(
        float(twice.get_total_flops() - once.get_total_flops()),
        4 * (heads * k + (encoder.layers + 1) * d),
        4 * d,
        8 * (heads * k * (k + 1) + (encoder.layers + 2) * d * (d + 1)),
        4 * sum(p.numel() for p in encoder.model.parameters()),
    )


@functools.cache
def measured_speed(name: str, side: int, device: str, batch: int, precision: str) -> float:
    """Floating-point operations a second of tracing, the median of some passes of the encoder with random weights."""
    encoder, pixels = _untrained(name, side, device)
    pixels, *_ = encoder.cached_parts(pixels.expand(batch, -1, -1, -1))
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < 1:
        start = time.monotonic()
        with torch.autocast(encoder.device.type, DTYPES[precision], enabled=precision != "float32"):
            trace(encoder, pixels).output.sum().item()
        seconds.append(time.monotonic() - start)
    return len(pixels) * encoder_cost(name, side).flops / statistics.median(seconds)


def finished(root: Path) -> set[tuple[str, str, str, int, bool, bool]]:
    """The complete extractions in a folder.

    Encoder, data set, split, images, whether with coordinates, whether in single precision.
    """
    manifests = (read_manifest(folder) for folder in root.glob("*--*")) if root.is_dir() else ()
    return {
        (m.encoder, m.dataset, m.split, m.count, m.coordinates is not None, m.precision == "float32")
        for m in manifests if m and m.complete
    }  # fmt: skip


def plan(profile: Path, speed: Callable[[Extraction], float]) -> dict[str, Any]:
    """Every job with what it costs, and the sums. speed: floating-point operations a second of a job.

    Where an unknown set or encoder must be downloaded first, the costs of the job are None.
    """
    units, wanted = project_root() / "_build/units", jobs(profile)
    there = finished(units)
    rows = [job_cost(job, speed) | {"done": _done(job, there, units)} for job in wanted]
    return {"jobs": rows, "downloads": _downloads(wanted)} | _tuning(profile, speed)


def _as_read(job: Extraction) -> tuple[str, int]:
    """The name of a job's encoder, and the side of its images where that is the job's choice."""
    name = split_tag(job.encoder)[0]
    return name, job.size if name == SHIPPED else SHIPPED_SIDE


def _cost(job: Extraction) -> Cost | None:
    return encoder_cost(*_as_read(job))


def speed_of(job: Extraction, device: str) -> float:
    """Floating-point operations a second that a device sustains on a job."""
    return measured_speed(*_as_read(job), device, job.batch, job.precision)


def job_cost(job: Extraction, speed: Callable[[Extraction], float]) -> dict[str, Any]:
    """Images, floating-point operations, hours and bytes of a job; None for what is not known without its data."""
    cost, count = _cost(job), job.count()
    row = {"job": job.name, "images": count, "flops": None, "hours": None, "bytes": None}
    if count is not None and cost is not None:
        shards = -(-count // SHARD)
        row |= {"flops": count * cost.flops, "hours": count * cost.flops / speed(job) / 3600}
        row["bytes"] = count * (cost.coordinates * job.coordinates + cost.outputs) + shards * cost.moments
    return row


def _done(job: Extraction, there: set[tuple], units: Path) -> bool:
    about = job.encoder, job.dataset, job.split, job.count(), job.coordinates, job.precision == "float32"
    sized = split_tag(job.encoder)[0] == SHIPPED  # a manifest does not tell the size of its images
    return (units / "jobs" / job.name).is_file() or (about in there and not sized)


def _downloads(wanted: list[Extraction]) -> dict[str, dict[str, Any]]:
    """What jobs need from a hub: bytes where they are known, bytes that stay on disk, and whether they are cached."""
    sets = sorted({job.dataset.partition("@")[0] for job in wanted if not is_embedded(job.dataset)})
    encoders = sorted({job.encoder for job in wanted if not needs_no_hub(job.encoder)})
    return {name: _data_download(name) for name in sets} | {name: _weights_download(name) for name in encoders}


def _data_download(name: str) -> dict[str, Any]:
    """`datasets` keeps a set twice: as it was downloaded, and as the tables that it reads from."""
    entry = catalogue().get(name)
    size = int(entry.gigabytes * 1e9) if entry else None
    return {"bytes": size, "kept": size and 2 * size, "gated": bool(entry and entry.gated), "there": data_cached(name)}


def _weights_download(name: str) -> dict[str, Any]:
    cost = encoder_cost(split_tag(name)[0], SHIPPED_SIDE)
    size = cost.weights if cost else None
    return {"bytes": size, "kept": size, "gated": False, "there": weights_cached(name)}


def download(wanted: list[Extraction]) -> list[str]:
    """Fetch all that jobs need into the caches, and prepare it; returns a line for each that could not be fetched."""
    items = dict.fromkeys([(job.encoder, "") for job in wanted] + [(job.dataset, job.split) for job in wanted])
    failed = []
    with tqdm(items, unit="item") as bar:
        for name, split in bar:
            bar.set_description(f"{name} {split}")
            try:
                load_dataset(name, split, seed=wanted[0].seed) if split else load_encoder(name)
            except (OSError, ValueError, RuntimeError) as error:
                failed.append(f"{name}: {error}")
    return list(dict.fromkeys(failed))


def _table(result: dict[str, Any]) -> str:
    """The plan as a reader sees it."""
    rows, downloads = result["jobs"], result["downloads"]
    left = [row for row in rows if not row["done"] and row["flops"] is not None]
    unknown = sum(row["flops"] is None and not row["done"] for row in rows)
    sums = {key: sum(row[key] for row in left) for key in ("images", "flops", "hours", "bytes")}
    missing = [item for item in downloads.values() if not item["there"]]
    fetched, on_disk = (sum(item[key] or 0 for item in missing) for key in ("bytes", "kept"))
    free = shutil.disk_usage(project_root()).free
    return "\n".join([
        f"{'job':<90} {'images':>8} {'TFLOP':>9} {'hours':>8} {'GB':>7}  there",
        *map(_job_line, rows), "",
        "downloads, about:" if downloads else "downloads: none",
        *(_download_line(name, item) for name, item in downloads.items()), "",
        f"{len(rows)} extractions, {len(rows) - len(left) - unknown} of them there"
        + (f", {unknown} of unknown size" if unknown else ""),
        f"to do: {sums['images']:,} images, {sums['flops'] / 1e15:,.1f} PFLOP, about {sums['hours']:,.1f} hours, one "
        "after the other",
        f"to download: {fetched / 1e9:,.1f} GB, {on_disk / 1e9:,.1f} GB on disk, as `datasets` keeps two copies",
        f"to store: {sums['bytes'] / 1e9:,.1f} GB of units; free here: {free / 1e9:,.1f} GB",
        *_tuning_line(result),
        "Hours are of extraction alone; decoding images, training and analysis come on top.",
    ])  # fmt: skip


def _tuning_line(result: dict[str, Any]) -> list[str]:
    """What full fine-tuning would cost, beside the plan."""
    if not result["pairs"]:
        return []
    return [
        f"fine-tuning all {result['pairs']} pairs (-p finetune '[all]' of alignment, not counted here): if none stops "
        f"early, about {result['tuning'] / 1e15:,.1f} PFLOP, {result['tuning_hours']:,.1f} hours"
    ]


def _tuning(profile: Path, speed: Callable) -> dict[str, Any]:
    """The pairs of encoder and task of a profile, and the operations of fine-tuning each for as long as is allowed.

    A step is three forward passes; the search for a rate and validation are left out.
    """
    p = chapter_parameters("alignment", profile)
    training = {(job.encoder, job.dataset): job for job in extractions("alignment", p, profile) if job.split == "train"}
    pairs = [training[encoder, split_task(task)[0]] for encoder, task in product(p["encoders"], p["tasks"])]
    known = [(job, cost) for job in pairs if (cost := _cost(job)) and job.count()]
    flops = [(job, 3 * EPOCHS * job.count() * cost.flops) for job, cost in known]
    hours = sum(needed / speed(job) for job, needed in flops) / 3600
    return {"pairs": len(pairs), "tuning": sum(needed for _, needed in flops), "tuning_hours": hours}


def _job_line(row: dict[str, Any]) -> str:
    figures = f"{row['images'] or '?':>8} {'?':>9} {'?':>8} {'?':>7}"
    if row["flops"] is not None:
        tera, giga = row["flops"] / 1e12, row["bytes"] / 1e9
        figures = f"{row['images']:>8,} {tera:>9,.0f} {row['hours']:>8.2f} {giga:>7.2f}"
    return f"{row['job']:<90} {figures}  {'yes' if row['done'] else ''}"


def _download_line(name: str, item: dict[str, Any]) -> str:
    notes = " ".join(["gated: ask for access first"] * item["gated"] + ["there"] * item["there"])
    size = "?" if item["bytes"] is None else f"{item['bytes'] / 1e9:.1f}"
    return f"  {name:<30} {size:>7} GB  {notes}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m edition.plan", description=__doc__.split("\n")[0])
    parser.add_argument("profile", help="a file, or the name of one in profiles/")
    parser.add_argument("--device", default="cpu", help="where speed is measured, and jobs run")
    parser.add_argument("--tflops", type=float, help="of another device, sustained, in place of a measurement")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--list", action="store_true", help="only the names of the jobs, at once")
    parser.add_argument("--download", action="store_true", help="fetch what jobs need, for machines without a network")
    parser.add_argument("--run", metavar="JOB", help="run one job")
    parser.add_argument("--part", metavar="I/N", help="with --run: every N-th shard from the I-th on, from 0")
    parser.add_argument("--compile", action="store_true", help="with --run: compile the encoder's MLPs first")
    parser.add_argument(
        "--workers", type=int, default=max(0, min(8, (os.cpu_count() or 1) - 1)), help="processes that decode"
    )
    return parser


def _carry_out(args: argparse.Namespace) -> None:
    path = find_profile(args.profile)
    known = {job.name: job for job in jobs(path)}
    if args.run:
        if args.run not in known:
            raise ParameterError(f"{path.stem} has no job {args.run!r}; --list shows them")
        part = tuple(int(value) for value in args.part.split("/")) if args.part else None
        run_job(known[args.run], device=args.device, workers=args.workers, part=part, compiled=args.compile)
    elif args.download:
        if failed := download(list(known.values())):
            raise RuntimeError("these could not be fetched; the others are there\n" + "\n".join(failed))
    elif args.list:
        print("\n".join(known))
    else:
        flops = args.tflops and args.tflops * 1e12
        result = plan(path, lambda job: flops or speed_of(job, args.device))
        print(json.dumps(result, indent=2) if args.json else _table(result))


def main(arguments: list[str] | None = None) -> int:
    try:
        _carry_out(_parser().parse_args(arguments))
    except (ParameterError, OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
