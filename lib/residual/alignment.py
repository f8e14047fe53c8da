"""Aligning image encodings with class encodings by training a little on top of a frozen encoder.

All but full fine-tuning trains on stored coordinates: the encoder sees each image once, and a step is two
products with the fixed components.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from residual.encoders import Encoder
from residual.store import StoredUnits, tensors_checksum, write_tensors
from residual.training import FineTuned, Fit, find_rate, fit, parameter_count, transformed
from residual.units import Units, frames, trace, unit_labels

__all__ = [
    "AlignedEncoder", "Bases", "FineTuned", "Fit", "LinearAligner", "ResiDual", "coordinates", "find_rate", "fit",
    "parameter_count", "reference_bases", "transformed",
]  # fmt: skip

CUT = 0.9  # of the variance, for RD*

KINDS = ("RD", "RD*", "RD_Y", "O")
TENSORS = ("components", "unit", "means", "variances")  # of Bases


@dataclass(frozen=True)
class Bases:
    """Principal components and means of units on a reference set: what ResiDual scales (Eq. 6 and 7).

    components: of all units, one below the other; `unit` tells whose each is, an index into `labels`.
    kind: "RD" all heads and MLPs, X0 added unchanged; "RD*" heads alone, components for 90 % of the
    variance, all else dropped; "RD_Y" the output; "O" heads alone, one scale for each, means kept.
    """

    kind: str
    components: Float[Tensor, "k d"]
    unit: Int64[Tensor, "k"]
    means: Float[Tensor, "u d"]
    labels: tuple[str, ...]
    variances: Float[Tensor, "k"]  # on the reference set
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Columns of `coordinates`: one for each component, and for RD the d of X0."""
        return len(self.components) + (self.components.shape[1] if self.kind == "RD" else 0)

    @property
    def scales(self) -> int:
        """Trainable parameters of ResiDual."""
        return len(self.labels) if self.kind == "O" else len(self.components)


