"""Peak memory of TwoNN against torch.cdist: `python benchmarks/memory.py`.

Each way runs in a process of its own; what is printed is the rise of the peak above the data, and the time. The paper's
80,000 images are tried our way alone: the naive one would take 50 GB.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import torch

from residual.dimension import two_nn


def peak() -> float:
    """Peak resident memory in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    if len(sys.argv) == 3:
        way, n = sys.argv[1], int(sys.argv[2])
        x = torch.randn(n, 66 if way == "ours" else 768, generator=torch.Generator().manual_seed(0))
        torch.cdist(x[:2000], x[:2000]), two_nn(x[:2000])  # libraries load before the count starts
        before, start = peak(), time.monotonic()
        if way == "ours":
            two_nn(x)
        else:
            torch.cdist(x, x).topk(3, largest=False)
        print(f"{peak() - before:8.0f} MB  {time.monotonic() - start:6.1f} s  {way:5s}  n = {n}")
        return
    for n in (5000, 10000, 20000):
        for way in ("ours", "naive"):
            subprocess.run([sys.executable, __file__, way, str(n)], check=True)
    subprocess.run([sys.executable, __file__, "ours", "80000"], check=True)


if __name__ == "__main__":
    main()
