"""How exactly the units sum to the output: `python benchmarks/accuracy.py [NAME ...]`.

Random weights, with biases, LayerNorms and layer scales drawn at random too; two images. Columns:
sum of units against the traced output; traced against untraced output; and, in half precision,
traced output against the traced output in single precision.
"""

from __future__ import annotations

import sys

import torch

from residual import load_encoder, trace

NAMES = [f"{family}-{size}" for size in "BL" for family in ("OpenCLIP", "CLIP", "BLIP", "DINOv2", "ViT")]


def build(name: str, dtype: torch.dtype):
    encoder = load_encoder(name, pretrained=False, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.model.parameters():
        if parameter.ndim == 1:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return encoder


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def main() -> None:
    for name in sys.argv[1:] or NAMES:
        exact = None
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            encoder = build(name, dtype)
            side = 224 if encoder.tower.smallest else encoder.tower.image_size[0]
            pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
            units = trace(encoder, pixels)
            exact = units.output if exact is None else exact
            summed, traced = error(units.total(), units.output), error(units.output, encoder.encode_image(pixels))
            print(f"{name:12} {dtype!s:15} {summed:.1e} {traced:.1e} {error(units.output, exact):.1e}", flush=True)


if __name__ == "__main__":
    main()
