"""Tracing: one forward pass, and with it every residual unit of the pooled token (Eq. 1).

While an encoder is traced, each block runs a forward of ours, which calls the same modules and keeps what attention
hands to its output projection. The last block computes the class token only, as nothing else of it is read. Your
own hooks fire on blocks, norms, MLPs and output projections, but not on attention modules, which are not called.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor, nn

from residual.encoders.encoder import Encoder
from residual.encoders.towers import Block

TRACING = threading.RLock()  # one thread at a time; a thread may trace inside its own trace


@dataclass(frozen=True)
class Unit:
    """A term of Eq. 1: the embedding X0, a head or an MLP; or the output Y, their sum.

    Labels are "X0", "L3.H5", "L3.MLP" and "Y".
    """

    kind: Literal["X0", "head", "MLP", "Y"]
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        part = f"H{self.head}" if self.kind == "head" else self.kind
        return part if self.layer is None else f"L{self.layer}.{part}"

    @staticmethod
    def parse(label: str) -> Unit:
        """The unit with this label. Raises KeyError where there is none."""
        if label in ("X0", "Y"):
            return Unit(label)
        if not (match := re.fullmatch(r"L(\d+)\.(?:H(\d+)|MLP)", label)):
            raise KeyError(f"no unit {label!r}; units are 'X0', 'L0.H0', ..., 'L0.MLP', ... and 'Y'")
        layer, head = match.groups()
        return Unit("MLP", int(layer)) if head is None else Unit("head", int(layer), int(head))

    @property
    def block(self) -> int:
        """The place of X0 (0) or of the MLP of layer l (l + 1) in `Units.blocks`."""
        return 0 if self.layer is None else self.layer + 1


def residual_units(layers: int, heads: int) -> list[Unit]:
    """The terms of Eq. 1, in the order of the residual stream."""
    of_layer = [[*(Unit("head", i, j) for j in range(heads)), Unit("MLP", i)] for i in range(layers)]
    return [Unit("X0"), *(unit for units in of_layer for unit in units)]


@dataclass(frozen=True)
class Frames:
    """The affine maps from a head's coordinates to its unit, which depend on the weights alone (appendix A.1).

    Coordinates are [z/s, 1/s, m/s] in R^k, k = head width + 2; the unit is coordinates @ frame + constant.
    """

    head_frames: Float[Tensor, "l h k d"]
    head_constant: Float[Tensor, "d"]

    def head_unit(self, layer: int, head: int, coordinates: Float[Tensor, "n k"]) -> Float64[Tensor, "n d"]:
        """A head in output space, in double precision: it may be a small variation on a large constant."""
        return coordinates.double() @ self.head_frames[layer, head].double() + self.head_constant.double()

    def head_projection(
        self, layer: int, head: int, components: Float64[Tensor, "c d"], mean: Float64[Tensor, "d"]
    ) -> tuple[Float64[Tensor, "k c"], Float64[Tensor, "c"]]:
        """The map (matrix, offset) from a head's coordinates to its scores, (unit - mean) @ components.T."""
        matrix = self.head_frames[layer, head].double() @ components.mT
        return matrix, (self.head_constant.double() - mean) @ components.mT


@dataclass(frozen=True)
class Units:
    """All residual units of a batch, at least in single precision.

    head_coordinates: see Frames. blocks: X0 and the MLPs in output space. output: the model's own.
    """

    head_coordinates: Float[Tensor, "n l h k"]
    blocks: Float[Tensor, "n l+1 d"]
    output: Float[Tensor, "n d"]
    frames: Frames

    @property
    def labels(self) -> list[str]:
        """ "X0", then "L0.H0", ..., "L0.MLP", "L1.H0", ... in the order of the residual stream."""
        return [str(unit) for unit in residual_units(*self.head_coordinates.shape[1:3])]

    def __getitem__(self, label: str) -> Float[Tensor, "n d"]:
        """One unit in output space. Raises KeyError for an unknown label."""
        unit, known = Unit.parse(label), self.labels
        if label not in known:
            raise KeyError(f"no unit {label!r}; units are 'X0', 'L0.H0', ..., {known[-2]!r}, {known[-1]!r}")
        if unit.kind != "head":
            return self.blocks[:, unit.block]
        samples = self.frames.head_unit(unit.layer, unit.head, self.head_coordinates[:, unit.layer, unit.head])
        return samples.to(self.output.dtype)

    def total(self) -> Float[Tensor, "n d"]:
        """The sum of all units, which is the output (Eq. 1)."""
        count = self.head_coordinates[0, :, :, 0].numel()
        heads = self.head_coordinates.flatten(1) @ self.frames.head_frames.flatten(0, 2)
        return heads + count * self.frames.head_constant + self.blocks.sum(1)


