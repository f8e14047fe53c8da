"""How a data set is laid out on disk: the files of each split, the columns of image and label, the names of classes.

`datasets` goes by words anywhere in a path and by the most frequent file ending: a class called "train" loses its
images, and a text file beside the only tar of a split turns the set into text. So tars and image folders are listed
to it file by file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from glob import escape
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import torch
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from jaxtyping import Int64
from torch import Tensor

from residual.files import is_pointer, pointer_fault

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
ENDINGS = tuple(ImageFolder.EXTENSIONS)
NO_LINKS = "is a symbolic link to a folder, which is not followed; copy the folder, or give the one that it points to"
PICKLE = "a pickle, which could run a program when it is read, and is never opened"
SYNSET = re.compile(r"n\d{8}")  # WordNet's numbers, by which ImageNet's folders and lists of names are sorted

log = logging.getLogger(__name__)


def data_files(folder: Path) -> tuple[str, dict[str, list[str]]] | None:
    """The builder of `datasets` for a folder of tars or images by class, and the files of each split.

    None for others (parquet, a card with `configs:`), which `datasets` itself understands.
    """
    card = folder / "README.md"
    if card.is_file() and re.search(r"^configs:", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE):
        return None
    near = [path for depth in ("*", "*/*") for path in sorted(folder.glob(depth)) if _visible(path.relative_to(folder))]
    _check_one_kind(folder, near)
    _check_names(folder, near)
    pickles = [path for path in near if path.suffix.lower() in (".pkl", ".pickle", ".pk", ".joblib")]
    for path in pickles:
        log.warning("%s: left out %s, %s", folder.name, path.relative_to(folder), PICKLE)
    if tars := [path for path in near if path.name.lower().endswith(TARS) and path.is_file()]:
        return "webdataset", _by_split({escape(str(path)): path.relative_to(folder).parts for path in tars}, folder)
    if tables := [path for path in near if path.name.endswith(TABLES) and not path.name.startswith("metadata.")]:
        _check_tables(folder, tables)
        return None
    splits = [path for path in near if path.parent == folder and path.is_dir() and split_of(path.name)]
    linked = [path.name for path in near if path.parent == folder and path.is_dir() and path.is_symlink()]
    if linked:
        raise ValueError(f"{folder.name}: {linked[0]} {NO_LINKS}")
    if len(splits) > 1 and (table := next((p for p in near if p.parent == folder and _metadata(p)), None)):
        raise ValueError(
            f"{folder.name}: {table.name} lies beside the folders of the splits ({', '.join(p.name for p in splits)}), "
            "and `datasets` would give each split the images of all; put into each folder a table of its own images"
        )
    patterns = {f"{escape(str(path))}/{depth}": (path.name,) for path in splits if (depth := _image_pattern(path))}
    if not patterns:  # classes, or images with a table of their labels, without splits
        depth = _image_pattern(folder)
        if not depth and pickles:
            raise ValueError(f"{folder.name} holds {pickles[0].name}, {PICKLE}; give images, tars, parquet or CSV")
        return ("imagefolder", {"train": [f"{escape(str(folder))}/{depth}"]}) if depth else None
    folders = {path.name for path in near if path.parent == folder and path.is_dir()}
    if ignored := sorted(folders - {split for (split,) in patterns.values()}):
        log.warning("%s: ignored %s, which hold no split, or no images by class", folder.name, ", ".join(ignored))
    return "imagefolder", _by_split(patterns, folder)


def _check_one_kind(folder: Path, near: list[Path]) -> None:
    """Raises ValueError where a tar or a table lies beside folders of images: either could be the data set."""
    images = {p.parent.name for p in near if p.parent.parent == folder and p.name.lower().endswith(ENDINGS)}
    beside = [path for path in near if path.is_file() and path.parent == folder]
    other = [p for p in beside if p.name.lower().endswith((*TARS, ".csv", ".json", ".jsonl")) and not _metadata(p)]
    if len(images) > 1 and other:
        raise ValueError(
            f"{folder.name} holds {other[0].name} beside folders of images ({', '.join(sorted(images)[:5])}); move "
            "away the one that is not the data set"
        )


def _check_names(folder: Path, near: list[Path]) -> None:
    """Raises ValueError for files that git-LFS has not fetched, and for names that `datasets` passes over."""
    if pointer := next(filter(is_pointer, near), None):
        raise ValueError(f"{folder.name}: {pointer_fault(pointer)}")
    if hidden := next((path for path in near if path.name.startswith("__")), None):
        raise ValueError(f"{folder.name}: `datasets` passes over {hidden.name}, as its name starts with __; rename it")


def _check_tables(folder: Path, tables: list[Path]) -> None:
    """Warn of tables that belong to no split beside others that do. Raises ValueError where parquet files disagree.

    `datasets` takes the names of classes from the first file, and reads the labels of all others by them.
    """
    words = {path: re.split(r"[-_. 0-9]", path.name)[0] for path in tables}
    known = [path for path in tables if any(map(split_of, (words[path], *path.relative_to(folder).parts[:-1])))]
    if known and (rest := [path.name for path in tables if path not in known]):
        log.warning("%s: ignored %d tables that belong to no split, such as %s", folder.name, len(rest), rest[0])
    names: dict[str, tuple[list[str], Path]] = {}
    for path in (path for path in tables if path.suffix == ".parquet"):
        for column, kind in datasets.Features.from_arrow_schema(pq.read_schema(path)).items():
            if isinstance(kind, datasets.ClassLabel):
                first, where = names.setdefault(column, (kind.names, path))
                if first != kind.names:
                    raise ValueError(
                        f"{folder.name}: {where.name} and {path.name} have the classes of {column} in different orders "
                        f"({', '.join(first[:5])} and {', '.join(kind.names[:5])}); write both with the same"
                    )


def _metadata(path: Path) -> bool:
    """Whether a file is the table by which `datasets` labels the images of a folder."""
    return path.name in ("metadata.csv", "metadata.jsonl", "metadata.parquet")


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
    if any(map(_metadata, visible)):
        return "**"
    classes = {path.name: _files_of_class(path) for path in visible if path.is_dir()}
    if not any(images for images, _ in classes.values()):
        return ""
    others = [file for _, others in classes.values() for file in others]
    if bare := sorted(name for name, (images, rest) in classes.items() if rest and not images):
        kinds = ", ".join(sorted({file.suffix.lower() or file.name for file in others}))
        raise ValueError(
            f"{folder.name}: no file of the class {bare[0]} is an image that can be read ({kinds}); convert them, to "
            "PNG or JPEG for example, or move the folder away"
        )
    if loose := [path for path in visible if path.is_file() and path.name.lower().endswith(ENDINGS)]:
        told = "%s: %d images lie in no folder of a class, and are left out, such as %s"
        log.warning(told, folder.name, len(loose), loose[0].name)
    if others:
        told = "%s: %d files in folders of classes are not images that can be read, and are left out, such as %s"
        log.warning(told, folder.name, len(others), others[0].relative_to(folder))
    return "*/**"


def _files_of_class(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images of a class, and its other files. Raises ValueError for links and for folders in the folder."""
    inside = [path for path in sorted(folder.rglob("*")) if _visible(path.relative_to(folder))]
    if linked := next((path for path in (folder, *inside) if path.is_dir() and path.is_symlink()), None):
        raise ValueError(f"{folder.parent.name}: {linked.name} {NO_LINKS}")
    files = [path for path in inside if path.is_file()]
    if table := next(filter(_metadata, files), None):
        where = table.relative_to(folder.parent)
        raise ValueError(f"{where} lies in the folder of a class; it must lie beside the folders, or nowhere")
    if broken := [path.name for path in inside if path.is_symlink() and not path.exists()]:
        told = "%s: %d links in the folder of a class point to nothing, and are left out, such as %s"
        log.warning(told, folder.parent.name, len(broken), broken[0])
    if not files:
        log.warning("%s: the folder %s is empty, and no class", folder.parent.name, folder.name)
    images = [path for path in files if path.name.lower().endswith(ENDINGS)]
    if deep := next((path for path in images if path.parent != folder), None):
        where = deep.relative_to(folder.parent)
        raise ValueError(
            f"{where} lies in a folder below that of its class, so that its class could be {folder.name} or "
            f"{deep.parent.name}; move the images of each class into one folder"
        )
    return images, [path for path in files if not path.name.lower().endswith(ENDINGS)]


