"""Labelled images of a hub or a local folder, read by `datasets`: webdataset tars, parquet and image folders.

Images stay encoded until an encoder asks for them. Names of classes and prompt templates come with the set
(`classnames.txt`, `zeroshot_classification_templates.txt`, or the label's own type), never from here.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
import yaml
from filelock import FileLock
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from jaxtyping import Int64
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from residual.store import write_bytes

CLASSES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
TEMPLATE = "a photo of a {}."  # where a set has none
NAMES = {  # of splits
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
LABELS = ("cls", "label", "labels", "fine_label", "class")
HELD = 0.1  # of an official training split, for validation where there is none
SHARES = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}  # of a set that is not divided
MANY = 2000  # images from which on they are checked by several processes

log = logging.getLogger(__name__)


class DataError(RuntimeError):
    """A data set cannot be had, or is not what it should be; says what to do."""


class HubSet(BaseModel):
    """What is known of a data set of the paper before it is downloaded; see catalogue.yml."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    repo: str
    published: str
    classes: int
    train: int
    test: int
    gigabytes: float
    licence: str
    cite: str
    limit: int | None = None
    gated: bool = False
    label: str | None = None

    def counts(self) -> dict[str, int]:
        """Images of each split, as `read_split` divides them."""
        if not (self.train and self.test):
            whole = self.train + self.test
            return {split: int(high * whole) - int(low * whole) for split, (low, high) in SHARES.items()}
        held = int(HELD * self.train)
        train = self.train - held
        return {"train": min(train, self.limit or train), "validation": held, "test": self.test}


@functools.cache
def catalogue() -> dict[str, HubSet]:
    """The paper's data sets, by the names they have here."""
    entries = yaml.safe_load(Path(__file__).with_name("catalogue.yml").read_text())
    return {name: HubSet(**entry) for name, entry in entries.items()}


