"""Labelled images of a hub or a local folder: fetched, read in one of three layouts, divided, and checked.

Names of classes and prompt templates come with the set (`classnames.txt`, `zeroshot_classification_templates.txt`, or
the labels themselves), or from the catalogue where the paper's are others.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Int64
from PIL import ImageColor
from torch import Tensor

from residual.data.catalogue import HELD_OUT, SHARES, bounds, catalogue, local_folder
from residual.data.dataset import Dataset
from residual.data.images import BROKEN, MISSING, EncodedImages, checked, rank_in_class
from residual.data.layouts import Rows, read_folder, read_tables
from residual.files import FULL, UNWRITABLE, is_pointer, pointer_fault

CLASSES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
TEMPLATE = "a photo of a {}."  # where a set has none
SYNSET = re.compile(r"n\d{8}")  # WordNet's numbers, by which ImageNet's folders and lists of names are sorted
log = logging.getLogger(__name__)


class DataError(RuntimeError):
    """A data set cannot be fetched, or is not what it should be; says what to do."""


def read_split(name: str, split: str, *, seed: int, ground: str = "white") -> Dataset:
    """One split of a data set of the catalogue, a hub id or a folder, in an order drawn from `seed`.

    Official splits are kept. Without a validation split, a tenth of each class of the training split is held out; a
    set that is not divided is divided 60 : 20 : 20, class by class. The catalogue may have other shares.
    "name@revision" pins a revision. Images that are missing or cannot be decoded are left out and named.
    Raises DataError where a set cannot be fetched or read, and ValueError for one that holds no labelled images.
    """
    ImageColor.getrgb(ground)  # raises ValueError for what is not a colour
    base, _, revision = name.partition("@")
    entry = catalogue().get(base)
    folder = local_folder(name) if entry is None else None
    source = str(folder) if folder else entry.repo if entry else base
    with _explained(name, source, local=folder is not None):
        where, parts = (folder, read_folder(folder)) if folder else _fetched(source, revision or None)
    words = list(entry.names) if entry and entry.names else read_lines(where / CLASSES, name)
    parts, labels, classes = _labelled(parts, words, name)
    if entry and (off := abs(sum(map(len, labels.values())) / (entry.train + entry.test) - 1)) > 0.02:
        log.warning("%s has %.0f %% more or fewer labelled images than it should have", name, 100 * off)
    held_out, shares = (entry.held_out, entry.shares) if entry else (HELD_OUT, SHARES)
    part, rows = _rows_of(labels, split, seed, name, held_out, shares)
    truth = labels[part]
    if split == "train" and entry and entry.limit and len(rows) > entry.limit:
        rows = rows[rank_in_class(truth[rows]).argsort(stable=True)[: entry.limit].sort().values]
    blobs = parts[part].blobs
    checksums, wrong = checked(blobs, rows)
    _tell_wrong(name, split, wrong, blobs.names, len(rows))
    rows = rows[torch.tensor([row in checksums for row in rows.tolist()], dtype=torch.bool)]
    templates = (entry and entry.prompts()) or read_templates(read_lines(where / TEMPLATES, name), name)
    excluded = tuple(blobs.names[row] for row in wrong)
    images = EncodedImages(blobs, checksums, rows, ground)
    return Dataset(folder.name if folder else name, split, images, truth[rows], classes, templates, excluded=excluded)


def _tell_wrong(name: str, split: str, wrong: dict[int, str], names: tuple[str, ...], count: int) -> None:
    """Warn of images that are missing, and of others that cannot be decoded. Raises ValueError where none is left."""
    for reason in (MISSING, BROKEN):
        if them := [names[row] for row, found in wrong.items() if found == reason]:
            told = f"{name}, {split}: {len(them)} of {count} images {reason} and are left out: {', '.join(them[:5])}"
            log.warning("%s%s", told, " ..." * (len(them) > 5))
    if len(wrong) == count:
        row, reason = next(iter(wrong.items()))
        raise ValueError(f"{name}: not one image of {split} can be read: they {reason}, such as {names[row]}")


def _labelled(
    parts: dict[str, Rows], words: list[str] | None, name: str
) -> tuple[dict[str, Rows], dict[str, Int64[Tensor, "n"]], tuple[str, ...]]:
    """Splits with labels, -1 where an image has none, and the names of the classes, the same for all splits.

    words: the lines of the set's classnames.txt. Whole numbers, or folders named by them, are lines, counted from 0.
    Raises ValueError where labels and names do not fit.
    """
    values = {split: [_plain(value) for value in part.labels] for split, part in parts.items()}
    known = {value for own in values.values() for value in own if value is not None}
    if not known:
        raise ValueError(f"{name} has no labelled split: labels are empty in {', '.join(parts)}")
    if all(isinstance(value, str) for value in known) and not (words and all(value.isdecimal() for value in known)):
        found = sorted(known)
        classes = _named(found, words, name, by_folder=any(part.by_folder for part in parts.values()))
        index = {value: i for i, value in enumerate(found)}
    else:
        classes, index = _numbered(known, words, name)
    alike: dict[str, list[str]] = {}
    for word in classes:
        alike.setdefault(_spoken(word), []).append(word)
    if repeated := [", ".join(words) for words in alike.values() if len(words) > 1]:
        log.warning("%s: names of classes repeat, as they are said: %s", name, "; ".join(repeated[:5]))
    labels = {s: torch.tensor([index.get(v, -1) for v in own], dtype=torch.int64) for s, own in values.items()}
    for split, own in labels.items():
        if bare := int((own < 0).sum()):
            log.warning("%s, %s: %d of %d images have no label and are left out", name, split, bare, len(own))
    labels = {split: own for split, own in labels.items() if (own >= 0).any()}
    if "test" not in labels and {"train", "validation"} <= set(labels):
        labels["test"] = labels.pop("validation")  # ImageNet's test labels are secret
        parts = parts | {"test": parts["validation"]}
    return parts, labels, tuple(classes)


def _plain(value: object) -> str | int | float | None:
    """A label without blanks at its ends, in one form of Unicode; None for a missing one."""
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value).strip() or None
    return None if value is None or value != value else value


def _numbered(known: set, words: list[str] | None, name: str) -> tuple[list[str], dict[object, int]]:
    """Classes, and labels by number. Raises ValueError for what is no whole number, and for numbers without a name."""
    if odd := [
        value
        for value in known
        if not str(value).isdecimal() and not (isinstance(value, float) and value >= 0 and value == int(value))
    ]:
        raise ValueError(f"{name}: labels are not whole numbers, such as {odd[0]!r}")
    index = {value: int(value) for value in known}
    if len(set(index.values())) < len(known):
        shown = ", ".join(sorted(map(str, known))[:5])
        raise ValueError(f"{name}: several folders have one number, such as two of {shown}; rename them")
    if words is None:
        raise ValueError(f"{name} has numbers for labels and no {CLASSES}; put the names there, one to a line")
    if (high := max(index.values())) >= len(words):
        raise ValueError(
            f"{name}: labels run from {min(index.values())} to {high}, but {len(words)} classes have names, which are "
            f"counted from 0; number the classes from 0, or complete {CLASSES}"
        )
    if min(index.values()) > 0:
        log.warning("%s: no class has the number 0, the first line of %s, %r", name, CLASSES, words[0])
    return words, index


def _named(found: list[str], words: list[str] | None, name: str, *, by_folder: bool) -> list[str]:
    """Names of classes, as a list writes them. Raises ValueError where folders and a list do not name the same."""
    if words is None:
        return found
    spoken = {_spoken(word): word for word in words}
    if set(spoken) == set(map(_spoken, found)) and len(spoken) == len(words):
        return [spoken[_spoken(own)] for own in found]
    if by_folder and len(words) != len(found):
        raise ValueError(f"{name}: {CLASSES} names {len(words)} classes, but labels have {len(found)}")
    if all(map(SYNSET.fullmatch, found)) and len(words) == len(found):
        return words
    if by_folder:
        raise ValueError(
            f"{name}: the names in {CLASSES} ({', '.join(words[:5])}, ...) are not those of the folders "
            f"({', '.join(found[:5])}, ...), so which is which is not certain; name the folders by numbers from 0, the "
            "lines of the list, or as the list does"
        )
    log.warning("%s: labels are words already, so %s is not read", name, CLASSES)
    return found


def _spoken(name: str) -> str:
    """A class's name as it is said, whatever joins its words."""
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


