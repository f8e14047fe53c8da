"""What half precision costs the analysis: `python benchmarks/precision.py [NAME ...]`.

An encoder in bfloat16 and float16 against itself in single precision, on 1,000 images of the reference set. Columns:
relative error of the units, and of the eigenvalues of heads' PCA; cosine of their first components; and the mean and
largest relative differences of the heads' TwoNN dimension, beside its own standard error.
"""

from __future__ import annotations

import sys
import tempfile

import torch

from residual import extract, load_dataset, load_encoder
from residual.dimension import head_dimensions

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def measure(name: str, root: str) -> None:
    exact = None
    for dtype in DTYPES:
        encoder = load_encoder(name, dtype=dtype)
        units = extract(
            encoder, load_dataset("reference", "test").head(1000), root=root, coordinates="float32", progress=False
        )
        heads = range(encoder.layers), range(encoder.heads)
        samples = torch.stack([torch.stack([units.head_outputs(i, j) for j in heads[1]]) for i in heads[0]])
        pca, dimensions = units.head_pca(), head_dimensions(units, progress=False)
        if exact is None:
            exact = samples, pca, dimensions
            continue
        error = ((samples - exact[0]).norm() / exact[0].norm()).item()
        values = ((pca.eigenvalues - exact[1].eigenvalues).norm() / exact[1].eigenvalues.norm()).item()
        cosines = (pca.components[..., 0, :] * exact[1].components[..., 0, :]).sum(-1).abs()
        change = (dimensions["twonn_id"] / exact[2]["twonn_id"] - 1).abs()
        own = (exact[2]["twonn_id_error"] / exact[2]["twonn_id"]).mean()
        print(
            f"{name:14} {dtype!s:15} units {error:.1e}  eigenvalues {values:.1e}  first components {cosines.min():.5f} "
            f"at least  TwoNN {change.mean():.1%}, at most {change.max():.1%} (standard error {own:.1%})",
            flush=True,
        )


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        for name in sys.argv[1:] or ("mini-openclip", "mini-clip", "mini-dinov2"):
            measure(name, root)


if __name__ == "__main__":
    main()
