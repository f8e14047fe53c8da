"""Aligning image encodings with class encodings by training a little on top of a frozen encoder (section 4.2).

All but full fine-tuning trains on stored scores: the encoder sees each image once, and a step is two
products with the fixed components.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from residual.encoders.encoder import Encoder
from residual.selection import zero_shot_hits
from residual.store import StoredUnits
from residual.tensors import DamagedFileError, read_tensors, write_tensors
from residual.training import FineTuned, Fit, Inputs, Schedule, find_rate, fit, parameter_count, transformed
from residual.units import Unit, Units, head_frames, trace

__all__ = [
    "AlignedEncoder", "Bases", "FineTuned", "Fit", "LinearAligner", "ResiDual", "align", "aligner_inputs",
    "component_scores", "find_rate", "fit", "parameter_count", "reference_bases", "transformed",
]  # fmt: skip

CUT = 0.9  # of the variance, for RD*
KINDS = ("RD", "RD*", "RD_Y", "O")
SCALE = 100.0  # of cosines, where an encoder has no logit scale, as BLIP
TUNING_RATES = (1e-4, 3e-4, 1e-3)  # of full fine-tuning, of which the validation split chooses
# Of the authors' code, whose other training options are in `training_options`.
RATES = {"RD": 0.8, "RD*": 0.8, "O": 0.8, "RD_Y": 1e-3}
LINEAR_RATE, TUNING_RATE = 1e-3, 1e-5


@dataclass(frozen=True)
class Bases:
    """Principal components and means of units on a reference set, which ResiDual scales (Eq. 6 and 7).

    components: of all units, one below the other; unit_index: whose each is, an index into `units`.
    variances: along each component, on the reference set.
    kind: "RD" all heads and MLPs, X0 added unchanged; "RD*" heads alone, components for 90 % of the
    variance, all else dropped; "RD_Y" the output; "O" heads alone, one lambda for each, means kept.
    """

    kind: str
    units: tuple[Unit, ...]
    components: Float[Tensor, "k d"]
    unit_index: Int64[Tensor, "k"]
    means: Float[Tensor, "u d"]
    variances: Float[Tensor, "k"]
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Columns of `component_scores`: one for each component, and for RD the d of X0."""
        return len(self.components) + (self.components.shape[1] if self.kind == "RD" else 0)

    @property
    def lambda_count(self) -> int:
        """Trainable parameters of ResiDual."""
        return len(self.units) if self.kind == "O" else len(self.components)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("components", "unit_index", "means", "variances")}


def reference_bases(reference: StoredUnits, kind: str = "RD") -> Bases:
    """Bases from the moments of a reference set.

    A head has min(dh, d) components, as the paper counts them: of its dh + 2 coordinates the two
    directions with the least variance are left out (for "O", none is). Of a head that does not vary, RD* keeps none.
    Raises ValueError for an unknown kind, and where nothing varies.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {list(KINDS)}, not {kind!r}")
    if kind == "RD_Y":
        output = reference.output_pca()
        parts = [(Unit("Y"), output.components, output.eigenvalues, output.mean)]
    else:
        parts = [*_head_parts(reference, kind), *(_mlp_parts(reference) if kind == "RD" else ())]
    units, components, variances, means = zip(*parts, strict=True)
    if not torch.cat(variances).any():
        raise ValueError(f"no unit of {reference.manifest.encoder} varies on {reference.manifest.dataset}; take others")
    facts = {"encoder", "weights_hash", "precision", "dataset", "split", "dataset_hash", "count"}
    return Bases(
        kind,
        units,
        torch.cat(components).float(),
        torch.cat([torch.full((len(basis),), i) for i, basis in enumerate(components)]),
        torch.stack(means).float(),
        torch.cat(variances).float(),
        {name: str(value) for name, value in reference.manifest.model_dump(include=facts).items()},
    )


_Part = tuple[Unit, Tensor, Tensor, Tensor]  # a unit, its components, variances and mean


def _head_parts(reference: StoredUnits, kind: str) -> Iterator[_Part]:
    heads = reference.head_pca()
    rows = heads.components.shape[-2]
    most = rows if kind == "O" else min(rows, reference.frames.head_frames.shape[-2] - 2)
    for at in product(*map(range, reference.head_grid)):
        variances = heads.eigenvalues[at][:most]
        if kind == "RD*":
            share = heads.explained_variance_ratio[at][:most]
            variances = variances[: int(((share.cumsum(0) - share < CUT - 1e-12) & (share > 0)).sum())]
        yield Unit("head", *at), heads.components[at][: len(variances)], variances, heads.mean[at]


def _mlp_parts(reference: StoredUnits) -> Iterator[_Part]:
    blocks = reference.block_pca()
    for unit in (Unit("MLP", layer) for layer in range(reference.manifest.layers)):
        yield unit, blocks.components[unit.block], blocks.eigenvalues[unit.block], blocks.mean[unit.block]


def component_scores(units: StoredUnits, bases: Bases) -> Float[Tensor, "n w"]:
    """Every image along the components of its units, relative to the reference mean, for `ResiDual.forward`.

    For "RD", X0 follows in d more columns. Raises ValueError if units and bases are of different encoders.
    """
    if units.manifest.weights_hash != bases.provenance["weights_hash"]:
        raise ValueError(
            f"units are of {units.manifest.encoder}, bases of {bases.provenance['encoder']}: their weights differ"
        )
    components = [bases.components[bases.unit_index == i].double() for i in range(len(bases.units))]
    parts = [*zip(bases.units, components, bases.means.double(), strict=True)]
    scores, start = torch.empty(units.manifest.count, bases.width), 0
    for shard in units.shards():
        stop, column = start + len(shard["outputs"]), 0
        for unit, basis, mean in parts:
            target = scores[start:stop, column : column + len(basis)]
            target.copy_(_unit_scores(shard, units, unit, basis, mean))
            column += len(basis)
        if bases.kind == "RD":
            scores[start:stop, column:].copy_(shard["blocks"][0])
        start = stop
    return scores


def _unit_scores(shard: dict[str, Tensor], units: StoredUnits, unit: Unit, components: Tensor, mean: Tensor) -> Tensor:
    """One unit's samples along its components, in double precision, in which a large constant cancels."""
    if unit.kind == "head":
        matrix, offset = units.frames.head_projection(unit.layer, unit.head, components, mean)
        return shard["heads"][unit.layer, unit.head].double() @ matrix + offset
    samples = shard["outputs"] if unit.kind == "Y" else shard["blocks"][unit.block]
    return (samples.double() - mean) @ components.T