@dataclass
class _Record:
    """What one block leaves behind for the pooled token."""

    start: Tensor | None = None  # the residual stream before the block, [n w]
    heads: Tensor | None = None  # attention before its output projection, [n h*dh]
    mlp: Tensor | None = None  # what the MLP adds, [n w]
    end: Tensor | None = None  # the residual stream after the block, [n w]
    watched: int | None = None  # the head whose tokens are kept
    tokens: Tensor | None = None  # what each token adds to this head, [n p dh]


@torch.no_grad()
def trace(encoder: Encoder, pixels: Tensor) -> Units:
    """Every unit of the pooled token, for one batch in memory.

    pixels: as `Encoder.check_pixels` takes them. The model is left as it was, even after an error.
    In single precision the units sum to the output to a few 1e-6, in float16 to about 1e-3 and in bfloat16 to 1e-2,
    which is the rounding of these formats (`benchmarks/accuracy.py`).
    Raises RuntimeError if the model is in training mode, or if a block did not run.
    """
    parts = [_traced(encoder, part) for part in encoder.cached_parts(_checked(encoder, pixels))]
    with torch.autocast(encoder.device.type, enabled=False):
        return Units(*map(torch.cat, zip(*parts, strict=True)), head_frames(encoder))


@torch.no_grad()
def head_tokens(encoder: Encoder, pixels: Tensor, layer: int, head: int) -> Float[Tensor, "n p d"]:
    """A head's unit as a sum over tokens: the class token, registers where there are any, then patches row by row.

    A token's part is its value times the class token's attention to it, mapped as the unit is; what does not depend on
    tokens is spread evenly. The sum over p is `trace(encoder, pixels)[f"L{layer}.H{head}"]`, to rounding.
    Errors as `trace`, and KeyError where there is no such head. Source: the decomposition over tokens of Gandelsman et
    al. (2024), section 3.1, on the units of Eq. 1.
    """
    if not (0 <= layer < encoder.layers and 0 <= head < encoder.heads):
        raise KeyError(f"no head L{layer}.H{head}; {encoder.name} has {encoder.layers} layers of {encoder.heads} heads")
    parts = []
    for images in encoder.cached_parts(_checked(encoder, pixels)):
        coordinates, _, output, tokens = _traced(encoder, images, (layer, head))
        scalars = coordinates[:, layer, head, -2:]  # 1/s and m/s
        shared = (scalars / tokens.shape[1])[:, None].expand(-1, tokens.shape[1], -1)
        parts.append(torch.cat([tokens.to(output.dtype) * scalars[:, :1, None], shared], 2))
    with torch.autocast(encoder.device.type, enabled=False):
        frames, coordinates = head_frames(encoder), torch.cat(parts)
    constant = frames.head_constant.double() / coordinates.shape[1]
    return (coordinates.double() @ frames.head_frames[layer, head].double() + constant).to(coordinates.dtype)


def _checked(encoder: Encoder, pixels: Tensor) -> Tensor:
    if any(module.training for module in encoder.tower.root.modules()):
        raise RuntimeError(f"{encoder.name} is in training mode, where dropout breaks Eq. 1; call enc.model.eval()")
    return encoder.check_pixels(pixels)