def reference_bases(reference: StoredUnits, kind: str = "RD") -> Bases:
    """Bases from the moments of a reference set.

    A head has min(dh, d) components, as the paper counts them: of its dh + 2 coordinates the two
    directions with the least variance are left out (for "O", none is). Raises ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {list(KINDS)}, not {kind!r}")
    manifest = reference.manifest
    names = unit_labels(manifest.layers, manifest.heads)
    parts: list[tuple[str, Tensor, Tensor, Tensor]] = []  # label, components, variances, mean
    if kind == "RD_Y":
        output = reference.output_pca()
        parts.append(("Y", output.components, output.eigenvalues, output.mean))
    else:
        heads = reference.head_pca()
        rows = heads.components.shape[-2]
        most = rows if kind == "O" else min(rows, reference.frames.heads.shape[-2] - 2)
        for layer, head in product(range(manifest.layers), range(manifest.heads)):
            variances = heads.eigenvalues[layer, head, :most]
            if kind == "RD*":
                share = heads.explained_variance_ratio[layer, head, :most].cumsum(0)
                variances = variances[: int((share < CUT - 1e-12).sum()) + 1]
            components = heads.components[layer, head, : len(variances)]
            parts.append((f"L{layer}.H{head}", components, variances, heads.mean[layer, head]))
    if kind == "RD":
        blocks = reference.block_pca()
        for layer in range(manifest.layers):
            own = blocks.components[layer + 1], blocks.eigenvalues[layer + 1], blocks.mean[layer + 1]
            parts.append((f"L{layer}.MLP", *own))
    labels = tuple(label for label, *_ in parts)
    assert set(labels) <= {*names, "Y"}
    unit = torch.cat([torch.full((len(c),), i) for i, (_, c, _, _) in enumerate(parts)])
    facts = manifest.model_dump(
        include={"encoder", "weights_hash", "precision", "dataset", "split", "dataset_hash", "count"}
    )
    return Bases(
        kind,
        torch.cat([c for _, c, _, _ in parts]).float(),
        unit,
        torch.stack([mean for *_, mean in parts]).float(),
        labels,
        torch.cat([v for _, _, v, _ in parts]).float(),
        {name: str(value) for name, value in facts.items()},
    )


def coordinates(units: StoredUnits, bases: Bases, folder: Path | str | None = None) -> Tensor:
    """Every image along the components of its units [n k], less the reference mean, for `ResiDual.forward`.

    For "RD", X0 follows in d columns more. In single precision in memory, or with `folder` in half precision in
    a file mapped into memory, whose name tells units and bases, and which is made shard by shard if it is not there.
    Raises ValueError if units and bases are of different encoders, and where half precision overflows.
    """
    if units.manifest.weights_hash != bases.provenance["weights_hash"]:
        raise ValueError(
            f"units are of {units.manifest.encoder}, bases of {bases.provenance['encoder']}: their weights differ"
        )
    shape = (units.manifest.count, bases.width)
    if folder is None:
        made = torch.empty(shape)
        _fill(units, bases, made)
        return made
    path = Path(folder) / f"{_origin(units, bases)}.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        mapped = np.lib.format.open_memmap(partial, "w+", np.float16, shape)
        with partial.open("r+b") as file:  # a full disk is an error here, and not a crash when pages are written
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        _fill(units, bases, torch.from_numpy(mapped))
        mapped.flush()
        partial.replace(path)
    mapped = np.load(path, mmap_mode="c", allow_pickle=False)
    if mapped.shape != shape or mapped.dtype != np.float16:
        raise ValueError(f"{path} holds {mapped.dtype} {list(mapped.shape)}, not float16 {list(shape)}; delete it")
    return torch.from_numpy(mapped)


def _origin(units: StoredUnits, bases: Bases) -> str:
    """Changes with the units, whose manifest is sealed over the checksum of every shard, and with the bases."""
    digest = hashlib.sha256(repr((units.manifest.sealed().seal, bases.kind, bases.labels)).encode())
    digest.update(tensors_checksum({name: getattr(bases, name) for name in TENSORS}).encode())
    return digest.hexdigest()[:16]


def _fill(units: StoredUnits, bases: Bases, made: Tensor) -> None:
    components = {label: bases.components[bases.unit == i].double() for i, label in enumerate(bases.labels)}
    means = dict(zip(bases.labels, bases.means.double(), strict=True))
    start = 0
    for shard in units.shards():
        stop, column = start + len(shard["outputs"]), 0
        for label, own in components.items():
            target = made[start:stop, column : column + len(own)]
            target.copy_(_along(shard, units, label, own, means[label]))
            column += len(own)
        if bases.kind == "RD":
            made[start:stop, column:].copy_(shard["blocks"][0])
        if not made[start:stop].isfinite().all():
            raise ValueError(f"coordinates {start} to {stop - 1} of {units.manifest.dataset} overflow {made.dtype}")
        start = stop


def _along(shard: dict[str, Tensor], units: StoredUnits, label: str, components: Tensor, mean: Tensor) -> Tensor:
    """One unit's samples along its components, in double precision, in which a large constant cancels."""
    if label == "Y":
        return (shard["outputs"].double() - mean) @ components.T
    layer, part = label[1:].split(".")
    if part == "MLP":
        return (shard["blocks"][int(layer) + 1].double() - mean) @ components.T
    at = int(layer), int(part[1:])
    frame, constant = units.frames.heads[at].double(), units.frames.heads_constant.double()
    return shard["heads"][at].double() @ (frame @ components.T) + (constant - mean) @ components.T


class LinearAligner(nn.Linear):
    """The paper's Lin: a map of the output onto itself, the identity before training. d^2 + d parameters."""

    def __init__(self, dimension: int) -> None:
        super().__init__(dimension, dimension)
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)