def _rows_of(
    labels: dict[str, Tensor], split: str, seed: int, name: str, held_out: float, shares: tuple[float, float]
) -> tuple[str, Int64[Tensor, "n"]]:
    """The part that holds a split, and the split's rows in it, in random order."""
    if undivided := not {"train", "test"} <= set(labels):
        if len(labels) > 1:
            raise ValueError(f"{name} has the splits {', '.join(labels)}; divide it into train and test, or not at all")
        part, (low, high) = next(iter(labels)), bounds(shares)[split]
    else:
        official = split in labels and (split != "train" or "validation" in labels)
        part = split if official else "test" if split == "test" else "train"
        low, high = (0.0, 1.0) if official else (1 - held_out, 1.0) if split == "validation" else (0.0, 1 - held_out)
    truth = labels[part]
    rows = torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))
    rows = rows[truth[rows] >= 0]
    ranks = rank_in_class(truth[rows])
    sizes = torch.bincount(truth[rows])[truth[rows]]
    first, last = (torch.zeros_like(sizes) if b == 0 else (b * sizes).long().clamp(min=1) for b in (low, high))
    rows = rows[(ranks >= first) & (ranks < last)]
    if len(rows) == 0:
        why = "it is too small to be divided" if undivided else "too few images to hold some out"
        raise ValueError(f"{name} has no image left for {split}: {why}")
    return part, rows


