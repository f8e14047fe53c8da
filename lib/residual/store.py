"""What an extraction leaves on disk: shards of moments, outputs, labels and coordinates under a manifest.

Every file is written beside its place and then moved there, and the manifest holds the checksum of each. If a run is
interrupted, the next one resumes after the last complete shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Float64, Int64
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from residual.encoders.encoder import Encoder
from residual.files import checksum
from residual.spectrum import PCA, Moments, framed_mean, isometry, pca_from_moments
from residual.units import Frames, head_frames, residual_units

MANIFEST, FRAMES = "manifest.json", "frames.safetensors"
MOMENTS = ("heads", "blocks", "output")  # as they are called in a shard
LAYOUT = 2  # of shards: the second holds outputs and labels even without coordinates


class StoreError(RuntimeError):
    """An extraction on disk is incomplete, damaged or of something else."""


class Shard(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str
    rows: int
    sha256: str


class Manifest(BaseModel):
    """What was extracted, from what, and by what.

    layout: of the shards; see LAYOUT. coordinates: their precision on disk, or None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    layout: int
    encoder: str
    family: str
    weights: str
    weights_hash: str
    preprocessing_hash: str
    precision: str
    layers: int
    heads: int
    dataset: str
    split: str
    dataset_hash: str
    count: int
    batch: int
    shard: int
    coordinates: str | None
    versions: dict[str, str]
    frames: str = ""  # checksum
    shards: tuple[Shard, ...] = ()

    @property
    def rows(self) -> int:
        """Images in complete shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def complete(self) -> bool:
        return self.rows == self.count

    def same_run(self, other: Manifest) -> bool:
        """Whether both describe the same extraction, in whatever state."""
        progress = {"frames", "shards", "versions"}
        return self.model_dump(exclude=progress) == other.model_dump(exclude=progress)

    def without(self, files: Iterable[str]) -> Manifest:
        """The same, with some files still to be made."""
        left = tuple(shard for shard in self.shards if shard.file not in files)
        return self.model_copy(update={"shards": left, "frames": "" if FRAMES in files else self.frames})

    def damaged_files(self, folder: Path) -> list[str]:
        """Files that are missing from a folder or do not have their checksum."""
        expected = {FRAMES: self.frames} if self.frames else {}
        expected |= {shard.file: shard.sha256 for shard in self.shards}
        return [name for name, sha256 in expected.items() if checksum(folder / name) != sha256]


@dataclass(frozen=True)
class StoredUnits:
    """Moments of all units over a data set, its outputs and labels, and, where the extraction kept them, coordinates.

    head_moments: of the coordinates [l h k], see `residual.units.Frames`. block_moments: of X0 and the MLPs in
    output space [l+1 d]. output_moments: of the model's output [d]. The methods that return samples of heads and
    blocks raise StoreError if the extraction kept no coordinates. after: a linear map that blocks and outputs go
    through when they are read; see `mapped_units`.
    """

    folder: Path
    manifest: Manifest
    frames: Frames
    head_moments: Moments
    block_moments: Moments
    output_moments: Moments
    after: Float[Tensor, "d w"] | None = None

    @property
    def labels(self) -> list[str]:
        """Labels of all units, as in `residual.units.Units`."""
        return [str(unit) for unit in residual_units(self.manifest.layers, self.manifest.heads)]

    @property
    def head_grid(self) -> tuple[int, int]:
        """Numbers of layers and heads."""
        return self.manifest.layers, self.manifest.heads

    def head_means(self) -> Float64[Tensor, "l h d"]:
        """The mean of every head in output space."""
        return framed_mean(self.head_moments, self.frames.head_frames, self.frames.head_constant)

    def head_pca(self) -> PCA:
        """PCA of every head in output space, from its moments: components [l h k d]."""
        return pca_from_moments(self.head_moments, self.frames.head_frames, self.frames.head_constant)

    def block_pca(self) -> PCA:
        """PCA of X0 and every MLP in output space: components [l+1 d d]."""
        return pca_from_moments(self.block_moments)

    def output_pca(self) -> PCA:
        """PCA of the model's output: components [d d]."""
        return pca_from_moments(self.output_moments)

    def head_outputs(self, layer: int, head: int) -> Float64[Tensor, "n d"]:
        """Samples of one head in output space."""
        return self.frames.head_unit(layer, head, self._read("heads", layer, head))

    def sum_of_heads(self, selected: Bool[Tensor, "l h"]) -> Float64[Tensor, "n d"]:
        """Samples of the sum of some heads in output space, all zero for none."""
        frames, constant = self.frames.head_frames[selected].double(), self.frames.head_constant.double()
        heads = [tuple(at) for at in selected.nonzero().tolist()]
        if not heads:
            return torch.zeros(self.manifest.count, len(constant), dtype=torch.float64)
        slices = (file.get_slice("heads") for file in self._files("heads"))
        parts = [torch.cat([part[at] for at in heads], 1).double() @ frames.flatten(0, 1) for part in slices]
        return torch.cat(parts) + len(heads) * constant

    def head_coordinates(self, layer: int, head: int) -> Float64[Tensor, "n r"]:
        """Samples of one head in isometric coordinates: distances are those in output space."""
        _, factor = isometry(self.frames.head_frames[layer, head])
        return self._read("heads", layer, head).double() @ factor.mT

    def head_scores(self, layer: int, head: int) -> Float64[Tensor, "n r"]:
        """Samples of one head along its principal components, centred, the largest variance first."""
        samples = self.head_coordinates(layer, head)
        centred = samples - samples.mean(0)
        return centred @ torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)

    def block_coordinates(self, block: int) -> Float[Tensor, "n d"]:
        """Samples of X0 (block 0) or of the MLP of layer block - 1, in output space."""
        return self._read("blocks", block)

    def outputs(self) -> Float[Tensor, "n d"]:
        """The model's output for every image."""
        return self._read("outputs")

    def class_labels(self) -> Int64[Tensor, "n"]:
        """The class label of every image."""
        return self._read("labels")

    def shards(self) -> Iterator[dict[str, Tensor]]:
        """All samples, shard after shard: heads [l h n k], blocks [l+1 n d], outputs [n d], labels [n]."""
        for file in self._files("heads"):
            yield {name: self._mapped(name, file.get_tensor(name)) for name in ("heads", "blocks", "outputs", "labels")}

    def _files(self, name: str) -> Iterator[safe_open]:
        if name in ("heads", "blocks") and self.manifest.coordinates is None:
            raise StoreError(f"{self.folder} holds no coordinates; extract with coordinates='float16' or 'float32'")
        for shard in self.manifest.shards:
            with safe_open(self.folder / shard.file, "pt") as file:
                yield file

    def _read(self, name: str, *index: int) -> Tensor:
        parts = (file.get_slice(name) for file in self._files(name))
        return self._mapped(name, torch.cat([part[index] if index else part[:] for part in parts]))

    def _mapped(self, name: str, values: Tensor) -> Tensor:
        return values if self.after is None or name not in ("blocks", "outputs") else values @ self.after.mT


