"""What extraction leaves on disk: shards of moments and coordinates under a manifest.

Every file is written beside its place and renamed into it, and the manifest holds the
checksum of each. A run that stops anywhere is taken up after its last whole shard.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from jaxtyping import Float, Float64, Int64
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from residual.spectrum import PCA, Moments, isometry, pca_from_moments
from residual.units import Frames, unit_labels

MANIFEST = "manifest.json"
log = logging.getLogger(__name__)


class StoreError(RuntimeError):
    """An extraction on disk is incomplete or damaged."""


class Shard(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str
    rows: int
    sha256: str


class Manifest(BaseModel):
    """What was extracted, from what, by what. `coordinates`: their precision on disk, or None."""

    model_config = ConfigDict(extra="forbid", frozen=True)
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
    seal: str = ""  # checksum of all the rest

    @property
    def complete(self) -> bool:
        return sum(s.rows for s in self.shards) == self.count

    def sealed(self) -> Manifest:
        """The same with its own checksum, by which an altered manifest is known."""
        body = self.model_dump_json(exclude={"seal"})
        return self.model_copy(update={"seal": hashlib.sha256(body.encode()).hexdigest()})

    def same_run(self, other: Manifest) -> bool:
        """Whether both describe the same extraction, whatever has been done of it so far."""
        leave = {"frames", "shards", "seal", "versions"}
        return self.model_dump(exclude=leave) == other.model_dump(exclude=leave)


@dataclass(frozen=True)
class StoredUnits:
    """Moments of all units over a data set, and, where they were asked for, coordinates.

    heads: moments of the coordinates [l h k], see `residual.units.Frames`. blocks: of X0 and
    the MLPs in output space [l+1 d]. output: of the model's output [d].
    """

    folder: Path
    manifest: Manifest
    frames: Frames
    heads: Moments
    blocks: Moments
    output: Moments

    @property
    def labels(self) -> list[str]:
        """Labels of all units, as in `residual.units.Units`."""
        return unit_labels(self.manifest.layers, self.manifest.heads)

    def head_pca(self) -> PCA:
        """PCA of every head in output space, from its moments: components [l h k d]."""
        return pca_from_moments(self.heads, self.frames.heads, self.frames.heads_constant)

    def block_pca(self) -> PCA:
        """PCA of X0 and every MLP in output space: components [l+1 d d]."""
        return pca_from_moments(self.blocks)

    def output_pca(self) -> PCA:
        """PCA of the model's output: components [d d]."""
        return pca_from_moments(self.output)

    def head_outputs(self, layer: int, head: int) -> Float64[Tensor, "n d"]:
        """Samples of one head in output space.

        Raises StoreError if the extraction kept no coordinates.
        """
        frame, constant = self.frames.heads[layer, head].double(), self.frames.heads_constant.double()
        return self._read("heads", layer, head).double() @ frame + constant

    def head_coordinates(self, layer: int, head: int) -> Float64[Tensor, "n r"]:
        """Samples of one head in isometric coordinates: distances are those in output space.

        Raises StoreError if the extraction kept no coordinates.
        """
        _, factor = isometry(self.frames.heads[layer, head])
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
        """What is kept of every sample, a shard after the other: heads [l h n k], blocks [l+1 n d], outputs, labels."""
        self._check_coordinates()
        for shard in self.manifest.shards:
            with safe_open(self.folder / shard.file, "pt") as file:
                yield {name: file.get_tensor(name) for name in ("heads", "blocks", "outputs", "labels")}

    def _check_coordinates(self) -> None:
        if self.manifest.coordinates is None:
            raise StoreError(f"{self.folder} holds moments only; extract with coordinates='float16' or 'float32'")

    def _read(self, name: str, *index: int) -> Tensor:
        self._check_coordinates()
        parts = []
        for shard in self.manifest.shards:
            with safe_open(self.folder / shard.file, "pt") as file:
                part = file.get_slice(name)
                parts.append(part[index] if index else part[:])
        return torch.cat(parts)


def load_units(folder: Path | str, *, verify: bool = True) -> StoredUnits:
    """Open what `extract` left in a folder.

    verify: hold every file against its checksum. Raises StoreError that names the first file
    that is missing or damaged, or says how much is still to be extracted.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None or not manifest.complete:
        done = sum(s.rows for s in manifest.shards) if manifest else 0
        raise StoreError(f"{folder} holds {done} of {manifest.count if manifest else '?'} images; run extract again")
    if verify and (bad := damaged_files(folder, manifest)):
        raise StoreError(f"{folder / bad[0]} is missing or damaged; run extract again, which redoes it")
    stored = load_file(folder / "frames.safetensors")
    merged: dict[str, Moments] = {}
    for shard in manifest.shards:
        with safe_open(folder / shard.file, "pt") as file:
            for unit in ("heads", "blocks", "output"):
                own = Moments(shard.rows, file.get_tensor(f"{unit}.mean"), file.get_tensor(f"{unit}.scatter"))
                merged[unit] = merged[unit].merge(own) if unit in merged else own
    return StoredUnits(folder, manifest, Frames(stored["heads"], stored["constant"]), **merged)


def read_manifest(folder: Path, name: str = MANIFEST) -> Manifest | None:
    """The manifest of a folder; None where there is none, or it cannot be read or was altered."""
    try:
        manifest = Manifest.model_validate_json((folder / name).read_text())
    except (FileNotFoundError, ValidationError, UnicodeDecodeError):
        return None
    return manifest if manifest == manifest.sealed() else None


def damaged_files(folder: Path, manifest: Manifest) -> list[str]:
    """Files of the manifest that are missing or do not have their checksum."""
    expected = {"frames.safetensors": manifest.frames} if manifest.frames else {}
    expected |= {shard.file: shard.sha256 for shard in manifest.shards}
    return [name for name, checksum in expected.items() if _checksum(folder / name) != checksum]


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write a safetensors file atomically; returns its SHA-256."""
    data = save(tensors, metadata)
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def tensors_checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors and their names, whatever their order."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises OSError, with the old file in place, when the disk is full."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno,
                f"no room for {len(data):,} bytes; what was done before is kept: free space and run again",
                str(path),
            ) from error
        raise


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """One run at a time at `what`; the lock goes with the process that holds it, however that ends."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("another run is at %s; waiting for it", what)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _checksum(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
