"""What a profile would run, before it does: `python -m edition.plan paper`. Needs no network and no weights."""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from edition.downloads import downloads, fetch
from edition.inputs import SHIPPED_SIDE, Extraction, encoder_for, jobs
from edition.pages import ParameterError, find_profile, project_root
from residual.encoders.encoder import Encoder
from residual.encoders.names import SHIPPED, tower_name
from residual.extraction import DTYPES, SHARD
from residual.units import trace


@dataclass(frozen=True)
class Cost:
    """Of an encoder: operations, and bytes of coordinates and of outputs, per image; bytes of moments per shard."""

    flops: float
    coordinates: int
    outputs: int
    moments: int
    weights: int


@functools.lru_cache(maxsize=1)
def _untrained(name: str, side: int, device: str = "cpu") -> tuple[Encoder, Tensor] | None:
    """An encoder with random weights, and a picture as it reads it [1 3 h w]; None without its configuration."""
    try:
        encoder = encoder_for(name, side, pretrained=False, device=device)
    except (RuntimeError, OSError):
        return None
    return encoder, encoder.preprocess(Image.new("RGB", (side, side)))[None].to(device)


@functools.cache
def encoder_cost(name: str, side: int) -> Cost | None:
    """Counted on the encoder with random weights; None where its configuration must be downloaded first."""
    from torch.utils.flop_counter import FlopCounterMode

    if not (loaded := _untrained(name, side)):
        return None
    (encoder, pixels), flops = loaded, []
    for images in (1, 2):  # a trace's fixed part, the frames of heads, is not an image's
        with FlopCounterMode(display=False) as counter:
            trace(encoder, pixels.expand(images, -1, -1, -1))
        flops.append(counter.get_total_flops())
    heads, k, d = encoder.layers * encoder.heads, encoder.head_width + 2, encoder.output_dim
    moments = 8 * (heads * k * (k + 1) + (encoder.layers + 2) * d * (d + 1))
    weights = 4 * sum(p.numel() for p in encoder.model.parameters())
    return Cost(float(flops[1] - flops[0]), 4 * (heads * k + (encoder.layers + 1) * d), 4 * d, moments, weights)


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


def _as_read(job: Extraction) -> tuple[str, int]:
    """The name of a job's encoder, and the side of its images where that is the job's choice."""
    name = tower_name(job.encoder)
    return name, job.size if name == SHIPPED else SHIPPED_SIDE


def job_cost(job: Extraction, device: str, tflops: float | None = None) -> dict[str, Any]:
    """Images, operations, hours and bytes of a job; None for what is not known without its data. See `plan`."""
    cost, count = encoder_cost(*_as_read(job)), job.count()
    row = {"job": job.name, "images": count, "flops": None, "hours": None, "bytes": None}
    if count is not None and cost is not None:
        speed = tflops * 1e12 if tflops else measured_speed(*_as_read(job), device, job.batch, job.precision)
        row |= {"flops": count * cost.flops, "hours": count * cost.flops / speed / 3600}
        row["bytes"] = count * (cost.coordinates * job.coordinates + cost.outputs) + -(-count // SHARD) * cost.moments
    return row | {"done": (project_root() / "_build/units/jobs" / job.name).is_file()}


def plan(profile: Path, device: str, tflops: float | None = None) -> dict[str, Any]:
    """Every job with what it costs, and downloads. tflops: what the device sustains; by default it is measured."""
    wanted = jobs(profile)
    rows = [job_cost(job, device, tflops) for job in wanted]
    weights = {job.encoder: cost and cost.weights for job in wanted for cost in [encoder_cost(*_as_read(job))]}
    return {"jobs": rows, "downloads": downloads(wanted, weights)}


def shown(result: dict[str, Any]) -> str:
    """The plan as a reader sees it."""
    rows, giga = pd.DataFrame(result["jobs"]), 1e9
    sums = rows.loc[~rows["done"], ["images", "flops", "hours", "bytes"]].sum()
    table = rows.assign(TFLOP=rows["flops"] / 1e12, GB=rows["bytes"] / giga).drop(columns=["flops", "bytes"])
    items = pd.DataFrame.from_dict(result["downloads"], orient="index", columns=["bytes", "kept", "gated", "there"])
    items[["bytes", "kept"]] = items[["bytes", "kept"]].astype(float) / giga
    missing, free = items[~items["there"].astype(bool)], shutil.disk_usage(project_root()).free / giga
    return "\n".join([
        table.to_string(index=False, float_format="{:,.2f}".format, na_rep="?"), "",
        f"downloads, in GB:\n{items.to_string(na_rep='?')}\n" if len(items) else "downloads: none",
        f"{len(rows)} extractions, {rows['done'].sum()} of them there, {rows['flops'].isna().sum()} of unknown size",
        f"to do: {sums['images']:,.0f} images, {sums['flops'] / 1e15:,.1f} PFLOP, {sums['hours']:,.1f} hours in a row",
        f"to download: {missing['bytes'].sum():,.1f} GB, {missing['kept'].sum():,.1f} GB on disk, with sets twice",
        f"to store: {sums['bytes'] / giga:,.1f} GB; free here: {free:,.1f} GB",
        "Hours are of extraction alone; decoding images, training and analysis come on top.",
    ])  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m edition.plan", description=__doc__.split("\n")[0])
    parser.add_argument("profile", help="a file, or the name of one in profiles/")
    parser.add_argument("--device", default="cpu", help="where speed is measured")
    parser.add_argument("--tflops", type=float, help="of another device, sustained, in place of a measurement")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--download", action="store_true", help="fetch what jobs need, for machines without a network")
    args = parser.parse_args(arguments)
    try:
        path = find_profile(args.profile)
        if args.download:
            fetch(jobs(path))
        else:
            result = plan(path, args.device, args.tflops)
            print(json.dumps(result, indent=2) if args.json else shown(result))
    except (ParameterError, OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