def load_units(folder: Path | str, *, verify: bool = True) -> StoredUnits:
    """Open what `extract` left in a folder.

    verify: compare every file with its checksum. Raises StoreError that names the first file
    that is missing or damaged, or says how much is still to be extracted.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None or not manifest.complete:
        progress = f"{manifest.rows} of {manifest.count}" if manifest else "0 of ?"
        raise StoreError(f"{folder} holds {progress} images; run extract again")
    if verify and (damaged := manifest.damaged_files(folder)):
        raise StoreError(f"{folder / damaged[0]} is missing or damaged; run extract again, which makes it again")
    frames = load_file(folder / FRAMES)
    moments = Moments.merge_all(_shard_moments(folder, shard) for shard in manifest.shards)
    heads, blocks, output = (moments[name] for name in MOMENTS)
    return StoredUnits(folder, manifest, Frames(frames["heads"], frames["constant"]), heads, blocks, output)


def mapped_units(units: StoredUnits, encoder: Encoder, weights_hash: str | None = None) -> StoredUnits:
    """The units of an encoder that maps another's output linearly, from the units of that one, `encoder.unmapped()`.

    Coordinates of heads are the same; frames, blocks and outputs go through the map.
    """
    weight, frames = encoder.model.image_map.weight.detach().cpu(), head_frames(encoder)
    wide = weight.double()

    def through(moments: Moments) -> Moments:
        return Moments(moments.count, moments.mean @ wide.mT, wide @ moments.scatter @ wide.mT)

    facts = {
        "encoder": encoder.name,
        "weights": encoder.weights,
        "weights_hash": weights_hash or encoder.weights_hash(),
    }
    return replace(
        units,
        manifest=units.manifest.model_copy(update=facts),
        frames=Frames(frames.head_frames.cpu(), frames.head_constant.cpu()),
        block_moments=through(units.block_moments),
        output_moments=through(units.output_moments),
        after=weight.float(),
    )


def join_units(parts: Sequence[StoredUnits]) -> StoredUnits:
    """The units of one or more splits of a data set, one after another, as if they were those of one.

    The result is in memory; its files stay where they are, and its folder is that of the first.
    Raises ValueError for units of different encoders or data sets, or of which some alone have coordinates.
    """
    first, manifests = parts[0], [part.manifest for part in parts]
    for name in ("dataset", "weights_hash", "preprocessing_hash", "precision", "coordinates"):
        if len(found := {getattr(manifest, name) for manifest in manifests}) > 1:
            raise ValueError(f"units with different {name} cannot be joined: {sorted(map(str, found))}")
    whole = {name: "+".join(getattr(manifest, name) for manifest in manifests) for name in ("split", "dataset_hash")}
    whole["count"] = sum(manifest.count for manifest in manifests)
    whole["shards"] = tuple(
        shard.model_copy(update={"file": str(part.folder.absolute() / shard.file)})
        for part in parts
        for shard in part.manifest.shards
    )
    kinds = ("head_moments", "block_moments", "output_moments")
    moments = Moments.merge_all({kind: getattr(part, kind) for kind in kinds} for part in parts)
    return replace(first, manifest=first.manifest.model_copy(update=whole), **moments)


def _shard_moments(folder: Path, shard: Shard) -> dict[str, Moments]:
    with safe_open(folder / shard.file, "pt") as file:
        read = file.get_tensor
        return {name: Moments(shard.rows, read(f"{name}.mean"), read(f"{name}.scatter")) for name in MOMENTS}


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where there is none, or it cannot be read."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_text())
    except (FileNotFoundError, ValidationError, UnicodeDecodeError):
        return None
