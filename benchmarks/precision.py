"""What half precision costs the analysis, and gains: `OMP_NUM_THREADS=1 python benchmarks/precision.py [NAME ...]`.

An encoder by autocast to bfloat16 and float16 against itself in single precision, on 1,000 images. Columns:
relative error of the units, and of the eigenvalues of heads' PCA; cosine of their first components; the mean and
largest relative differences of the heads' TwoNN dimension, beside its own standard error; and how many times as fast
the extraction was.
"""

from __future__ import annotations

import sys
import tempfile
import time

import torch

from residual import extract, load_dataset, load_encoder
from residual.heads import head_dimensions

PRECISIONS = ("float32", "bfloat16", "float16")


def measure(name: str, root: str) -> None:
    exact = None
    encoder, data = load_encoder(name), load_dataset("reference", "test").head(1000)
    extract(encoder, data.head(64), root=root, progress=False)  # what is done once is not timed
    for precision in PRECISIONS:
        start = time.perf_counter()
        units = extract(encoder, data, root=root, coordinates="float32", precision=precision, progress=False)
        seconds = time.perf_counter() - start
        heads = range(encoder.layers), range(encoder.heads)
        samples = torch.stack([torch.stack([units.head_outputs(i, j) for j in heads[1]]) for i in heads[0]])
        pca, dimensions = units.head_pca(), head_dimensions(units, progress=False)
        if exact is None:
            exact, single = (samples, pca, dimensions), seconds
            continue
        error = ((samples - exact[0]).norm() / exact[0].norm()).item()
        values = ((pca.eigenvalues - exact[1].eigenvalues).norm() / exact[1].eigenvalues.norm()).item()
        cosines = (pca.components[..., 0, :] * exact[1].components[..., 0, :]).sum(-1).abs()
        change = (dimensions["twonn_id"] / exact[2]["twonn_id"] - 1).abs()
        own = (exact[2]["twonn_id_error"] / exact[2]["twonn_id"]).mean()
        print(
            f"{name:14} {precision:9} units {error:.1e}  eigenvalues {values:.1e}  first components "
            f"{cosines.min():.5f} at least  TwoNN {change.mean():.1%}, at most {change.max():.1%} "
            f"(standard error {own:.1%})  {single / seconds:.1f} times as fast",
            flush=True,
        )


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        for name in sys.argv[1:] or ("mini-openclip", "mini-clip", "mini-dinov2"):
            measure(name, root)


if __name__ == "__main__":
    main()