class LinearAligner(nn.Linear):
    """The paper's Lin: a map of the output onto itself. d^2 + d parameters.

    reading: "text" starts from the identity, "code" as PyTorch draws a linear layer, like the authors' code.
    """

    def __init__(self, dimension: int, *, reading: str = "text", seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(dimension, dimension)
        if reading == "text":
            nn.init.eye_(self.weight)
            nn.init.zeros_(self.bias)


class ResiDual(nn.Module):
    """Scales every principal component of every residual unit by a lambda (Eq. 6 and 7).

    As in Eq. 6, the means that were subtracted are not added back. Source: section 4.2; for "O", section 4.1.
    reading: lambdas are 1 before training, "text", or drawn from N(1, 1), "code", as in the authors' code.
    """

    def __init__(self, bases: Bases, *, reading: str = "text", seed: int = 0) -> None:
        super().__init__()
        self.bases = bases
        noise = torch.randn(bases.lambda_count, generator=torch.Generator().manual_seed(seed))
        self.lambdas = nn.Parameter(1 + noise if reading == "code" else torch.ones_like(noise))
        self.register_buffer("components", bases.components, persistent=False)
        tied = bases.kind == "O"
        self.register_buffer("unit_index", bases.unit_index if tied else None, persistent=False)
        self.register_buffer("means", bases.means if tied else None, persistent=False)

    def forward(self, scores: Float[Tensor, "n w"]) -> Float[Tensor, "n d"]:
        """The transformed output, from `component_scores`."""
        count = len(self.components)
        lambdas = self.lambdas if self.unit_index is None else self.lambdas[self.unit_index]
        output = (scores[:, :count] * lambdas) @ self.components
        if self.means is not None:
            output = output + self.lambdas @ self.means
        return output if self.bases.kind != "RD" else output + scores[:, count:]

    def attach(self, encoder: Encoder) -> AlignedEncoder:
        """An encoder whose `encode_image` gives the transformed output.

        It traces: lambdas act on what units add to the output directly, and later layers must
        read the residual stream as it was, so they cannot be folded into the weights.
        Raises ValueError for an encoder whose weights are not those of the bases.
        """
        if encoder.weights_hash() != self.bases.provenance["weights_hash"]:
            theirs = self.bases.provenance
            raise ValueError(
                f"{encoder.name} in {encoder.dtype} has other weights than {theirs['encoder']} in "
                f"{theirs['precision']}, from which the bases come"
            )
        fields = {name: getattr(encoder, name) for name in Encoder.__dataclass_fields__}
        return AlignedEncoder(**fields, transform=_Transform(self, encoder))

    def save(self, path: Path | str, **facts: str) -> None:
        """Lambdas, bases and provenance as safetensors. facts: what else to remember, such as the task."""
        tensors = {"lambdas": self.lambdas.detach()} | self.bases.tensors()
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        about = {"kind": self.bases.kind, "units": json.dumps([str(unit) for unit in self.bases.units])}
        write_tensors(Path(path), tensors, about | {"provenance": json.dumps(self.bases.provenance | facts)})

    @staticmethod
    def load(path: Path | str) -> ResiDual:
        """What `save` wrote. Raises ValueError for another or a damaged file."""
        try:
            tensors, about = read_tensors(Path(path))
            lambdas, units = tensors.pop("lambdas"), tuple(map(Unit.parse, json.loads(about["units"])))
            bases = Bases(about["kind"], units, provenance=json.loads(about["provenance"]), **tensors)
            adapter = ResiDual(bases)
            adapter.load_state_dict({"lambdas": lambdas})
        except (DamagedFileError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is not a ResiDual, or is damaged: {error}") from error
        return adapter


def training_options(aligner: nn.Module, encoder: Encoder, reading: str = "text") -> dict[str, Any]:
    """Options of `fit` for an aligner, in one reading of the paper.

    "text": cosines times the logit scale, a rate that is searched for, a warm-up; fine-tuning by AdamW at a rate that
    the validation split chooses and a cosine lets fall. "code", the authors' first release: inner products, fixed
    rates, no warm-up; fine-tuning in batches of 128 with gradients clipped at 1.
    """
    if reading == "text":
        tuning = {"rate": TUNING_RATES, "schedule": Schedule(cosine=True)}
        return {"scale": encoder.logit_scale or SCALE} | (tuning if isinstance(aligner, FineTuned) else {})
    if isinstance(aligner, FineTuned):
        return {"scale": None, "rate": TUNING_RATE, "schedule": Schedule(batch=128, warmup=0, clip=1.0)}
    rate = LINEAR_RATE if isinstance(aligner, LinearAligner) else RATES[aligner.bases.kind]
    return {"scale": None, "rate": rate, "schedule": Schedule(warmup=0)}


def aligner_inputs(units: StoredUnits, bases: Bases | None) -> Float[Tensor, "n w"]:
    """What an aligner takes: scores along components for ResiDual; without bases, the outputs, for Lin."""
    return units.outputs() if bases is None else component_scores(units, bases)


def align(
    aligner: nn.Module,
    encoder: Encoder,
    inputs: dict[str, Inputs],
    labels: dict[str, Int64[Tensor, "n"]],
    classes: Float[Tensor, "c d"],
    *,
    reading: str = "text",
    rate: float | None = None,
    **options: Any,
) -> tuple[Fit, Bool[Tensor, "n"]]:
    """Train an aligner on a task, and test it: how the training went, and which test images it gets right.

    inputs, labels: of "train", "validation" and "test"; see `fit`. rate: in place of the reading's. options: more of
    `fit`. Source: section 4.2.
    """
    chosen = training_options(aligner, encoder, reading) | ({} if rate is None else {"rate": rate}) | options
    train, validation = ((inputs[split], labels[split]) for split in ("train", "validation"))
    result = fit(aligner, train, validation, classes, **chosen)
    outputs = transformed(aligner, inputs["test"], workers=options.get("workers", 0))
    return result, zero_shot_hits(outputs, classes, labels["test"])


class _Transform:
    """ResiDual folded with an encoder's frames: a matrix for all heads, and one for each MLP."""

    @torch.no_grad()
    def __init__(self, adapter: ResiDual, encoder: Encoder) -> None:
        bases, frames, device = adapter.bases, head_frames(encoder), encoder.device
        lambdas, index = adapter.lambdas.detach().double().to(device), bases.unit_index.to(device)
        components, means = bases.components.double().to(device), bases.means.double().to(device)
        weights = lambdas[index] if bases.kind == "O" else lambdas
        constant, heads, blocks = means.new_zeros(means.shape[1]), [], []
        for i, unit in enumerate(bases.units):
            down = components[index == i]
            up = down * weights[index == i, None]
            if unit.kind == "head":
                matrix, offset = frames.head_projection(unit.layer, unit.head, down, means[i])
                constant += offset @ up
                heads.append(matrix @ up)
            else:
                constant -= means[i] @ down.T @ up
                blocks.append(down.T @ up)
        if bases.kind == "O":
            constant += lambdas @ means
        self.kind, self.constant = bases.kind, constant.to(frames.head_frames)
        self.heads = torch.cat(heads).to(self.constant) if heads else None
        self.blocks = torch.stack(blocks).to(self.constant) if blocks else None

    def __call__(self, units: Units) -> Float[Tensor, "n d"]:
        if self.kind == "RD_Y":
            return units.output @ self.blocks[0] + self.constant
        output = units.head_coordinates.flatten(1) @ self.heads + self.constant
        if self.kind != "RD":
            return output
        return output + units.blocks[:, 0] + units.blocks[:, 1:].flatten(1) @ self.blocks.flatten(0, 1)


@dataclass(frozen=True, eq=False)
class AlignedEncoder(Encoder):
    """An encoder with a ResiDual on its units. Tracing it gives the units of the original encoder."""

    transform: _Transform

    def encode_image(self, pixels: Tensor) -> Float[Tensor, "n d"]:
        """Transformed outputs, not normalised. pixels: as `check_pixels` takes them."""
        return self.transform(trace(self, pixels)).to(self.dtype)

    def with_model(self, model: nn.Module) -> Encoder:
        """Raises TypeError: the ResiDual belongs to the weights it was attached to."""
        raise TypeError(f"{self.name} carries a ResiDual for its own weights; take the encoder it was attached to")