class ResiDual(nn.Module):
    """Scales every principal component of every residual unit (Eq. 6 and 7); all scales are 1 at first.

    As in Eq. 6 the means that were taken off are not added back. Source: section 4.2; for "O", section 4.1.
    """

    def __init__(self, bases: Bases) -> None:
        super().__init__()
        self.bases = bases
        self.scales = nn.Parameter(torch.ones(bases.scales))
        self.register_buffer("components", bases.components, persistent=False)
        tied = bases.kind == "O"
        self.register_buffer("unit", bases.unit if tied else None, persistent=False)
        self.register_buffer("means", bases.means if tied else None, persistent=False)

    def forward(self, coordinates: Float[Tensor, "n w"]) -> Float[Tensor, "n d"]:
        """The transformed output, from what `coordinates` gives."""
        count = len(self.components)
        scales = self.scales if self.unit is None else self.scales[self.unit]
        output = (coordinates[:, :count] * scales) @ self.components
        if self.means is not None:
            output = output + self.scales @ self.means
        return output if self.bases.kind != "RD" else output + coordinates[:, count:]

    def attach(self, encoder: Encoder) -> AlignedEncoder:
        """An encoder whose `encode_image` gives the transformed output.

        It traces: scales act on what units add to the output directly, and later layers must
        read the residual stream as it was, so they cannot be folded into the weights.
        Raises ValueError for an encoder with other weights than the bases'.
        """
        if encoder.weights_hash() != self.bases.provenance["weights_hash"]:
            own = self.bases.provenance
            raise ValueError(
                f"{encoder.name} in {encoder.dtype} has other weights than {own['encoder']} in {own['precision']}, "
                "of which the bases are"
            )
        fields = {name: getattr(encoder, name) for name in Encoder.__dataclass_fields__}
        return AlignedEncoder(**fields, transform=_Transform(self, encoder))

    def save(self, path: Path | str, **facts: str) -> None:
        """Scales, bases and provenance as safetensors. facts: what else to remember, such as the task."""
        tensors = {"scales": self.scales.detach()}
        tensors |= {name: getattr(self.bases, name) for name in TENSORS}
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        about = {"kind": self.bases.kind, "labels": json.dumps(self.bases.labels)}
        about |= {"provenance": json.dumps(self.bases.provenance | facts), "sha256": tensors_checksum(tensors)}
        write_tensors(Path(path), tensors, about)

    @staticmethod
    def load(path: Path | str) -> ResiDual:
        """What `save` wrote. Raises ValueError for another or a damaged file."""
        try:
            with safe_open(path, "pt") as file:
                about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about["sha256"] != tensors_checksum(tensors):
                raise ValueError("wrong checksum")
            scales = tensors.pop("scales")
            bases = Bases(
                kind=about["kind"], labels=tuple(json.loads(about["labels"])),
                provenance=json.loads(about["provenance"]), **tensors,
            )  # fmt: skip
            adapter = ResiDual(bases)
            adapter.load_state_dict({"scales": scales})
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is no ResiDual, or damaged: {error}") from error
        return adapter


class _Transform:
    """ResiDual folded with an encoder's frames: a matrix for all heads, and one for each MLP."""

    @torch.no_grad()
    def __init__(self, adapter: ResiDual, encoder: Encoder) -> None:
        bases, own = adapter.bases, frames(encoder)
        device, self.kind = encoder.device, bases.kind
        scales = adapter.scales.detach().double().to(device)
        scales = scales[bases.unit.to(device)] if bases.kind == "O" else scales
        components, unit = bases.components.double().to(device), bases.unit.to(device)
        means = bases.means.double().to(device)
        constant, heads, blocks = means.new_zeros(means.shape[1]), [], []
        for index, label in enumerate(bases.labels):
            rows = unit == index
            down, up = components[rows].T, components[rows] * scales[rows, None]
            if label.partition(".")[2].startswith("H"):
                layer, _, head = label[1:].partition(".H")
                frame = own.heads[int(layer), int(head)].double()
                constant += (own.heads_constant.double() - means[index]) @ down @ up
                heads.append((frame @ down) @ up)
            else:
                constant -= means[index] @ down @ up
                blocks.append(down @ up)
        if bases.kind == "O":
            constant += adapter.scales.detach().double().to(device) @ means
        self.constant = constant.to(own.heads)
        self.heads = torch.cat(heads).to(own.heads) if heads else None
        self.blocks = torch.stack(blocks).to(own.heads) if blocks else None

    def __call__(self, units: Units) -> Float[Tensor, "n d"]:
        if self.kind == "RD_Y":
            return units.output @ self.blocks[0] + self.constant
        output = units.coordinates.flatten(1) @ self.heads + self.constant
        if self.kind != "RD":
            return output
        return output + units.blocks[:, 0] + units.blocks[:, 1:].flatten(1) @ self.blocks.flatten(0, 1)


@dataclass(frozen=True, eq=False)
class AlignedEncoder(Encoder):
    """An encoder with a ResiDual on its units. Traced, it is the encoder that it was."""

    transform: _Transform

    def encode_image(self, pixels: Tensor) -> Float[Tensor, "n d"]:
        """Transformed outputs, not normalised. pixels: as `check_pixels` takes them."""
        return self.transform(trace(self, pixels)).to(self.dtype)