def _visible(path: Path) -> bool:
    return not any(part.startswith(".") or part in ("__MACOSX", "__pycache__") for part in path.parts)


def named_by_table(folder: Path) -> int | None:
    """How many images lie in a folder where a table names them with their labels; None where there is no table."""
    inside = [path for path in folder.rglob("*") if path.is_file() and _visible(path.relative_to(folder))]
    return sum(path.name.lower().endswith(ENDINGS) for path in inside) if any(map(_metadata, inside)) else None


def by_column(table: datasets.Dataset) -> dict[str, datasets.Dataset] | None:
    """The splits of a table with a column that names them for each row; None where there is no such column."""
    column = next((name for name in ("split", "subset", "partition") if name in table.column_names), None)
    if column is None or not all(isinstance(word, str) and split_of(word) for word in set(table[column][:])):
        return None
    places: dict[str, list[int]] = {}
    for place, word in enumerate(table[column][:]):
        places.setdefault(split_of(word), []).append(place)
    return {split: table.select(rows) for split, rows in places.items()}


def image_column(features: datasets.Features, name: str) -> str:
    """The column of images, encoded by `datasets` or as bytes. Raises ValueError for none, and for several alike."""
    kinds = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    kinds = kinds or [column for column, kind in features.items() if _holds_bytes(kind) and _rank(column, IMAGES) < 99]
    best = sorted(kinds, key=lambda column: _rank(column, IMAGES))
    if dotted := next((column for column in kinds if re.match(r"\d+\.", column)), None):
        raise ValueError(
            f"{name}: names of files in its tars have dots before their ending, such as {dotted}, where the name of a "
            "sample ends; rename them without"
        )
    equal = [column for column in best if _rank(column, IMAGES) == _rank(best[0], IMAGES) < 99]
    exact = [column for column in equal if "." not in column] or equal
    if not best or len(exact) > 1 or (len(best) > 1 and not exact):
        what = (
            f"several columns of images, {', '.join(best)}, and not one called image" if best else "no labelled images"
        )
        raise ValueError(f"{name} holds {what}; its columns are {', '.join(features)}")
    return exact[0] if exact else best[0]


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
    tables: Mapping[str, datasets.Dataset], column: str, words: list[str] | None, name: str, *, by_folder: bool = False
) -> tuple[dict[str, Int64[Tensor, "n"]], tuple[str, ...]]:
    """Labels of every split, -1 where there is none, and the names of the classes, the same for all splits.

    words: the lines of the set's classnames.txt. Labels that are whole numbers, or folders named by them, stand for the
    line of that number, from 0. by_folder: whether classes are folders, whose order is that of the alphabet.
    Raises ValueError where labels and names do not fit.
    """
    kind = next(iter(tables.values())).features[column]
    values = {split: [_plain(value) for value in table[column][:]] for split, table in tables.items()}
    known = {value for column in values.values() for value in column if value is not None}
    if not known:
        raise ValueError(f"{name} has no labelled split: {column} is empty in {', '.join(tables)}")
    if all(isinstance(value, str) for value in known):
        if not (words and all(value.isdecimal() for value in known)):
            names = tuple(sorted(known))
            if words and set(map(_spoken, words)) != set(map(_spoken, names)):
                log.warning("%s: labels are words already, so %s is not read", name, CLASSES)
            index = {text: i for i, text in enumerate(names)}
            return {split: _tensor(map(index.get, words)) for split, words in values.items()}, names
    elif any(int(value) != value for value in known):
        raise ValueError(f"{name}: labels are not whole numbers, such as {next(v for v in known if int(v) != v)}")
    _check_numbers(known, "classes", name)
    names = words
    if isinstance(kind, datasets.ClassLabel):
        if words and all(label.isdecimal() for label in kind.names):  # of folders, in the order of the alphabet
            _check_numbers(kind.names, "folders", name)
            values = {
                split: [None if v is None or v < 0 else kind.names[v] for v in of] for split, of in values.items()
            }
        else:
            names = _class_names(kind.names, words, name, by_folder=by_folder)
    if names is None:
        raise ValueError(f"{name} has numbers for labels and no {CLASSES}; put the names there, one to a line")
    labels = {split: _tensor(numbers) for split, numbers in values.items()}
    low, high = (end(int(end(numbers)) for numbers in labels.values() if len(numbers)) for end in (min, max))
    if low < -1 or high >= len(names):
        raise ValueError(
            f"{name}: labels run from {low} to {high}, but {len(names)} classes have names, which are counted from 0; "
            f"number the classes from 0, or complete {CLASSES}"
        )
    if words and min(int(n[n >= 0].min()) for n in labels.values() if (n >= 0).any()) > 0:
        log.warning("%s: no class has the number 0, the first line of %s, %r", name, CLASSES, names[0])
    return labels, tuple(names)


