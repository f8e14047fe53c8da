"""How a data set is laid out on disk: the files of each split, the columns of image and label, the names of classes.

`datasets` goes by words anywhere in a path and by the most frequent file ending: a class called "train" loses its
images, and a text file beside the only tar of a split turns the set into text. So tars and image folders are listed
to it file by file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from glob import escape
from pathlib import Path

import datasets
import torch
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from jaxtyping import Int64
from torch import Tensor

SPLIT_WORDS = {
    "train": ("train", "training", "trainset"),
    "validation": ("validation", "valid", "val", "dev", "valset"),
    "test": ("test", "testing", "testset", "eval", "evaluation"),
}
IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
LABELS = (
    "cls", "label", "labels", "fine_label", "class", "target", "category", "class_id", "species", "class_name",
    "label_name", "label_text", "y",
)  # fmt: skip
TARS = (".tar", ".tar.gz", ".tgz")
TABLES = (".parquet", ".arrow", ".csv", ".json", ".jsonl")
CLASSES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
TEMPLATE = "a photo of a {}."  # where a set has none

log = logging.getLogger(__name__)


def data_files(folder: Path) -> tuple[str, dict[str, list[str]]] | None:
    """The builder of `datasets` for a folder of tars or images by class, and the files of each split.

    None for others (parquet, a card with `configs:`), which `datasets` itself understands.
    """
    card = folder / "README.md"
    if card.is_file() and re.search(r"^configs:", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE):
        return None
    near = [path for depth in ("*", "*/*") for path in sorted(folder.glob(depth)) if _visible(path.relative_to(folder))]
    if tars := [path for path in near if path.name.lower().endswith(TARS) and path.is_file()]:
        return "webdataset", _by_split({escape(str(path)): path.relative_to(folder).parts for path in tars}, folder)
    if any(path.name.endswith(TABLES) and not path.name.startswith("metadata.") for path in near):
        return None
    splits = [path for path in near if path.parent == folder and path.is_dir() and split_of(path.name)]
    patterns = {f"{escape(str(path))}/{depth}": (path.name,) for path in splits if (depth := _image_pattern(path))}
    if not patterns:  # classes, or images with a table of their labels, without splits
        depth = _image_pattern(folder)
        return ("imagefolder", {"train": [f"{escape(str(folder))}/{depth}"]}) if depth else None
    folders = {path.name for path in near if path.parent == folder and path.is_dir()}
    if ignored := sorted(folders - {split for (split,) in patterns.values()}):
        log.warning("%s: ignored %s, which hold no split, or no images by class", folder.name, ", ".join(ignored))
    return "imagefolder", _by_split(patterns, folder)


def split_of(word: str) -> str | None:
    """The split that a word stands for, in any case: "Training" is "train"."""
    return next((split for split, words in SPLIT_WORDS.items() if word.lower() in words), None)


def _by_split(files: Mapping[str, tuple[str, ...]], folder: Path) -> dict[str, list[str]]:
    """Files by the first of their parts that names a split. If none does, all are one split."""
    by_split: dict[str | None, list[str]] = {}
    for file, parts in files.items():
        words = [*parts[:-1], re.split(r"[-_. 0-9]", parts[-1])[0]]
        by_split.setdefault(next(filter(None, map(split_of, words)), None), []).append(file)
    if (rest := by_split.pop(None, [])) and by_split:
        log.warning("%s: ignored %d files that belong to no split, such as %s", folder.name, len(rest), rest[0])
    return by_split or {"train": rest}


def _image_pattern(folder: Path) -> str:
    """A pattern for images by class below a folder, or for all where a table names the labels; "" without either."""
    visible = [path for path in folder.iterdir() if _visible(path.relative_to(folder))]
    if any(path.name in ("metadata.csv", "metadata.jsonl") for path in visible):
        return "**"
    endings = tuple(ImageFolder.EXTENSIONS)
    files = (file for path in visible if path.is_dir() for file in path.rglob("*"))
    return "*/**" if any(file.name.lower().endswith(endings) for file in files) else ""


def _visible(path: Path) -> bool:
    return not any(part.startswith((".", "__")) for part in path.parts)


def image_column(features: datasets.Features, name: str) -> str:
    """The column of images, encoded by `datasets` or as bytes. Raises ValueError for none, and for several alike."""
    kinds = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    kinds = kinds or [column for column, kind in features.items() if _holds_bytes(kind) and _rank(column, IMAGES) < 99]
    best = sorted(kinds, key=lambda column: _rank(column, IMAGES))
    if not best or (len(best) > 1 and _rank(best[0], IMAGES) == 99):
        what = f"several columns of images, {', '.join(best)}, and none called image" if best else "no labelled images"
        raise ValueError(f"{name} holds {what}; its columns are {', '.join(features)}")
    return best[0]


def label_column(features: datasets.Features, name: str, *, named: bool) -> str:
    """The column of labels, by its name, or the only one of the type for classes. Raises ValueError for none.

    named: whether classnames.txt names the classes; if not, words are preferred to numbers.
    """
    columns = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    words = (
        () if named else [c for c, kind in features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    )
    likely = [column for column in features if _rank(column, LABELS) < 99]
    likely.sort(key=lambda column: (column not in columns, column not in words, _rank(column, LABELS)))
    best = likely or (columns if len(columns) == 1 else []) or [column for column in features if column == "txt"]
    if not best:
        raise ValueError(
            f"{name} holds no labelled images: of its columns, {', '.join(features)}, none is called "
            f"{', '.join(LABELS)}. In a folder, images must lie in one folder for each class, all at one depth"
        )
    if not isinstance(features[best[0]], datasets.ClassLabel | datasets.Value):
        raise ValueError(f"{name}: {best[0]} does not hold one label for an image, but {features[best[0]]}")
    return best[0]


def _rank(column: str, names: tuple[str, ...]) -> int:
    """A column's place among names, in any case, for any of its parts: "json.label" is a label."""
    places = [names.index(part) for part in column.lower().split(".") if part in names]
    return min(places, default=99)


