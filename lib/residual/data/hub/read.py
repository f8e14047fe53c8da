"""Labelled images of a hub or a local folder, read by `datasets`: webdataset tars, parquet and image folders.

Images stay encoded until an encoder asks for them. Names of classes and prompt templates come with the set
(`classnames.txt`, `zeroshot_classification_templates.txt`, or the type of the labels), or from the catalogue where the
paper's are others.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from jaxtyping import Int64
from PIL import ImageColor
from torch import Tensor
from tqdm.auto import tqdm

from residual.data.hub.catalogue import HELD_OUT, SHARES, HubSet, bounds, catalogue, local_folder
from residual.data.hub.layouts import (
    CLASSES,
    TARS,
    TEMPLATES,
    by_column,
    data_files,
    image_column,
    label_column,
    named_by_table,
    read_labels,
    read_lines,
    read_templates,
    split_of,
)  # fmt: skip
from residual.data.images import DECODING, EncodedImages, decode, encoded_bytes, rank_in_class
from residual.files import FULL, UNWRITABLE, is_pointer, locked, write_bytes

MANY = 2000  # images, from which on several processes check them
Tables = dict[str, datasets.Dataset]  # by split

log = logging.getLogger(__name__)


class DataError(RuntimeError):
    """A data set cannot be fetched, or is not what it should be; says what to do."""


@dataclass(frozen=True, eq=False)
class HubSplit:
    """A split as `Dataset` wants it. excluded: images that cannot be decoded, by key."""

    images: EncodedImages
    labels: Int64[Tensor, "n"]
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    excluded: tuple[str, ...]


def read_split(name: str, split: str, *, seed: int, cache: Path, ground: str = "white") -> HubSplit:
    """One split of a data set of the catalogue, a hub id or a folder, in an order drawn from `seed`.

    Official splits are kept. Without a validation split, a tenth of each class of the training split is held out; a
    set that is not divided is divided 60 : 20 : 20, class by class. The catalogue may have other shares.
    "name@revision" pins a revision; else the first one that was fetched stays, recorded in `cache`. Images that cannot
    be decoded are left out and named.
    Raises DataError where a set cannot be fetched or read, and ValueError for one that holds no labelled images.
    """
    ImageColor.getrgb(ground)  # raises ValueError for what is not a colour
    base, _, revision = name.partition("@")
    entry = catalogue().get(base)
    folder = local_folder(name) if entry is None else None
    source = str(folder) if folder else entry.repo if entry else base
    with _explained(name, source, entry, local=folder is not None):
        where = folder or _fetched(source, revision := revision or _pinned(source, cache))
    layout = data_files(where)
    with _explained(name, source, entry, local=folder is not None):
        loaded = _load(source, layout, None if folder else revision, cache)
    by_folder = layout is not None and layout[0] == "imagefolder"
    if by_folder:
        _count_images(where, loaded, name)
    words = list(entry.names) if entry and entry.names else read_lines(where / CLASSES, name)
    tables, labels, classes = _splits(loaded, words, name, by_folder=by_folder)
    if entry and (off := abs(sum(map(len, tables.values())) / (entry.train + entry.test) - 1)) > 0.02:
        log.warning("%s has %.0f %% more or fewer labelled images than it should have", name, 100 * off)
    held_out, shares = (entry.held_out, entry.shares) if entry else (HELD_OUT, SHARES)
    table, truth, rows = _rows_of(tables, labels, split, seed, name, held_out, shares)
    if split == "train" and entry and entry.limit and len(rows) > entry.limit:
        rows = rows[rank_in_class(truth[rows]).argsort(stable=True)[: entry.limit].sort().values]
    images, whole, excluded = _decodable(table.select(rows.tolist()), rows, split, name, folder)
    templates = (entry and entry.prompts()) or read_templates(read_lines(where / TEMPLATES, name), name)
    return HubSplit(replace(images, ground=ground), truth[rows][whole], classes, templates, excluded)


def _count_images(folder: Path, loaded: Mapping[str, datasets.Dataset], name: str) -> None:
    """Warn of images in a folder that its table of labels does not name."""
    inside, found = named_by_table(folder), sum(map(len, loaded.values()))
    if inside and found < inside:
        told = "%s: %d of %d images in the folder are left out, as no table names them"
        log.warning(told, name, inside - found, inside)


def _rows_of(
    tables: Tables,
    labels: dict[str, Tensor],
    split: str,
    seed: int,
    name: str,
    held_out: float,
    shares: tuple[float, float],
) -> tuple[datasets.Dataset, Int64[Tensor, "m"], Int64[Tensor, "n"]]:
    """The table and labels that hold a split, and the split's rows in random order."""
    if undivided := not {"train", "test"} <= set(tables):
        table, truth = datasets.concatenate_datasets(list(tables.values())), torch.cat(list(labels.values()))
        low, high = bounds(shares)[split]
    else:
        official = split in tables and (split != "train" or "validation" in tables)
        part = split if official else "test" if split == "test" else "train"
        table, truth = tables[part], labels[part]
        low, high = (0.0, 1.0) if official else (1 - held_out, 1.0) if split == "validation" else (0.0, 1 - held_out)
    rows = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
    rows = rows[truth[rows] >= 0]
    ranks = rank_in_class(truth[rows])
    sizes = torch.bincount(truth[rows])[truth[rows]]
    first, last = (torch.zeros_like(sizes) if b == 0 else (b * sizes).long().clamp(min=1) for b in (low, high))
    rows = rows[(ranks >= first) & (ranks < last)]
    if len(rows) == 0:
        why = "it is too small to be divided" if undivided else "too few images to hold some out"
        raise ValueError(f"{name} has no image left for {split}: {why}")
    return table, truth, rows