def readable(name: str) -> bool:
    """Whether a name is one of the catalogue, a folder, or looks like a hub id ("org/name"), "@revision" aside."""
    own = name.partition("@")[0]
    folder = Path(name).expanduser()
    return own in catalogue() or folder.is_dir() or (own.count("/") == 1 and all(own.split("/")) and own[0] not in ".~")


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Images as they lie in files. Indexed by a tensor or a slice it gives the same of fewer; iterated, RGB images."""

    table: datasets.Dataset  # one column, not decoded
    checksums: tuple[str, ...] = field(repr=False)  # of all rows of the table
    rows: Int64[Tensor, "n"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice) -> EncodedImages:
        return EncodedImages(self.table, self.checksums, self.rows[index])

    def __iter__(self) -> Iterator[Image.Image]:
        for row in self.rows.tolist():
            yield _decode(next(iter(self.table[row].values())))

    def split(self, size: int) -> list[EncodedImages]:
        return [self[start : start + size] for start in range(0, len(self), size)]

    def fingerprint(self) -> str:
        """SHA-256 of the files' checksums, in order."""
        return hashlib.sha256("".join(self.checksums[row] for row in self.rows.tolist()).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class HubSplit:
    """A split as `Dataset` wants it. excluded: images that cannot be decoded, by key."""

    images: EncodedImages
    labels: Int64[Tensor, "n"]
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    excluded: tuple[str, ...]


def read_split(name: str, split: str, *, seed: int, cache: Path) -> HubSplit:
    """One split of a data set of the catalogue, a hub id or a folder, in an order drawn from `seed`.

    Official splits where there are; a tenth of each class of the training split is held out where there is no
    validation split, and a set that is not divided is divided 60 : 20 : 20, class by class. "name@revision" pins a
    revision; else the first one that was fetched stays, recorded in `cache`. Images that cannot be decoded are left
    out and named. Raises DataError where a set cannot be had, and ValueError for one that holds no labelled images.
    """
    own, _, revision = name.partition("@")
    entry = catalogue().get(own)
    folder = Path(name).expanduser()
    local = entry is None and folder.is_dir()
    source = str(folder) if local else entry.repo if entry else own
    try:
        if not local:
            revision = revision or _pinned(source, cache)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a folder without a card
            found = datasets.load_dataset(source, revision=None if local else revision)
        words = {file: _lines(source, file, local, revision) for file in (CLASSES, TEMPLATES)}
    except Exception as error:  # whatever loaders, decoders and connections below them raise
        raise DataError(_explain(name, source, local, entry, error)) from error
    tables = {ours: found[theirs] for ours, names in NAMES.items() for theirs in names if theirs in found}
    tables = {ours: table for ours, table in tables.items() if _labelled(table, entry)}
    if not tables:
        raise ValueError(f"{name} has no labelled split; its splits are {', '.join(found)}")
    if "test" not in tables and "train" in tables and "validation" in tables:
        tables["test"] = tables.pop("validation")  # ImageNet's test labels are secret
    if undivided := not {"train", "test"} <= set(tables):
        table, (low, high) = datasets.concatenate_datasets(list(tables.values())), SHARES[split]
    elif split in tables and (split != "train" or "validation" in tables):
        table, (low, high) = tables[split], (0.0, 1.0)
    else:
        table, (low, high) = tables["test" if split == "test" else "train"], (0.0, 1 - HELD)
        if split == "validation":
            low, high = 1 - HELD, 1.0
    image, label = _columns(table, entry, name)
    labels, classes = _labels(table, label, words[CLASSES], name)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(table), generator=generator)
    turns = class_turns(labels[rows])
    sizes = torch.bincount(labels[rows], minlength=len(classes))[labels[rows]]
    rows = rows[(turns >= (low * sizes).long()) & (turns < (high * sizes).long())]
    if len(rows) == 0:
        why = "it is too small to be divided" if undivided else "too few images to hold some out"
        raise ValueError(f"{name} has no image left for {split}: {why}")
    if split == "train" and entry and entry.limit and len(rows) > entry.limit:
        rows = rows[class_turns(labels[rows]).argsort(stable=True)[: entry.limit].sort().values]
    table, labels = table.select(rows.tolist()), labels[rows]
    encoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    checksums, broken = _checked(encoded, image, name)
    excluded = tuple(_key(table, image, row) for row in broken.nonzero()[:, 0].tolist())
    if excluded:
        shown = ", ".join(excluded[:5]) + (" ..." if len(excluded) > 5 else "")
        log.warning(
            "%s, %s: %d of %d images cannot be decoded and are left out: %s",
            name, split, len(excluded), len(table), shown,
        )  # fmt: skip
    if broken.all():
        raise ValueError(f"{name}: not one image of {split} can be decoded")
    templates = tuple(line.replace("{c}", "{}") for line in words[TEMPLATES] or ()) or (TEMPLATE,)
    whole = (~broken).nonzero()[:, 0]
    return HubSplit(EncodedImages(encoded, checksums, whole), labels[whole], classes, templates, excluded)


def class_turns(labels: Int64[Tensor, "n"]) -> Int64[Tensor, "n"]:
    """The how-manieth of its class each is, from 0."""
    turns = torch.empty_like(labels)
    for label in labels.unique():
        own = labels == label
        turns[own] = torch.arange(int(own.sum()))
    return turns


def _pinned(repo: str, cache: Path) -> str:
    """The revision of a set that was fetched first, or now."""
    path = cache / "revisions.json"
    if repo in (known := _revisions(path)):
        return known[repo]
    sha = HfApi().dataset_info(repo).sha
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            known = {repo: sha} | _revisions(path)
            write_bytes(path, json.dumps(known, indent=2).encode())
    except OSError as error:
        log.warning("revision %s of %s is not recorded, and may be another the next time: %s", sha, repo, error)
    return known.get(repo, sha)


