"""What a plan predicts against a real run: `python benchmarks/plan.py --table book/measured/plan.csv`.

For three encoders of different size: seconds, floating-point operations and bytes of one extraction with coordinates.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edition.inputs import Extraction, encoder_for
from edition.plan import job_cost
from residual import extract, trace
from residual.extraction import pixels_for

IMAGES = {"mini-openclip": 4000, "DINOv2-S@random": 400, "OpenCLIP-B@random": 200}


def measured(job: Extraction) -> tuple[float, float, int]:
    """Seconds, operations and bytes of a job, extracted into a folder of its own."""
    data, encoder = job.data(), encoder_for(job.encoder)
    options = {"batch": job.batch, "coordinates": "float32", "progress": False}
    with tempfile.TemporaryDirectory() as root:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # of fused ones, it counts none
            extract(encoder, data.head(16), root=root, **options)
        start = time.monotonic()
        folder = extract(encoder, data, root=root, **options).folder
        seconds = time.monotonic() - start
        size = sum(file.stat().st_size for file in folder.glob("shard-*"))
    return seconds, counter.get_total_flops() / 16 * len(data), size


def speed(job: Extraction, operations: float) -> float:
    """Operations a second of tracing, the median of some passes of a few images, as `--tflops` would give them."""
    encoder, seconds = encoder_for(job.encoder), []
    pixels, *_ = encoder.cached_parts(pixels_for(encoder, job.data().images[: job.batch]))
    while len(seconds) < 3 or sum(seconds) < 1:
        start = time.monotonic()
        trace(encoder, pixels)
        seconds.append(time.monotonic() - start)
    return len(pixels) * operations / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", type=Path, help="a CSV file for the numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, count in IMAGES.items():
        job = Extraction(name, "textures", "train", count, balanced=False, coordinates=True, seed=0, batch=128)
        planned = job_cost(job)
        rate = speed(job, planned["flops"] / planned["images"])
        predicted = planned["flops"] / rate, planned["flops"], planned["bytes"]
        for what, guess, real in zip(("seconds", "operations", "bytes"), predicted, measured(job), strict=True):
            rows.append((name, count, what, guess, real))
            print(f"{name:20s} {what:12s} planned {guess:12.5g}  measured {real:12.5g}  {guess / real:.2f}", flush=True)
    if args.table:
        names = ["encoder", "images", "what", "planned", "measured"]
        pd.DataFrame(rows, columns=names).to_csv(args.table, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
