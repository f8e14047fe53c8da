"""Peak memory against the number of images: `python benchmarks/memory.py --table book/measured/memory.csv`.

Of TwoNN, ours and torch.cdist, of an extraction, of moments alone and with coordinates, and of a chapter. Each runs in
a process of its own; what is kept is the rise of the peak above the data, in MB, and the time. The paper's 80,000
images are tried our way alone: `torch.cdist` would take 50 GB.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from edition.pages import project_root
from residual import extract, load_encoder
from residual.data.dataset import Dataset
from residual.dimension import two_nn

CHAPTER = "the chapter Residual dimensionality"
SIZES = {
    "TwoNN of a head": (5000, 10000, 20000, 80000),
    "torch.cdist": (5000, 10000, 20000),
    "extraction of moments": (1000, 2000, 4000, 8000, 16000),
    "extraction of coordinates": (1000, 2000, 4000, 8000, 16000),
    CHAPTER: (1000, 2000, 4000, 8000),
}


def peak() -> float:
    """The larger of the peaks of this process and of those that it started and that have ended, in resident MB."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


def distances(x: torch.Tensor) -> None:
    torch.cdist(x, x).topk(3, largest=False)


def extraction(images: torch.Tensor, coordinates: str | None) -> None:
    labels = torch.zeros(len(images), dtype=torch.long)
    data = Dataset("noise", "train", images, labels, ("noise", "other"), ("{}",))
    with tempfile.TemporaryDirectory() as root:
        extract(load_encoder("mini-openclip"), data, root=root, coordinates=coordinates, progress=False)


def chapter(images: Path, count: int) -> None:
    """Run the chapter with so many images of a folder, in a project where nothing is extracted yet."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("_toc.yml", "_config.yml", "book", "profiles", "lib", "constraints.txt"):
            Path(folder, name).symlink_to(project_root() / name)
        command = [sys.executable, "-m", "edition.run", "dimension", "--book", "-p", "dataset", str(images)]
        command += ["-p", "encoders", "[mini-openclip]", "-p", "images", str(count)]
        own = os.environ | {"HF_HOME": f"{folder}/hf", "RESIDUAL_CACHE": f"{folder}/cache"}
        subprocess.run(command, cwd=folder, env=own, check=True, stdout=subprocess.DEVNULL)


def prepared(what: str, n: int, folder: Path) -> Callable[[int], None]:
    """A function that does it with the first so many of n images; the folder is for images as files."""
    generator = torch.Generator().manual_seed(0)
    if what in ("TwoNN of a head", "torch.cdist"):
        x = torch.randn(n, 768 if what == "torch.cdist" else 66, generator=generator)
        return lambda count: (distances if what == "torch.cdist" else two_nn)(x[:count])
    images = torch.randint(256, (n, 3, 48, 48), dtype=torch.uint8, generator=generator)
    if what != CHAPTER:
        coordinates = "float32" if what.endswith("coordinates") else None
        return lambda count: extraction(images[:count], coordinates)
    for index, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        path = folder / f"train/class {index % 2}/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return lambda count: chapter(folder, count)


def measure(what: str, n: int) -> tuple[float, float]:
    """The rise of the peak in MB, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepared(what, n, Path(folder))
        run(300)  # libraries load before the count starts
        before, start = peak(), time.monotonic()
        run(n)
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
            mb, seconds = map(
                float, subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
            )
            print(f"{mb:8.0f} MB  {seconds:6.1f} s  n = {n:6,}  {what}", flush=True)
            rows.append((what, n, mb, seconds))
    if args.table:
        table = pd.DataFrame(rows, columns=["what", "images", "mb", "seconds"])
        table.to_csv(args.table, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