def _revisions(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        log.warning("%s is damaged (%s); revisions are recorded anew", path, error)
        return {}


def _lines(source: str, file: str, local: bool, revision: str | None) -> list[str] | None:
    """The lines of a text file of the set; None where it has none."""
    try:
        path = Path(source) / file if local else hf_hub_download(source, file, repo_type="dataset", revision=revision)
        return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except LocalEntryNotFoundError:  # no network: a kind of the next, but not for want of the file
        raise
    except (FileNotFoundError, EntryNotFoundError):
        return None


def _explain(name: str, source: str, local: bool, entry: HubSet | None, error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    if local:
        return f"{name} cannot be read as webdataset tars, parquet or an image folder: {text}"
    if "gated" in text.lower() or "401" in text or "403" in text:
        return (
            f"{name}: {source} is gated. Ask for access on its page on the hub, then log in with `hf auth login` "
            f"(or set HF_TOKEN) and run again. ({text})"
        )
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        hint = " It asks for access: see its page, then `hf auth login`." if entry and entry.gated else ""
        return f"{name}: there is no {source} on the hub, or none that you may see.{hint} ({text})"
    checks = datasets.exceptions.ChecksumVerificationError, datasets.exceptions.SplitsVerificationError
    if isinstance(error, checks):
        return (
            f"{name}: what was downloaded is not what {source} declares; remove it from $HF_HOME/hub and "
            f"$HF_HOME/datasets and run again. ({text})"
        )
    return (
        f"{name}: {source} cannot be fetched. Without a network, set HF_HOME to a cache that holds it, or give a "
        f"local folder in its place; what was downloaded so far is kept. ({text})"
    )


def _labelled(table: datasets.Dataset, entry: HubSet | None) -> bool:
    """Whether a split has labels: secret ones are -1."""
    names = [entry.label] if entry and entry.label else [n for n in LABELS if n in table.column_names]
    return bool(names) and len(table) > 0 and table[names[0]][0] != -1


def _columns(table: datasets.Dataset, entry: HubSet | None, name: str) -> tuple[str, str]:
    features = table.features
    images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = [entry.label] if entry and entry.label else labels or [column for column in LABELS if column in features]
    if not images or not labels:
        raise ValueError(f"{name} holds no labelled images; its columns are {', '.join(features)}")
    return images[0], labels[0]


def _labels(
    table: datasets.Dataset, column: str, names: list[str] | None, name: str
) -> tuple[Int64[Tensor, "n"], tuple[str, ...]]:
    values, kind = table[column][:], table.features[column]
    if isinstance(values[0], str):
        known = sorted(set(values))
        return torch.tensor([known.index(value) for value in values]), tuple(known)
    names = names or (kind.names if isinstance(kind, datasets.ClassLabel) else None)
    if names is None:
        raise ValueError(f"{name} has numbers for labels and no {CLASSES}; put the names there, one to a line")
    labels = torch.tensor(values, dtype=torch.int64)
    if labels.min() < 0 or labels.max() >= len(names):
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(f"{name}: labels run from {low} to {high}, but {len(names)} classes have names")
    return labels, tuple(names)


def _checked(encoded: datasets.Dataset, image: str, name: str) -> tuple[tuple[str, ...], Tensor]:
    """The checksum of every file, and whether it cannot be decoded; found once, and kept by `datasets`."""
    done = encoded.map(
        _check, fn_kwargs={"column": image}, remove_columns=[image], desc=f"checking the images of {name}",
        num_proc=os.cpu_count() if len(encoded) >= MANY else None,
    )  # fmt: skip
    return tuple(done["sha256"][:]), torch.tensor(done["broken"][:])


def _check(row: Mapping[str, dict], column: str) -> dict[str, str | bool]:
    try:
        _decode(row[column])
        broken = False
    except Exception:  # whatever a corrupt file makes a decoder raise
        broken = True
    try:
        return {"sha256": hashlib.sha256(_bytes(row[column])).hexdigest(), "broken": broken}
    except OSError:
        return {"sha256": "", "broken": True}


def _bytes(value: dict) -> bytes:
    return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()


def _decode(value: dict) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # palettes, EXIF
        return Image.open(io.BytesIO(_bytes(value))).convert("RGB")


def _key(table: datasets.Dataset, image: str, row: int) -> str:
    if "__key__" in table.column_names:
        return table["__key__"][row]
    path = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))[row][image]["path"]
    return Path(path).name if path else f"row {row}"
