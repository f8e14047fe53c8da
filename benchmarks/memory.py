"""Peak memory against the number of images: `python benchmarks/memory.py --table book/measured/memory.csv`.

Of TwoNN, ours and torch.cdist, of an extraction, of moments alone and with coordinates, and of a chapter. Each runs in
a process of its own; what is kept is the rise of the peak above the data, in MB, and the time. The paper's 80,000
images are tried our way alone: `torch.cdist` would take 50 GB.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from edition.pages import project_root
from residual import extract, load_encoder
from residual.data.dataset import Dataset
from residual.dimension import two_nn

SIZES = {
    "TwoNN of a head": (5000, 10000, 20000, 80000),
    "torch.cdist": (5000, 10000, 20000),
    "extraction of moments": (1000, 2000, 4000, 8000, 16000),
    "extraction of coordinates": (1000, 2000, 4000, 8000, 16000),
    "Residual dimensionality": (1000, 2000, 4000, 8000),
}


def peak() -> float:
    """Peak resident memory of this process, or of one that it has started and that has ended, in MB."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


def distances(x: torch.Tensor) -> None:
    torch.cdist(x, x).topk(3, largest=False)


def extraction(coordinates: str | None, images: torch.Tensor) -> None:
    labels = torch.zeros(len(images), dtype=torch.long)
    data = Dataset("noise", "train", images, labels, ("noise", "other"), ("{}",))
    with tempfile.TemporaryDirectory() as root:
        extract(load_encoder("mini-openclip"), data, root=root, coordinates=coordinates, progress=False)


def chapter(n: int) -> None:
    """The chapter *Residual dimensionality* with n images, from nothing: it draws, extracts and analyses them."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("_toc.yml", "_config.yml", "book", "profiles", "lib", "constraints.txt"):
            Path(folder, name).symlink_to(project_root() / name)
        command = [sys.executable, "-m", "edition.run", "dimension", "--cells", "cells", "-p", "dataset", "random"]
        command += ["-p", "encoders", "[mini-openclip]", "-p", "images", str(n)]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)


def measure(what: str, n: int) -> tuple[float, float]:
    """The rise of the peak in MB, and seconds."""
    generator = torch.Generator().manual_seed(0)
    if what == "Residual dimensionality":
        x, run = torch.zeros(n), lambda images: chapter(len(images))
    elif what.startswith("extraction"):
        x = torch.randint(256, (n, 3, 48, 48), dtype=torch.uint8, generator=generator)
        run = partial(extraction, "float32" if what.endswith("coordinates") else None)
    else:
        x = torch.randn(n, 768 if what == "torch.cdist" else 66, generator=generator)
        run = distances if what == "torch.cdist" else two_nn
    run(x[:300])  # libraries load before the count starts
    before, start = peak(), time.monotonic()
    run(x)
    return peak() - before, time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", type=Path, help="a CSV file for the numbers")
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "N"), help="measure one, in this process")
    args = parser.parse_args()
    if args.one:
        print(*measure(args.one[0], int(args.one[1])))
        return
    rows = []
    for what, sizes in SIZES.items():
        for n in sizes:
            command = [sys.executable, __file__, "--one", what, str(n)]
            mb, seconds = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
            print(f"{mb:8.0f} MB  {seconds:6.1f} s  n = {n:6,}  {what}", flush=True)
            rows.append((what, n, mb, seconds))
    if args.table:
        table = pd.DataFrame(rows, columns=["what", "images", "mb", "seconds"])
        table.to_csv(args.table, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
