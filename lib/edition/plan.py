"""What a profile would run, before it does: `python -m edition.plan paper --gpu h100`. Needs no network."""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import nn

from edition.downloads import downloads, fetch
from edition.inputs import SHIPPED_SIDE, Extraction, encoder_for, every_third, extractions, find_extraction, jobs
from edition.pages import ParameterError, chapters, find_profile, project_root
from edition.parameters import chapter_parameters
from edition.results import measured
from residual.data.names import split_task
from residual.encoders.names import SHIPPED, tower_name
from residual.extraction import DTYPES, SHARD

EPOCHS, METHODS = 30, {"alignment": 4, "selection": 1, "text_and_code": 5, "heads": 2}  # trainings of a task, at most


@dataclass(frozen=True)
class Cost:
    """Of an encoder: operations, and bytes of coordinates and of outputs, per image; bytes of moments per shard.

    pair: operations of comparing two images, for all heads. step: those of one image in one epoch of training.
    """

    flops: float
    coordinates: int
    outputs: int
    moments: int
    weights: int
    pair: float
    step: float


@functools.cache
def encoder_cost(name: str, side: int) -> Cost | None:
    """From the encoder's sizes; None where its configuration must be downloaded first. Counts products of matrices."""
    try:
        encoder = encoder_for(name, side, pretrained=False, device="meta")
    except (RuntimeError, OSError):
        return None
    pixels = torch.empty(1, *encoder.preprocess(Image.new("RGB", (side, side))).shape, device="meta")
    rows, columns = encoder.patch_grid(pixels)
    others = 1 + getattr(getattr(encoder.model, "config", None), "num_register_tokens", 0)
    tokens, w, d, layers = rows * columns + others, encoder.width, encoder.output_dim, encoder.layers
    conv = next(module for module in encoder.tower.root.modules() if isinstance(module, nn.Conv2d))
    mlp = sum(p.numel() for p in encoder.tower.blocks[0].mlp.parameters() if p.ndim == 2)
    block = tokens * (4 * w * w + mlp) + 2 * tokens**2 * w
    last = tokens * 2 * w * w + 2 * w * w + mlp + 2 * tokens * w  # for the class token alone
    mapped = (layers + 2) * w * d * (encoder.tower.projection()[0] is not None)
    flops = 2 * (rows * columns * conv.weight.numel() + (layers - 1) * block + last + mapped)
    heads, k = layers * encoder.heads, encoder.head_width + 2
    moments = 8 * (heads * k * (k + 1) + (layers + 2) * d * (d + 1))
    weights = 4 * sum(p.numel() for p in encoder.model.parameters())
    components = heads * encoder.head_width + layers * d
    return Cost(
        float(flops), 4 * (heads * k + (layers + 1) * d), 4 * d, moments, weights, 2.0 * heads * k, 4.0 * components * d
    )


def speeds_of_card(name: str) -> dict[str, float]:
    """Operations a second that tracing sustained on a card of book/measured/gpu.csv, by precision.

    Raises ParameterError for a card that is not there.
    """
    facts = json.loads((project_root() / "book/measured/gpu.json").read_text())
    if name.lower() not in facts["card"].lower().split():
        raise ParameterError(f"no card {name!r} was measured, only {facts['card']}; give --tflops")
    rows = measured("gpu").query("what == 'tracing' and variant == 'traced' and encoder == 'ViT-L/14'")
    return (rows.set_index("precision")["share_of_peak"] * facts["bf16_tflops"] * 1e12).to_dict()


