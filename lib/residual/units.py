"""Tracing: one forward pass, and with it every residual unit of the pooled token.

While an encoder is traced, its blocks run a forward of ours that calls the same
modules but keeps what attention hands to its output projection. The last block
computes the class token only: nothing else of it is read. Hooks of yours fire on blocks, norms,
MLPs and output projections, but not on the attention modules, which are not called.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from residual.encoders import Encoder
from residual.towers import Block

TRACING = threading.RLock()  # one thread at a time; a thread may trace inside its own trace


@dataclass(frozen=True)
class Frames:
    """What maps coordinates to units; a function of the weights alone.

    A head's unit is `coordinates @ heads[l, h] + heads_constant`, with coordinates
    [z/s, 1/s, m/s] in R^k, k = head width + 2.
    """

    heads: Float[Tensor, "l h k d"]
    heads_constant: Float[Tensor, "d"]


@dataclass(frozen=True)
class Units:
    """All residual units of a batch, at least in single precision (Eq. 1, appendix A.1).

    coordinates: of the heads, see Frames. blocks: X0 and the MLPs in output space.
    output: the model's own output.
    """

    coordinates: Float[Tensor, "n l h k"]
    blocks: Float[Tensor, "n l+1 d"]
    output: Float[Tensor, "n d"]
    frames: Frames

    @property
    def labels(self) -> list[str]:
        """ "X0", then "L0.H0", ..., "L0.MLP", "L1.H0", ... in the order of the residual stream."""
        return unit_labels(*self.coordinates.shape[1:3])

    def __getitem__(self, label: str) -> Float[Tensor, "n d"]:
        """One unit in output space. Raises KeyError for an unknown label."""
        if label not in self.labels:
            raise KeyError(f"no unit {label!r}; units are 'X0', 'L0.H0' ... {self.labels[-2]!r}, {self.labels[-1]!r}")
        if label == "X0":
            return self.blocks[:, 0]
        layer, part = label[1:].split(".")
        if part == "MLP":
            return self.blocks[:, int(layer) + 1]
        head = int(layer), int(part[1:])
        # A head can be a small variation on a large constant: its sum is taken in double precision.
        frame, constant = self.frames.heads[head].double(), self.frames.heads_constant.double()
        return (self.coordinates[:, *head].double() @ frame + constant).to(self.output.dtype)

    def total(self) -> Float[Tensor, "n d"]:
        """The sum of all units, which Eq. 1 says is the output."""
        frames = self.frames.heads.flatten(0, 2)
        heads = self.coordinates.flatten(1) @ frames + self.coordinates[0, :, :, 0].numel() * self.frames.heads_constant
        return heads + self.blocks.sum(1)


@dataclass
class _Record:
    """What one block leaves behind for the pooled token."""

    start: Tensor | None = None  # the residual stream before the block, [n w]
    heads: Tensor | None = None  # attention before its output projection, [n h*dh]
    mlp: Tensor | None = None  # what the MLP adds, [n w]
    end: Tensor | None = None  # the residual stream after the block, [n w]


def unit_labels(layers: int, heads: int) -> list[str]:
    """Labels of all units, in the order of the residual stream."""
    return ["X0"] + [f"L{i}.{part}" for i in range(layers) for part in [*(f"H{j}" for j in range(heads)), "MLP"]]


@torch.no_grad()
def trace(encoder: Encoder, pixels: Tensor) -> Units:
    """Every unit of the pooled token, for one batch in memory.

    pixels: as `Encoder.check_pixels` takes them. The model is left as it was, whatever happens.
    In single precision the units sum to the output to a few 1e-6, in float16 to about 1e-3 and in
    bfloat16 to 1e-2, which is those formats' own rounding (`benchmarks/accuracy.py`).
    Raises RuntimeError if the model is in training mode, or if a block did not run.
    """
    pixels = encoder.check_pixels(pixels)
    if any(module.training for module in encoder.tower.root.modules()):
        raise RuntimeError(f"{encoder.name} is in training mode, where dropout breaks Eq. 1; call enc.model.eval()")
    with TRACING, _recording(encoder) as records:
        output = encoder.tower.forward(pixels)
    if silent := [f"L{i}" for i, record in enumerate(records) if record.end is None]:
        raise RuntimeError(f"blocks {silent} of {encoder.name} did not run: its units would not sum to its output")
    with torch.autocast(encoder.device.type, enabled=False):
        return _factor(encoder, records, output)


@contextlib.contextmanager
def _recording(encoder: Encoder) -> Iterator[list[_Record]]:
    records = [_Record() for _ in encoder.tower.blocks]
    with contextlib.ExitStack() as stack:
        for index, (block, record) in enumerate(zip(encoder.tower.blocks, records, strict=True)):
            last = index == len(records) - 1
            stack.enter_context(_replaced(block.module, functools.partial(_forward, block, record, last)))
        yield records


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: object) -> Iterator[None]:
    """Give one module another `forward`; a nested trace puts back the outer one's."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _forward(block: Block, record: _Record, last: bool, x: Tensor, *masks: object, **options: object) -> Tensor:
    given = [*masks, *(value for key, value in options.items() if "mask" in key or key in ("k_x", "v_x"))]
    if any(value is not None for value in given):
        raise RuntimeError("attention masks are not traced; call the encoder without them")
    if record.end is not None:
        raise RuntimeError("a block ran twice in one forward pass, which Eq. 1 does not cover")
    record.start = x[:, 0]
    normed = block.norm1(x)
    x, queries = (x[:, :1], normed[:, :1]) if last else (x, normed)
    q, k, v = (part.unflatten(-1, (block.heads, -1)).transpose(1, 2) for part in block.qkv(normed, queries))
    heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + block.scale1(block.out(heads))
    mlp = block.scale2(block.mlp(block.norm2(x)))
    x = x + mlp
    record.heads, record.mlp, record.end = heads[:, 0], mlp[:, 0], x[:, 0]
    return x