def _check_numbers(numbers: Collection[object], what: str, name: str) -> None:
    """Raises ValueError where several are one number, as "0" and "00"."""
    if len(set(map(int, numbers))) < len(numbers):
        shown = ", ".join(sorted(map(str, numbers))[:5])
        raise ValueError(f"{name}: several {what} have one number, such as two of {shown}; rename them")


def _plain(value: object) -> object:
    """A label without blanks at its ends; None for a missing one."""
    if isinstance(value, str):
        return value.strip() or None
    return None if value is None or value != value else value


def _class_names(folders: list[str], words: list[str] | None, name: str, *, by_folder: bool) -> list[str]:
    """Names of classes in the order of the labels. Raises ValueError where the order of `words` cannot be known."""
    if words is None:
        return folders
    if len(words) != len(folders):
        raise ValueError(f"{name}: {CLASSES} names {len(words)} classes, but labels have {len(folders)}")
    spoken = {_spoken(word): word for word in words}
    if set(spoken) == set(map(_spoken, folders)) and len(spoken) == len(words):
        return [spoken[_spoken(folder)] for folder in folders]
    if by_folder and not all(map(SYNSET.fullmatch, folders)):
        raise ValueError(
            f"{name}: the names in {CLASSES} ({', '.join(words[:5])}, ...) are not those of the folders "
            f"({', '.join(folders[:5])}, ...), so which is which is not certain; name the folders by numbers from 0, "
            "the lines of the list, or as the list does"
        )
    return words


def _spoken(name: str) -> str:
    """A class's name as it is said, whatever joins its words."""
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


def _tensor(values: Iterable[object]) -> Int64[Tensor, "n"]:
    return torch.tensor([-1 if value is None else int(value) for value in values], dtype=torch.int64)


def read_lines(path: Path, name: str) -> list[str] | None:
    """The lines of a text file of a set, without blanks at their ends; None where there is no such file.

    Raises ValueError for a blank line among others: it would shift all names after it.
    """
    if not path.is_file():
        return None
    if is_pointer(path):
        raise ValueError(f"{name}: {pointer_fault(path)}")
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