@functools.lru_cache(maxsize=4)
def _fetched(repo: str, revision: str | None) -> tuple[Path, dict[str, Rows]]:
    """Texts and splits of a set of a hub: its tars, or what `datasets` fetches."""
    import datasets
    from huggingface_hub import snapshot_download

    wanted = ["README.md", CLASSES, TEMPLATES, "*.tar"]
    where = Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=wanted))
    if any(where.rglob("*.tar")):
        return where, read_folder(where)
    commit = where.name  # also where a branch, or none, was asked for
    return where, read_tables(repo, datasets.load_dataset(repo, revision=commit), f"{repo} {commit}")


@contextlib.contextmanager
def _explained(name: str, source: str, *, local: bool) -> Iterator[None]:
    """Errors of hubs and files with what to do; a ValueError of ours passes."""
    try:
        yield
    except Exception as error:  # whatever loaders and connections below them raise
        if type(error) is ValueError:  # ours; those of libraries are often of other kinds of it
            raise
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if isinstance(error, OSError) and error.errno in (*UNWRITABLE, *FULL):
            why = "there is no room left" if error.errno in FULL else "it cannot be written"
            advice = f"{why} where HF_HOME (or HF_DATASETS_CACHE) points; free some, or set another folder"
        elif local:
            advice = "a file in it cannot be read, and may be damaged"
        elif type(error).__name__ == "GatedRepoError" or "is a gated dataset" in text:
            advice = f"{source} is gated: ask for access on its page, then log in with `hf auth login` and run again"
        else:
            advice = (
                f"{source} cannot be fetched; what was downloaded so far is kept. Check the name, connect, set HF_HOME "
                "to a cache that holds it, or give a local folder"
            )
        raise DataError(f"{name}: {advice}. ({text})") from error


def read_lines(path: Path, name: str) -> list[str] | None:
    """The lines of a text file of a set, without blanks at their ends; None where there is no such file.

    Raises ValueError for a blank line among others: it would shift all names after it.
    """
    if not path.is_file():
        return None
    if is_pointer(path):
        raise ValueError(f"{name}: {pointer_fault(path)}")
    try:
        text = unicodedata.normalize("NFC", path.read_text(encoding="utf-8-sig"))
        lines = [line.strip() for line in text.strip().split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {path.name} is not UTF-8 text: {error}") from error
    if "" in lines[:-1]:
        raise ValueError(f"{name}: line {lines.index('') + 1} of {path.name} is blank")
    return [line for line in lines if line] or None


def read_templates(lines: list[str] | None, name: str) -> tuple[str, ...]:
    """Prompt templates with one `{}` each, from lines with `{c}` or `{}`; other braces are doubled for `format`."""
    marked = [re.sub(r"\{c?\}", "\0", line) for line in lines or ()]
    if bad := [line for line in marked if line.count("\0") != 1]:
        log.warning("%s: %d templates without a place for the class are left out: %s", name, len(bad), bad[0])
    good = [line.replace("{", "{{").replace("}", "}}").replace("\0", "{}") for line in marked if line not in bad]
    return tuple(good) or (TEMPLATE,)