def _traced(encoder: Encoder, pixels: Tensor, watched: tuple[int, int] | None = None) -> tuple[Tensor, ...]:
    """Coordinates of heads, blocks and output: the fields of Units that depend on the images.

    watched: layer and number of a head whose `_Record.tokens` come fourth.
    """
    with TRACING, _recording(encoder) as records:
        if watched:
            records[watched[0]].watched = watched[1]
        output = encoder.forward(pixels)
    if silent := [f"L{i}" for i, record in enumerate(records) if record.end is None]:
        raise RuntimeError(f"blocks {silent} of {encoder.name} did not run: its units would not sum to its output")
    with torch.autocast(encoder.device.type, enabled=False):
        units = _units(encoder, records, output)
    return (*units, records[watched[0]].tokens) if watched else units


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
    """Give one module another `forward`; a nested trace restores the outer one's."""
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
    masks = [*masks, *(value for key, value in options.items() if "mask" in key or key in ("k_x", "v_x"))]
    if any(mask is not None for mask in masks):
        raise RuntimeError("attention masks cannot be traced; call the encoder without them")
    if record.end is not None:
        raise RuntimeError("a block ran twice in one forward pass, which Eq. 1 does not cover")
    record.start = x[:, 0].clone()  # a view would keep every token of every layer in memory
    normed = block.norm1(x)
    x, queries = (x[:, :1], normed[:, :1]) if last else (x, normed)
    q, k, v = (part.unflatten(-1, (block.heads, -1)).transpose(1, 2) for part in block.qkv(normed, queries))
    heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    if (one := record.watched) is not None:
        attention = (q[:, one, :1] @ k[:, one].mT / q.shape[-1] ** 0.5).softmax(-1)
        record.tokens = attention.mT * v[:, one]
    x = x + block.scale1(block.out(heads))
    mlp = block.scale2(block.mlp(block.norm2(x)))
    x = x + mlp
    record.heads, record.mlp, record.end = (part[:, 0].clone() for part in (heads, mlp, x))
    return x


def _units(encoder: Encoder, records: list[_Record], output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split the records by appendix A.1: every map after a unit is linear, up to the scalars m and s of each image."""
    norm, to_output = encoder.tower.norm, _to_output(encoder)
    dtype = torch.promote_types(output.dtype, torch.float32)
    end = records[-1].end.to(dtype)
    mean = end.mean(1, keepdim=True)
    scale = (end.var(1, correction=0, keepdim=True) + norm.eps).sqrt()
    scalars = torch.cat([1 / scale, mean / scale], 1)[:, None].expand(-1, encoder.heads, -1)
    z = torch.stack([r.heads.to(dtype).unflatten(1, (encoder.heads, -1)) for r in records], 1) / scale[:, :, None, None]
    coordinates = torch.cat([z, scalars[:, None].expand(-1, len(records), -1, -1)], 3)
    parts = torch.stack([records[0].start, *(r.mlp for r in records)], 1).to(dtype)
    shift, constant = _shared_constants(encoder)
    blocks = to_output(parts / scale[:, :, None]) - (mean / scale)[:, :, None] * shift + constant
    return coordinates, blocks, output.to(dtype)


def _to_output(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    """The linear map of a scaled residual to output space: the final norm's weight, then the projection."""
    weight, _ = encoder.tower.projection()
    gamma = encoder.tower.norm.weight
    dtype = torch.promote_types(gamma.dtype, torch.float32)
    gamma = gamma.to(dtype)
    weight = None if weight is None else weight.to(dtype).T * gamma[:, None]
    return lambda x: x * gamma if weight is None else x @ weight


def _shared_constants(encoder: Encoder) -> tuple[Float[Tensor, "d"], Float[Tensor, "d"]]:
    """The share of the norm's mean, and of the constants (beta, bias), of each of N = 2 layers + 1 parts."""
    norm, to_output = encoder.tower.norm, _to_output(encoder)
    weight, bias = encoder.tower.projection()
    dtype = torch.promote_types(norm.weight.dtype, torch.float32)
    constant = norm.bias.to(dtype)
    constant = constant if weight is None else constant @ weight.to(dtype).T
    constant = constant if bias is None else constant + bias.to(dtype)
    parts = 2 * encoder.layers + 1
    return to_output(torch.ones_like(norm.weight, dtype=dtype)) / parts, constant / parts


@torch.no_grad()
def head_frames(encoder: Encoder) -> Frames:
    """The frames of all heads, from the weights."""
    to_output, heads = _to_output(encoder), encoder.heads
    shift, constant = _shared_constants(encoder)
    rows = []
    for block in encoder.tower.blocks:
        weight, bias = block.out.weight.to(shift.dtype).T, block.out.bias
        bias = weight.new_zeros(weight.shape[1]) if bias is None else bias.to(shift.dtype)
        if block.gain is not None:
            weight, bias = weight * block.gain.to(shift.dtype), bias * block.gain.to(shift.dtype)
        of_z = to_output(weight).unflatten(0, (heads, -1))
        of_scalars = torch.stack([to_output(bias), -shift]) / heads
        rows.append(torch.cat([of_z, of_scalars.expand(heads, -1, -1)], 1))
    return Frames(torch.stack(rows), constant / heads)
