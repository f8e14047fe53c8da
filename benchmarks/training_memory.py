"""Peak memory of training ResiDual on 50,000 images of ViT-L size, from a file: `python benchmarks/training_memory.py`.

The scores are random, and drawn in another process: 4.4 GB on disk in half precision, of
which the system keeps in memory what fits. What is printed is the peak of the training process, mapped pages included.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from residual import training
from residual.alignment import Bases, ResiDual, fit
from residual.units import residual_units

IMAGES, LAYERS, HEADS, D = 50_000, 24, 16, 768
UNITS = tuple(residual_units(LAYERS, HEADS)[1:])
SIZES = torch.tensor([64 if unit.kind == "head" else D for unit in UNITS])
WIDTH = int(SIZES.sum()) + D


def draw(path: str) -> None:
    mapped = np.lib.format.open_memmap(path, "w+", np.float16, (IMAGES, WIDTH))
    generator = np.random.default_rng(0)
    for start in range(0, IMAGES, 500):
        mapped[start : start + 500] = generator.standard_normal((500, WIDTH), dtype=np.float32)


def train(path: str) -> None:
    index, k = torch.arange(len(UNITS)).repeat_interleave(SIZES), WIDTH - D
    components = torch.randn(k, D) / D**0.5
    aligner = ResiDual(Bases("RD", UNITS, components, index, torch.zeros(len(UNITS), D), torch.ones(k)))
    scores, labels = torch.from_numpy(np.load(path, mmap_mode="c")), torch.arange(IMAGES) % 100
    classes = torch.nn.functional.normalize(torch.randn(100, D), dim=1)
    training.EPOCHS, start = 1, time.monotonic()
    fit(aligner, (scores, labels), (scores[:1000], labels[:1000]), classes, rate=1e-2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{peak:.2f} GB at most, {time.monotonic() - start:.0f} s for an epoch of {IMAGES:,} images x {k:,} components"
    )


def main() -> None:
    if len(sys.argv) == 3:
        {"draw": draw, "train": train}[sys.argv[1]](sys.argv[2])
        return
    with tempfile.TemporaryDirectory() as folder:
        for what in ("draw", "train"):
            subprocess.run([sys.executable, __file__, what, str(Path(folder) / "q.npy")], check=True)


if __name__ == "__main__":
    main()