def _decodable(
    table: datasets.Dataset, rows: Tensor, split: str, name: str, folder: Path | None
) -> tuple[EncodedImages, Int64[Tensor, "n"], tuple[str, ...]]:
    """The images of a table that can be decoded, their rows in it, and the names of the others."""
    image = image_column(table.features, name)
    encoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    checksums, broken = _checked(encoded, image, name)
    excluded = tuple(_key(table, encoded, at, int(rows[at]), folder) for at in broken.nonzero()[:, 0].tolist())
    if excluded:
        shown = ", ".join(excluded[:5]) + (" ..." if len(excluded) > 5 else "")
        message = "%s, %s: %d of %d images cannot be decoded and are left out: %s"
        log.warning(message, name, split, len(excluded), len(table), shown)
    if broken.all():
        first = next(iter(encoded[0].values())) or {}
        pointer = "; they are pointers of git-LFS: run `git lfs pull` there" * is_pointer(Path(first.get("path") or ""))
        raise ValueError(f"{name}: not one image of {split} can be decoded{pointer}")
    whole = (~broken).nonzero()[:, 0]
    return EncodedImages(encoded, checksums, whole), whole, excluded


@functools.cache
def _fetched(repo: str, revision: str) -> Path:
    """A snapshot of a set's tars and texts. Files of other formats are fetched by `datasets` itself."""
    wanted = [".gitattributes", "README.md", CLASSES, TEMPLATES, *(f"*{ending}" for ending in TARS)]
    options = {"repo_type": "dataset", "revision": revision, "allow_patterns": wanted, "tqdm_class": _LateBar}
    return Path(snapshot_download(repo, **options))


