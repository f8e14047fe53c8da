"""Streams a data set through an encoder, once, into a store."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image
from tqdm.auto import tqdm

from residual.data import Dataset, load_dataset
from residual.encoders import Encoder
from residual.hub import EncodedImages
from residual.spectrum import Moments
from residual.store import (
    MANIFEST,
    Manifest,
    Shard,
    StoredUnits,
    StoreError,
    damaged_files,
    load_units,
    locked,
    read_manifest,
    write_bytes,
    write_tensors,
)
from residual.units import frames, trace

LIBRARIES = ("residual", "torch", "open_clip_torch", "transformers")
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
log = logging.getLogger(__name__)


def extract(
    encoder: Encoder,
    dataset: Dataset | str,
    *,
    split: str = "train",
    root: Path | str = "_build/units",
    coordinates: str | None = None,
    batch: int = 128,
    shard: int = 4096,
    precision: str = "float32",
    workers: int = 0,
    part: tuple[int, int] | None = None,
    progress: bool = True,
) -> StoredUnits | None:
    """Stream a data set through an encoder once, and keep what the analysis needs.

    dataset: a Dataset, or a name for `load_dataset(name, split)`. root: the folder of all
    extractions; this one has a folder of its own, named after all that it depends on.
    coordinates: also keep every sample's coordinates, in "float16", "bfloat16" or "float32".
    precision: of the forward pass, "float32" for the encoder's own, or "float16" or "bfloat16" by autocast, which keeps
    norms and the residual stream in single precision; what that costs is told by `benchmarks/precision.py`.
    batch: images a forward pass; halved where memory does not suffice. shard: images a file, the most that is
    lost when a run is killed. workers: processes that decode images. part: (i, n) for every n-th shard from the i-th
    on, so that n runs share the work, on one machine or many; None is returned, and a run without `part`
    puts together what they left.
    An extraction that is there already is checked and returned; a part of one is completed.
    A second run on the same folder waits for the first. Raises ValueError for bad arguments,
    StoreError where a folder holds something else, OSError when the disk is full.
    """
    if coordinates is not None and coordinates not in PRECISIONS:
        raise ValueError(f"coordinates must be None or one of {list(PRECISIONS)}, not {coordinates!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {list(PRECISIONS)}, not {precision!r}")
    if batch < 1 or shard < 1:
        raise ValueError(f"batch and shard must be positive, not {batch} and {shard}")
    if part is not None and not 0 <= part[0] < part[1]:
        raise ValueError(f"part must be (i, n) with i from 0 to n - 1, not {part}")
    data = load_dataset(dataset, split) if isinstance(dataset, str) else dataset
    wanted, folder = _place(encoder, data, root, coordinates, batch, shard, precision)
    folder.mkdir(parents=True, exist_ok=True)
    own_name = MANIFEST if part is None else f"part-{part[0]}-of-{part[1]}.json"
    with locked(folder / f".{own_name}.lock", str(folder)):
        manifest = _resume(folder, wanted, own_name)
        if part is None:
            manifest = _gather(folder, manifest)
        if part is None and not manifest.frames:
            own = frames(encoder)
            checksum = write_tensors(
                folder / "frames.safetensors", {"heads": own.heads.cpu(), "constant": own.heads_constant.cpu()}
            )
            manifest = _record(folder, manifest, own_name, frames=checksum)
        starts = range(0, len(data), shard)
        kept = {s.file: s for s in manifest.shards}
        done = sum(s.rows for s in manifest.shards)
        label = f"{encoder.name} on {data.name}/{data.split}"
        with tqdm(total=len(data), initial=done, desc=label, unit="image", disable=not progress) as bar:
            for index, start in enumerate(starts):
                name = f"shard-{index:05d}.safetensors"
                if name in kept or (part is not None and index % part[1] != part[0]):
                    continue
                rows = range(start, min(start + shard, len(data)))
                tensors = None
                while tensors is None:
                    try:
                        tensors = _extract_shard(encoder, data, rows, batch, coordinates, precision, workers)
                    except (torch.OutOfMemoryError, RuntimeError) as error:
                        if batch == 1 or not _out_of_memory(error):
                            raise
                        batch //= 2
                        log.warning("memory does not suffice; going on with batches of %d", batch)
                        error = None  # its traceback holds the batch
                        if encoder.device.type == "cuda":
                            torch.cuda.empty_cache()
                kept[name] = Shard(file=name, rows=len(rows), sha256=write_tensors(folder / name, tensors))
                manifest = _record(folder, manifest, own_name, shards=tuple(kept[k] for k in sorted(kept)))
                bar.update(len(rows))
    return None if part is not None else load_units(folder, verify=False)


def extracted(
    encoder: Encoder,
    data: Dataset,
    *,
    root: Path | str,
    coordinates: str | None,
    batch: int = 128,
    shard: int = 4096,
    precision: str = "float32",
) -> bool:
    """Whether `extract` with the same arguments has been here and come to its end."""
    _, folder = _place(encoder, data, root, coordinates, batch, shard, precision)
    found = read_manifest(folder)
    return found is not None and found.complete


def _place(
    encoder: Encoder, data: Dataset, root: Path | str, coordinates: str | None, batch: int, shard: int, precision: str
) -> tuple[Manifest, Path]:
    """What an extraction is of, and its folder, which is named after that."""
    wanted = _describe(encoder, data, coordinates, batch, shard, precision)
    key = hashlib.sha256(wanted.model_dump_json(exclude={"versions"}).encode()).hexdigest()[:12]
    parts = Path(encoder.name).name, data.name, data.split
    return wanted, Path(root) / ("--".join(part.replace(":", "_").replace("/", "_") for part in parts) + f"--{key}")


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)


def _gather(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest with the shards that runs on parts have left, each held against its checksum."""
    shards = {shard.file: shard for shard in manifest.shards}
    for path in sorted(folder.glob("part-*.json")):
        found = read_manifest(folder, path.name)
        if found is None or not found.same_run(manifest):
            log.warning("%s cannot be read or is of another run; its shards are extracted again", path)
            continue
        bad = damaged_files(folder, found)
        shards |= {shard.file: shard for shard in found.shards if shard.file not in bad and shard.file not in shards}
    return manifest.model_copy(update={"shards": tuple(shards[name] for name in sorted(shards))})


