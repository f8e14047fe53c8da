"""Streams a data set through an encoder, once, into a store."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from residual.data.dataset import Dataset, load_dataset
from residual.data.images import EncodedImages
from residual.encoders.encoder import Encoder
from residual.encoders.names import PRECISIONS
from residual.files import cache_folder, file_name, locked, write_bytes
from residual.spectrum import Moments
from residual.store import FRAMES, LAYOUT, MANIFEST, Manifest, Shard, StoredUnits, StoreError, load_units, read_manifest
from residual.tensors import write_tensors
from residual.units import Units, head_frames, trace

LIBRARIES = ("residual", "torch", "open_clip_torch", "transformers")
DTYPES = {name: getattr(torch, name) for name in PRECISIONS}
SHARD = 4096  # images a file
log = logging.getLogger(__name__)


def extract(
    encoder: Encoder,
    dataset: Dataset | str,
    *,
    split: str = "train",
    root: Path | str | None = None,
    coordinates: str | None = None,
    batch: int = 128,
    shard: int = SHARD,
    precision: str = "float32",
    workers: int = 0,
    progress: bool = True,
    weights_hash: str | None = None,
) -> StoredUnits:
    """Stream a data set through an encoder once, and keep what the analysis needs.

    dataset: a Dataset, or a name for `load_dataset(name, split)`. root: the parent of all extractions, by default in
    the user's cache; each has a folder of its own, whose name holds a hash of everything it depends on.
    coordinates: the precision in which every sample's coordinates are kept on disk, "float16", "bfloat16" or
    "float32"; by default only moments, outputs and labels are kept.
    precision: of the forward pass, "float32" for the encoder's own, or "float16" or "bfloat16" by autocast, which
    keeps norms and the residual stream in single precision; `benchmarks/precision.py` measures what that costs.
    batch: images in a forward pass; halved when memory runs out. shard: images in a file, the most that an
    interruption can cost. workers: processes that decode images.
    weights_hash: the encoder's, if already computed: that takes longer than to find a finished extraction.
    A finished extraction is checked and returned; an unfinished one is resumed; a second run on the same folder
    waits for the first.
    Raises ValueError for bad arguments, StoreError where a folder holds something else, OSError when the disk is full.
    """
    options = _Options(batch, shard, coordinates, precision, workers)
    data = load_dataset(dataset, split) if isinstance(dataset, str) else dataset
    root = cache_folder() / "units" if root is None else root
    wanted, folder = _manifest_and_folder(encoder, weights_hash or encoder.weights_hash(), data, root, options)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", str(folder)):
        manifest = _resume(folder, wanted)
        if not manifest.frames:
            frames = head_frames(encoder)
            tensors = {"heads": frames.head_frames.cpu(), "constant": frames.head_constant.cpu()}
            manifest = _record(folder, manifest, frames=write_tensors(folder / FRAMES, tensors))
        _fill(folder, manifest, encoder, data, options, progress)
    return load_units(folder, verify=False)


def find_units(
    encoder: Encoder, data: Dataset, *, root: Path | str, weights_hash: str | None = None, **options: Any
) -> StoredUnits | None:
    """What `extract` would return with these options, if it is there and whole; None where it is not."""
    chosen = _Options(**{"batch": 128, "shard": SHARD, "coordinates": None, "precision": "float32"} | options)
    _, folder = _manifest_and_folder(encoder, weights_hash or encoder.weights_hash(), data, root, chosen)
    try:
        return load_units(folder)
    except StoreError:
        return None


@dataclass(frozen=True)
class _Options:
    """See `extract`."""

    batch: int
    shard: int
    coordinates: str | None
    precision: str
    workers: int = 0

    def __post_init__(self) -> None:
        if self.coordinates is not None and self.coordinates not in PRECISIONS:
            raise ValueError(f"coordinates must be None or one of {list(PRECISIONS)}, not {self.coordinates!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {list(PRECISIONS)}, not {self.precision!r}")
        if self.batch < 1 or self.shard < 1:
            raise ValueError(f"batch and shard must be positive, not {self.batch} and {self.shard}")


def _manifest_and_folder(
    encoder: Encoder, weights_hash: str, data: Dataset, root: Path | str, options: _Options
) -> tuple[Manifest, Path]:
    """The manifest of a new extraction, and the folder named after it."""
    dtype = str(encoder.dtype).removeprefix("torch.")
    manifest = Manifest(
        layout=LAYOUT,
        encoder=encoder.name,
        family=encoder.family,
        weights=encoder.weights,
        weights_hash=weights_hash,
        preprocessing_hash=encoder.preprocessing_hash(),
        precision=dtype if options.precision == "float32" else f"{dtype}, {options.precision} by autocast",
        layers=encoder.layers,
        heads=encoder.heads,
        dataset=data.name,
        split=data.split,
        dataset_hash=data.fingerprint(),
        count=len(data),
        batch=options.batch,
        shard=options.shard,
        coordinates=options.coordinates,
        versions=_versions(),
    )
    key = hashlib.sha256(manifest.model_dump_json(exclude={"versions"}).encode()).hexdigest()[:12]
    return manifest, Path(root) / file_name(Path(encoder.name).name, data.name, data.split, key)


@functools.cache
def _versions() -> dict[str, str]:
    return {library: version(library) for library in LIBRARIES}


def _resume(folder: Path, wanted: Manifest) -> Manifest:
    """The manifest to resume from: the one on disk, without damaged files."""
    for leftover in folder.glob("shard-*.partial"):
        leftover.unlink(missing_ok=True)
    manifest = read_manifest(folder)
    if manifest is None:
        if (folder / MANIFEST).exists():
            log.warning("%s cannot be read; extracting again", folder / MANIFEST)
        return wanted
    if not manifest.same_run(wanted):
        raise StoreError(f"{folder} holds another extraction ({manifest.encoder} on {manifest.dataset}); move it away")
    damaged = manifest.damaged_files(folder)
    for file in damaged:
        log.warning("%s is missing or damaged; extracting it again", folder / file)
    return manifest.without(damaged)


def _record(folder: Path, manifest: Manifest, **changes: object) -> Manifest:
    """A changed manifest, which is then on disk."""
    manifest = manifest.model_copy(update=changes)
    write_bytes(folder / MANIFEST, manifest.model_dump_json(indent=2).encode())
    return manifest


def _fill(folder: Path, manifest: Manifest, encoder: Encoder, data: Dataset, options: _Options, progress: bool) -> None:
    """Extract the shards that are missing, one after another."""
    done = {shard.file: shard for shard in manifest.shards}
    label = f"{encoder.name} on {data.name}/{data.split}"
    with tqdm(total=len(data), initial=manifest.rows, desc=label, unit="image", disable=not progress) as bar:
        for index, start in enumerate(range(0, len(data), options.shard)):
            if (file := f"shard-{index:05d}.safetensors") not in done:
                rows = range(start, min(start + options.shard, len(data)))
                tensors, options = _shard_that_fits(encoder, data, rows, options)
                done[file] = Shard(file=file, rows=len(rows), sha256=write_tensors(folder / file, tensors))
                manifest = _record(folder, manifest, shards=tuple(done[name] for name in sorted(done)))
                bar.update(len(rows))


def _shard_that_fits(
    encoder: Encoder, data: Dataset, rows: range, options: _Options
) -> tuple[dict[str, Tensor], _Options]:
    """A shard, and the options that worked: the batch is halved until it fits into memory."""
    while True:
        try:
            return _shard(encoder, data, rows, options), options
        except RuntimeError as error:
            if options.batch == 1 or not _out_of_memory(error):
                raise
        options = replace(options, batch=options.batch // 2)
        log.warning("out of memory; continuing with batches of %d", options.batch)
        if encoder.device.type == "cuda":
            torch.cuda.empty_cache()


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)


def _shard(encoder: Encoder, data: Dataset, rows: range, options: _Options) -> dict[str, Tensor]:
    """Moments of one shard, its outputs, labels and coordinates, in which the samples' axis comes before the last."""
    samples: dict[str, list[Tensor]] = {"outputs": []} | ({"heads": [], "blocks": []} if options.coordinates else {})
    dtype = DTYPES[options.coordinates or "float32"]

    def batch_moments() -> Iterator[dict[str, Moments]]:
        for units in _traced(encoder, data, rows, options):
            parts = {"outputs": units.output, "heads": units.head_coordinates, "blocks": units.blocks}
            for name, kept in samples.items():
                kept.append(parts[name].movedim(0, -2).to(dtype).cpu())
            named = ("heads", units.head_coordinates), ("blocks", units.blocks), ("output", units.output)
            yield {name: Moments.of(part) for name, part in named}

    moments = Moments.merge_all(batch_moments())
    tensors = {f"{name}.mean": part.mean for name, part in moments.items()}
    tensors |= {f"{name}.scatter": part.scatter for name, part in moments.items()}
    tensors |= {name: torch.cat(parts, -2) for name, parts in samples.items()}
    if not all(tensors[name].isfinite().all() for name in samples):
        reason = f"coordinates of {encoder.name} overflow {options.coordinates}; use 'bfloat16' or 'float32'"
        raise ValueError(reason)
    tensors["labels"] = data.labels[rows.start : rows.stop]
    return {name: value.contiguous().cpu() for name, value in tensors.items()}