def _factor(encoder: Encoder, records: list[_Record], output: Tensor) -> Units:
    """Split the records by the algebra of design.md: all maps after a unit are linear, up to m and s."""
    norm, project = encoder.tower.norm, _projection(encoder)
    dtype = torch.promote_types(output.dtype, torch.float32)
    end = records[-1].end.to(dtype)
    mean = end.mean(1, keepdim=True)
    scale = (end.var(1, correction=0, keepdim=True) + norm.eps).sqrt()
    scalars = torch.cat([1 / scale, mean / scale], 1)[:, None].expand(-1, encoder.heads, -1)
    z = torch.stack([r.heads.to(dtype).unflatten(1, (encoder.heads, -1)) for r in records], 1) / scale[:, :, None, None]
    coordinates = torch.cat([z, scalars[:, None].expand(-1, len(records), -1, -1)], 3)
    parts = torch.stack([records[0].start, *(r.mlp for r in records)], 1).to(dtype)
    shift, constant = shares(encoder)
    blocks = project(parts / scale[:, :, None]) - (mean / scale)[:, :, None] * shift + constant
    return Units(coordinates, blocks, output.to(dtype), frames(encoder))


def _projection(encoder: Encoder):
    """The linear map of a scaled residual to output space: the final norm's weight, then the projection."""
    weight, _ = encoder.tower.projection()
    gamma = encoder.tower.norm.weight
    dtype = torch.promote_types(gamma.dtype, torch.float32)
    gamma = gamma.to(dtype)
    weight = None if weight is None else weight.to(dtype).T * gamma[:, None]
    return lambda x: x * gamma if weight is None else x @ weight


def shares(encoder: Encoder) -> tuple[Float[Tensor, "d"], Float[Tensor, "d"]]:
    """What each of the N = 2 layers + 1 parts takes of the norm's mean and of the constants (beta, bias)."""
    norm, project = encoder.tower.norm, _projection(encoder)
    weight, bias = encoder.tower.projection()
    dtype = torch.promote_types(norm.weight.dtype, torch.float32)
    constant = norm.bias.to(dtype)
    constant = constant if weight is None else constant @ weight.to(dtype).T
    constant = constant if bias is None else constant + bias.to(dtype)
    parts = 2 * encoder.layers + 1
    return project(torch.ones_like(norm.weight, dtype=dtype)) / parts, constant / parts


@torch.no_grad()
def frames(encoder: Encoder) -> Frames:
    """The frames of all heads, from the weights."""
    project, heads = _projection(encoder), encoder.heads
    shift, constant = shares(encoder)
    rows = []
    for block in encoder.tower.blocks:
        weight, bias = block.out.weight.to(shift.dtype).T, block.out.bias
        bias = weight.new_zeros(weight.shape[1]) if bias is None else bias.to(shift.dtype)
        if block.gain is not None:
            weight, bias = weight * block.gain.to(shift.dtype), bias * block.gain.to(shift.dtype)
        own = project(weight).unflatten(0, (heads, -1))
        shared = torch.stack([project(bias), -shift]) / heads
        rows.append(torch.cat([own, shared.expand(heads, -1, -1)], 1))
    return Frames(torch.stack(rows), constant / heads)