def _holds_bytes(kind: object) -> bool:
    if isinstance(kind, dict):
        return set(kind) == {"bytes", "path"}
    return isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary")


def read_labels(
    tables: Mapping[str, datasets.Dataset], column: str, words: list[str] | None, name: str
) -> tuple[dict[str, Int64[Tensor, "n"]], tuple[str, ...]]:
    """Labels of every split, -1 where there is none, and the names of the classes, the same for all splits.

    words: the lines of the set's classnames.txt. Raises ValueError where labels and names do not fit.
    """
    kind = next(iter(tables.values())).features[column]
    values = {split: table[column][:] for split, table in tables.items()}
    known = {value for column in values.values() for value in column if value is not None}
    if not known:
        raise ValueError(f"{name} has no labelled split: {column} is empty in {', '.join(tables)}")
    if all(isinstance(value, str) for value in known):
        if not (words and all(value.strip().isdigit() for value in known)):
            names = tuple(sorted(known))
            index = {text: i for i, text in enumerate(names)}
            return {split: _tensor(map(index.get, words)) for split, words in values.items()}, names
    elif any(int(value) != value for value in known):
        raise ValueError(f"{name}: labels are not whole numbers, such as {next(v for v in known if int(v) != v)}")
    names = words
    if isinstance(kind, datasets.ClassLabel):
        if words and len(words) != len(kind.names):
            raise ValueError(f"{name}: {CLASSES} names {len(words)} classes, but labels have {len(kind.names)}")
        names = words if words and set(words) != set(kind.names) else kind.names
    if names is None:
        raise ValueError(f"{name} has numbers for labels and no {CLASSES}; put the names there, one to a line")
    labels = {split: _tensor(numbers) for split, numbers in values.items()}
    low, high = (end(int(end(numbers)) for numbers in labels.values() if len(numbers)) for end in (min, max))
    if low < -1 or high >= len(names):
        raise ValueError(f"{name}: labels run from {low} to {high}, but {len(names)} classes have names")
    return labels, tuple(names)


def _tensor(values: Iterable[object]) -> Int64[Tensor, "n"]:
    return torch.tensor([-1 if value is None else int(value) for value in values], dtype=torch.int64)


def read_lines(path: Path, name: str) -> list[str] | None:
    """The lines of a text file of a set, without blanks at their ends; None where there is no such file.

    Raises ValueError for a blank line among others: it would shift all names after it.
    """
    if not path.is_file():
        return None
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").strip().split("\n")]
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