def _traced(encoder: Encoder, data: Dataset, rows: range, options: _Options) -> Iterator[Units]:
    """The units of some rows, batch by batch. Raises ValueError for NaN and infinity."""
    stop, half = rows.start, options.precision != "float32"
    parts = data.images[rows.start : rows.stop].split(options.batch)
    for pixels in pixel_batches(encoder, parts, options.workers):
        start, stop = stop, stop + len(pixels)
        with torch.autocast(encoder.device.type, DTYPES[options.precision], enabled=half):
            units = trace(encoder, pixels)
        if not all(value.isfinite().all() for value in (units.head_coordinates, units.blocks, units.output)):
            raise ValueError(f"{encoder.name} gives NaN or infinity for images {start} to {stop - 1} of {data.name}")
        yield units


def pixels_for(encoder: Encoder, images: Tensor | EncodedImages) -> Tensor:
    """Preprocessed images; uint8 images of the right size, and floats, which are preprocessed, stay as they are."""
    if not isinstance(images, Tensor):
        return torch.stack([encoder.preprocess(image) for image in images])
    if images.is_floating_point() or tuple(images.shape[2:]) == encoder.tower.image_size:
        return images
    from torchvision.transforms.functional import to_pil_image  # takes a second to import

    return torch.stack([encoder.preprocess(to_pil_image(image)) for image in images])


def read_pictures(encoder: Encoder, images: Tensor | EncodedImages) -> UInt8[Tensor, "n 3 h w"]:
    """Images as an encoder reads them: resized and cropped, but not normalised."""
    pixels = pixels_for(encoder, images)
    if not pixels.is_floating_point():
        return pixels
    mean, std = (torch.tensor(values)[:, None, None] for values in (encoder.mean, encoder.std))
    return ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def pixel_batches(encoder: Encoder, parts: Sequence[Tensor | EncodedImages], workers: int = 0) -> DataLoader:
    """Pixels of parts of images, one after another, decoded by `workers` processes while the encoder computes."""
    pinned = encoder.device.type == "cuda"
    return DataLoader(_Batches(encoder, parts), batch_size=None, num_workers=workers, pin_memory=pinned)


class _Batches(torch.utils.data.Dataset):
    def __init__(self, encoder: Encoder, parts: Sequence[Tensor | EncodedImages]) -> None:
        self.encoder, self.parts = encoder, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Tensor:
        return pixels_for(self.encoder, self.parts[index])