class _LateBar(tqdm):
    """A progress bar for what takes more than three seconds, not for a look at the cache."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **{"delay": 3} | options)


def _load(
    source: str, layout: tuple[str, dict[str, list[str]]] | None, revision: str | None, cache: Path
) -> Mapping[str, datasets.Dataset]:
    """All splits. Where the cache of `datasets` cannot be written, they are kept in ours."""
    builder, files = layout or (source, None)
    options = {"data_files": files} if layout else {"revision": revision}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a folder without a card
        try:
            return datasets.load_dataset(builder, **options)
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            log.warning("the cache of `datasets` is not writable; using %s: %s", cache / "datasets", error)
            return datasets.load_dataset(builder, cache_dir=str(cache / "datasets"), **options)


def _splits(
    loaded: Mapping[str, datasets.Dataset], words: list[str] | None, name: str, *, by_folder: bool
) -> tuple[Tables, dict[str, Tensor], tuple[str, ...]]:
    """Tables of images and labels of every split that has labels, by our names of splits; and the classes."""
    tables = {ours: loaded[theirs] for theirs in loaded if (ours := split_of(theirs))}
    if not tables and len(loaded) == 1:
        tables = {"train": next(iter(loaded.values()))}
    if len(tables) == 1:
        tables = by_column(next(iter(tables.values()))) or tables
    if not tables:
        raise ValueError(f"{name} has no split called train or test; its splits are {', '.join(loaded)}")
    image = image_column(next(iter(tables.values())).features, name)
    tables = {split: table.cast_column(image, datasets.Image()).flatten() for split, table in tables.items()}
    label = label_column(next(iter(tables.values())).features, name, named=words is not None)
    labels, classes = read_labels(tables, label, words, name, by_folder=by_folder)
    for split, values in labels.items():
        if bare := int((values < 0).sum()):
            log.warning("%s, %s: %d of %d images have no label and are left out", name, split, bare, len(values))
    tables = {
        split: table.select_columns([image, *({"__key__"} & set(table.column_names))])
        for split, table in tables.items() if (labels[split] >= 0).any()
    }  # fmt: skip
    if not tables:
        raise ValueError(f"{name} has no labelled split; its splits are {', '.join(loaded)}")
    if "test" not in tables and "train" in tables and "validation" in tables:
        tables["test"] = tables.pop("validation")  # ImageNet's test labels are secret
        labels["test"] = labels.pop("validation")
    return tables, {split: labels[split] for split in tables}, classes


def _pinned(repo: str, cache: Path) -> str:
    """The revision of a set that was fetched first, or now."""
    path = cache / "revisions.json"
    if repo in (known := _revisions(path)):
        return known[repo]
    sha = HfApi().dataset_info(repo).sha
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock"), str(path)):
            known = {repo: sha} | _revisions(path)
            write_bytes(path, json.dumps(known, indent=2).encode())
    except OSError as error:
        log.warning("revision %s of %s could not be recorded; next time it may be another: %s", sha, repo, error)
    return known.get(repo, sha)


def _revisions(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        log.warning("%s is damaged (%s); revisions are recorded again", path, error)
        return {}


@contextlib.contextmanager
def _explained(name: str, source: str, entry: HubSet | None, *, local: bool) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever loaders, decoders and connections below them raise
        raise DataError(_explain(name, source, local, entry, error)) from error


def _explain(name: str, source: str, local: bool, entry: HubSet | None, error: Exception) -> str:
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    kinds, cause = tuple(map(type, chain)), chain[-1]
    text = f"{type(error).__name__}: {error}" + (f" ({type(cause).__name__}: {cause})" if cause is not error else "")
    if isinstance(cause, OSError) and cause.errno in (*UNWRITABLE, *FULL):
        why = "there is no room left" if cause.errno in FULL else "it cannot be written"
        return f"{name}: {why} where HF_HOME (or HF_DATASETS_CACHE) points; free some, or set another folder. ({text})"
    if local:
        return f"{name} cannot be read as webdataset tars, parquet or an image folder: {text}"
    if GatedRepoError in kinds or "is a gated dataset" in text:
        return (
            f"{name}: {source} is gated. Ask for access on its page on the hub, then log in with `hf auth login` "
            f"(or set HF_TOKEN) and run again. ({text})"
        )
    if {datasets.exceptions.DatasetNotFoundError, RepositoryNotFoundError} & {*kinds}:
        hint = " It asks for access: see its page, then `hf auth login`." if entry and entry.gated else ""
        return f"{name}: there is no {source} on the hub, or none that you may see.{hint} ({text})"
    checks = datasets.exceptions.ChecksumVerificationError, datasets.exceptions.SplitsVerificationError
    if isinstance(error, checks):
        return (
            f"{name}: what was downloaded is not what {source} declares; remove it from $HF_HOME/hub and "
            f"$HF_HOME/datasets and run again. ({text})"
        )
    return f"{name}: {source} cannot be fetched; what was downloaded so far is kept. Connect, set HF_HOME to a cache that holds it, or give a local folder. ({text})"


def _checked(encoded: datasets.Dataset, image: str, name: str) -> tuple[tuple[str, ...], Tensor]:
    """The checksum of every file, and whether it cannot be decoded; computed once, and kept by `datasets`."""
    options = {
        "fn_kwargs": {"column": image, "decoding": DECODING}, "remove_columns": [image],
        "desc": f"checking the images of {name}",
        "num_proc": _cores() if len(encoded) >= MANY else None,
    }  # fmt: skip
    try:
        done = encoded.map(_check, **options)
    except Exception as error:  # a full or unwritable disk, or a damaged file of results, makes it raise anything
        log.warning("checksums of the images of %s cannot be kept, and are computed again next time: %s", name, error)
        done = encoded.map(_check, keep_in_memory=True, load_from_cache_file=False, **options)
    return tuple(done["sha256"][:]), torch.tensor(done["broken"][:])


def _cores() -> int:
    """The cores that this process may use: on a cluster, not all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(row: Mapping[str, dict], column: str, decoding: int) -> dict[str, str | bool]:
    """decoding: a part of the key under which `datasets` keeps the answers."""
    try:
        data = encoded_bytes(row[column])
    except (OSError, TypeError):  # there is no file, or no image in the row
        return {"sha256": "", "broken": True}
    try:
        decode(data)
        broken = False
    except Exception:  # whatever a corrupt file makes a decoder raise
        broken = True
    return {"sha256": hashlib.sha256(data).hexdigest(), "broken": broken}


def _key(table: datasets.Dataset, encoded: datasets.Dataset, at: int, row: int, folder: Path | None) -> str:
    """An image's name in its source: its key, its file, or its row."""
    if "__key__" in table.column_names:
        return table["__key__"][at]
    path = (next(iter(encoded[at].values())) or {}).get("path")
    if not path:
        return f"row {row}"
    return str(Path(path).relative_to(folder)) if folder and Path(path).is_relative_to(folder) else Path(path).name