def job_cost(job: Extraction) -> dict[str, Any]:
    """Images, operations and bytes of an extraction; None where they are not known without the data."""
    cost, count = encoder_cost(*_as_read(job)), job.count()
    row = {"what": "extraction", "encoder": job.encoder, "set": job.dataset, "precision": job.precision}
    row |= {"job": job.name, "images": count, "flops": None, "bytes": None}
    if count is not None and cost is not None:
        row |= {"flops": count * cost.flops}
        row["bytes"] = count * (cost.coordinates * job.coordinates + cost.outputs) + -(-count // SHARD) * cost.moments
    return row | {"done": (project_root() / "_build/units/jobs" / job.name).is_file()}


def _as_read(job: Extraction) -> tuple[str, int]:
    """The name of a job's encoder, and the side of its images where that is the job's choice."""
    name = tower_name(job.encoder)
    return name, job.size if name == SHIPPED else SHIPPED_SIDE  # others read all sizes alike, and are built once


def analysis(chapter: str, profile: Path) -> list[dict[str, Any]]:
    """What a chapter does with stored units that grows: TwoNN of all pairs of images, and trainings, at most."""
    p, rows = chapter_parameters(chapter, profile), []
    named = (*p.get("encoders", ()), *p.get("controls", ()))
    pairs = [(name, task, p.get("seeds", 1)) for name, task in product(named, p.get("tasks", ()))]
    pairs += [(name, task, 1) for name in p.get("without_text", ()) for task in every_third(p["tasks"])]
    every = extractions(chapter, p)
    work = [("TwoNN", job, 1) for job in every] if chapter == "dimension" else [
        ("trainings", find_extraction(every, name, split_task(task)[0], "train"), METHODS[chapter] * EPOCHS * seeds)
        for name, task, seeds in pairs if chapter in METHODS
    ]  # fmt: skip
    done = (project_root() / f"_build/runs/{profile.stem}/{chapter}.ipynb").is_file()
    for what, job, times in work:
        cost, count = encoder_cost(*_as_read(job)), job.count()
        if cost is not None and count is not None:
            flops = count**2 * cost.pair if what == "TwoNN" else times * count * cost.step
            row = {"what": what, "encoder": job.encoder, "set": "", "precision": "float32"}
            rows.append(row | {"flops": flops, "done": done})
    return rows


def plan(profile: Path, speeds: Mapping[str, float]) -> dict[str, Any]:
    """Every job with what it costs, and downloads. speeds: operations a second, by precision; hours need them."""
    wanted = jobs(profile)
    rows = [*map(job_cost, wanted), *(row for chapter in chapters() for row in analysis(chapter, profile))]
    for row in rows:
        speed = speeds.get(row["precision"])
        row["hours"] = row["flops"] / speed / 3600 if speed and row["flops"] is not None else None
    sizes = {job.encoder: encoder_cost(*_as_read(job)) for job in wanted}
    return {"jobs": rows, "downloads": downloads(wanted, {name: cost and cost.weights for name, cost in sizes.items()})}


def shown(result: dict[str, Any], at: str) -> str:
    """The plan as a reader sees it, with sums for each encoder and set. at: how speed is known."""
    numbers = ["images", "PFLOP", "hours", "GB"]
    rows = pd.DataFrame(result["jobs"]).astype(dict.fromkeys(("images", "flops", "hours", "bytes"), float))
    rows = rows.assign(PFLOP=rows["flops"] / 1e15, GB=rows["bytes"] / 1e9)
    jobs, left = rows[rows["what"] == "extraction"], rows[~rows["done"]]
    table = left.groupby(["what", "encoder", "set"], sort=False)[numbers].sum(min_count=1).reset_index()
    sums = left.groupby("what", sort=False)[numbers].sum(min_count=1).reset_index()
    items = pd.DataFrame.from_dict(result["downloads"], orient="index", columns=["bytes", "kept", "gated", "there"])
    items[["bytes", "kept"]] = items[["bytes", "kept"]].astype(float) / 1e9
    kept, free = items.loc[~items["there"].astype(bool), "kept"].sum(), shutil.disk_usage(project_root()).free / 1e9
    need, unknown = left["GB"].sum() + kept, jobs["flops"].isna().sum()
    told = {
        "index": False,
        "na_rep": "",
        "float_format": lambda value: "< 0.01" if 0 < value < 0.01 else f"{value:,.2f}",
    }
    return "\n".join([
        table.to_string(**told), f"\nto do, {at}:", sums.to_string(**told), "",
        f"downloads, in GB:\n{items.to_string(**told | {'index': True})}\n" if len(items) else "no downloads",
        f"{len(jobs)} extractions, {jobs['done'].sum()} of them there, {unknown} of unknown size",
        f"disk: {'at least ' * bool(unknown)}{need:,.1f} GB, of which {kept:,.1f} of downloads, with sets twice; "
        f"free here {free:,.1f} GB" + ("" if unknown and need < free else ": it fits" if need < free else
                                       f": IT DOES NOT FIT, {need - free:,.0f} GB more are needed"),
        "Not counted: decoding images, fine-tuning, figures and tables.",
    ])  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m edition.plan", description=__doc__.split("\n")[0])
    parser.add_argument("profile", help="a file, or the name of one in profiles/")
    parser.add_argument("--gpu", help="for hours: a card that was measured, such as h100")
    parser.add_argument("--tflops", type=float, help="for hours: what another device sustains")
    parser.add_argument("--json", action="store_true", help="for machines: every extraction")
    parser.add_argument("--download", action="store_true", help="fetch what jobs need, for machines without a network")
    args = parser.parse_args(arguments)
    try:
        path = find_profile(args.profile)
        if args.download:
            fetch(jobs(path))
            return 0
        speeds, at = {}, "without hours, as neither --gpu nor --tflops is given"
        if args.gpu:
            speeds, at = speeds_of_card(args.gpu), f"at what tracing ViT-L/14 sustained on a card {args.gpu}"
        if args.tflops:
            speeds, at = dict.fromkeys(DTYPES, args.tflops * 1e12), f"at {args.tflops:g} TFLOP/s"
        result = plan(path, speeds)
        print(json.dumps(result, indent=2) if args.json else shown(result, at))
    except (ParameterError, OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