def _describe(
    encoder: Encoder, data: Dataset, coordinates: str | None, batch: int, shard: int, precision: str
) -> Manifest:
    own = str(encoder.dtype).removeprefix("torch.")
    return Manifest(
        encoder=encoder.name,
        family=encoder.family,
        weights=encoder.weights,
        weights_hash=encoder.weights_hash(),
        preprocessing_hash=encoder.preprocessing_hash(),
        precision=own if precision == "float32" else f"{own}, {precision} by autocast",
        layers=encoder.layers,
        heads=encoder.heads,
        dataset=data.name,
        split=data.split,
        dataset_hash=data.fingerprint(),
        count=len(data),
        batch=batch,
        shard=shard,
        coordinates=coordinates,
        versions={library: version(library) for library in LIBRARIES},
    )


def _extract_shard(
    encoder: Encoder, data: Dataset, rows: range, batch: int, coordinates: str | None, precision: str, workers: int
) -> dict[str, Tensor]:
    """Moments of one shard, and its coordinates with the samples' axis before their last."""
    merged: dict[str, Moments] = {}
    kept: dict[str, list[Tensor]] = {"heads": [], "blocks": [], "outputs": []}
    stop = rows.start
    for pixels in pixel_batches(encoder, data.images[rows.start : rows.stop].split(batch), workers):
        start, stop = stop, stop + len(pixels)
        with torch.autocast(encoder.device.type, PRECISIONS[precision], enabled=precision != "float32"):
            units = trace(encoder, pixels)
        if not all(value.isfinite().all() for value in (units.coordinates, units.blocks, units.output)):
            raise ValueError(f"{encoder.name} gives NaN or infinity for images {start} to {stop - 1} of {data.name}")
        for name, samples in (("heads", units.coordinates), ("blocks", units.blocks), ("output", units.output)):
            own = Moments.of(samples)
            merged[name] = merged[name].merge(own) if name in merged else own
        if coordinates:
            kept["heads"].append(units.coordinates.movedim(0, -2).to(PRECISIONS[coordinates]).cpu())
            kept["blocks"].append(units.blocks.movedim(0, -2).to(PRECISIONS[coordinates]).cpu())
            kept["outputs"].append(units.output.to(PRECISIONS[coordinates]).cpu())
    tensors = {f"{name}.mean": own.mean for name, own in merged.items()}
    tensors |= {f"{name}.scatter": own.scatter for name, own in merged.items()}
    if coordinates:
        tensors |= {name: torch.cat(parts, -2) for name, parts in kept.items()}
        if not all(tensors[name].isfinite().all() for name in kept):
            raise ValueError(f"coordinates of {encoder.name} overflow {coordinates}; use 'bfloat16' or 'float32'")
        tensors["labels"] = data.labels[rows.start : rows.stop]
    return {name: value.contiguous().cpu() for name, value in tensors.items()}


def pixels_for(encoder: Encoder, images: Tensor | EncodedImages) -> Tensor:
    """Images through the encoder's preprocessing; uint8 ones whose size fits, and pixels made by it, as they are."""
    if not isinstance(images, Tensor):
        return torch.stack([encoder.preprocess(image) for image in images])
    if images.is_floating_point() or tuple(images.shape[2:]) == encoder.tower.image_size:
        return images
    return torch.stack([encoder.preprocess(to_pil_image(image)) for image in images])


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


def _resume(folder: Path, wanted: Manifest, name: str) -> Manifest:
    """The state to go on from: what is on disk, less what is damaged."""
    for leftover in folder.glob("shard-*.partial") if name == MANIFEST else ():
        leftover.unlink(missing_ok=True)
    found = read_manifest(folder, name)
    if found is None:
        if (folder / name).exists():
            log.warning("%s cannot be read or was altered; extracting anew", folder / name)
        return wanted
    if not found.same_run(wanted):
        raise StoreError(f"{folder} holds another extraction ({found.encoder} on {found.dataset}); move it away")
    bad = damaged_files(folder, found)
    for file in bad:
        log.warning("%s is missing or damaged; extracting it again", folder / file)
    shards = tuple(shard for shard in found.shards if shard.file not in bad)
    return found.model_copy(update={"shards": shards, "frames": "" if "frames.safetensors" in bad else found.frames})


def _record(folder: Path, manifest: Manifest, name: str, **changes: object) -> Manifest:
    manifest = manifest.model_copy(update=changes).sealed()
    write_bytes(folder / name, manifest.model_dump_json(indent=2).encode())
    return manifest
