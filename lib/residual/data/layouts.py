"""Local folders of labelled images, in three layouts that are read strictly. No other is guessed at.

a. Images in a folder for each class, below a folder for each split, or none. Folders of two or more classes win:
   tables, lists and archives beside them are ignored. Or images with a CSV or JSONL of `file_name`, `label` and perhaps
   `split`, as text.
b. webdataset tars whose samples have `cls` (or `json` with a `label`, or `txt`), and classnames.txt for numbers.
c. Parquet, or what `save_to_disk` of `datasets` wrote, with a column of images and one of labels.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from residual.data.images import Blobs, stamp_of
from residual.files import is_pointer, pointer_fault

SPLIT_WORDS = {
    "train": ("train", "training", "trainset"),
    "validation": ("validation", "valid", "val", "dev", "valset"),
    "test": ("test", "testing", "testset", "eval", "evaluation"),
}
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
TABLES, TARS = (".csv", ".jsonl"), (".tar", ".tar.gz", ".tgz")
ARCHIVES, PICKLES = (".zip", ".rar", ".7z"), (".pkl", ".pickle", ".joblib")
BESIDE = (*TABLES, *TARS, *ARCHIVES, ".parquet", ".tsv", ".xlsx")  # what could hold labels beside images
LABELS = ("label", "labels", "cls", "class", "class_name", "label_name", "fine_label", "category", "target", "species")
IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
JUNK = ("__MACOSX", "__pycache__", "Thumbs.db", "desktop.ini")
LAYOUTS = (
    "give images in a folder for each class (below train and test, or not), or beside a CSV or JSONL of file_name and "
    "label; tars with cls, and classnames.txt; or parquet with a column of images and one of labels"
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Images and what is said of their classes: names, numbers (of lines in classnames.txt), or None for nothing.

    by_folder: whether labels are names of folders.
    """

    blobs: Blobs
    labels: tuple[str | int | float | None, ...]
    by_folder: bool = False


def split_of(word: str) -> str | None:
    """The split that a word stands for, in any case: "Training" is "train"."""
    return next((split for split, words in SPLIT_WORDS.items() if word.lower() in words), None)


def read_folder(folder: Path) -> dict[str, Rows]:
    """The images of each split, by our names of splits; of "train" alone where the set is not divided.

    Raises ValueError, which names the layouts, for a folder that has none of them.
    """
    files = _files(folder)
    if pointer := next((folder / file for file in files if is_pointer(folder / file)), None):
        raise ValueError(f"{folder.name}: {pointer_fault(pointer)}")
    for file in (pickles := _ending(files, PICKLES)):
        log.warning("%s: left out %s, a pickle, which could run a program and is never opened", folder.name, file)
    near = [file for file in files if file.count("/") <= 1]
    by_class = _by_class(folder, files)
    if len({label for rows in by_class.values() for label in rows.labels}) > 1:
        if others := _ending(near, (*BESIDE, ".json")):
            log.warning("%s: ignored %s beside the folders of classes", folder.name, ", ".join(others[:5]))
        return by_class
    beside = _ending(near, BESIDE)
    if tables := [folder / file for file in _ending(near, TABLES) if "file_name" in _columns(folder / file)]:
        return _by_table(folder, tables, files)
    if by_class and beside:
        told = f"{folder.name} has images in folders of one name alone, and beside them {_told(folder, beside[0])}"
        raise ValueError(f"{told}; take one of the two away, or {LAYOUTS}")
    if by_class:
        log.warning("%s: all images lie in folders of one name, and are of one class", folder.name)
        return by_class
    if tars := _ending(near, TARS):
        return {split: _tar_rows(folder, paths) for split, paths in _by_split(folder, tars).items()}
    if saved := [(folder / file).parent for file in files if file.endswith("dataset_info.json")]:
        return _saved(folder, saved)
    if parquet := _ending(near, (".parquet",)):
        return read_tables(folder.name, _parquet(folder, parquet), stamp_of([folder / file for file in parquet]))
    if archives := _ending(near, ARCHIVES):
        raise ValueError(f"{folder.name} holds {archives[0]}; unpack it first: {LAYOUTS}")
    found = f"{pickles[0]}, a pickle, which is never opened" if pickles else "no labelled images"
    found += f", but {_told(folder, beside[0])}" if beside else ""
    raise ValueError(f"{folder.name} holds {found}; {LAYOUTS}")


def _files(folder: Path) -> list[str]:
    """Everything below a folder, but for what is hidden and what systems leave; empty folders end with a slash."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:], names = (
            sorted(n for n in some if not n.startswith(".") and n not in JUNK) for some in (folders, names)
        )
        where = Path(parent).relative_to(folder).as_posix().removeprefix(".")
        found += [f"{where}/{name}".removeprefix("/") for name in names]
        found += [f"{where}/"] if where and not names and not folders else []
    return found


def _ending(files: Iterable[str], endings: tuple[str, ...]) -> list[str]:
    return [file for file in files if file.lower().endswith(endings)]


def _tell(folder: Path, names: list[str], what: str) -> None:
    if names:
        log.warning("%s: %d %s, such as %s", folder.name, len(names), what, Path(names[0]).name)


def _claim(name: str, found: dict[str, str], split: str, source: str) -> None:
    """Note where a split comes from. Raises ValueError where it came from elsewhere before."""
    if found.setdefault(split, source) != source:
        raise ValueError(f"{name} holds both {found[split]} and {source}; keep one")


def _told(folder: Path, table: str) -> str:
    """A table with its columns, which lack `file_name`."""
    if not table.lower().endswith(TABLES):
        return table
    return f"{table}, whose columns are {', '.join(_columns(folder / table))}, where file_name and label are needed"


def _by_class(folder: Path, files: list[str]) -> dict[str, Rows]:
    """Images in folders of classes; none where there are no such folders."""
    images = _ending(files, ENDINGS)
    flat = dict.fromkeys(file.split("/")[0] for file in images if file.count("/") == 1)
    deep = dict.fromkeys(file.split("/")[0] for file in files if file.count("/") > 1)
    if any(file.count("/") > 1 and split_of(file.split("/")[0]) for file in images):
        splits: dict[str, str] = {}
        for top in filter(split_of, deep):
            _claim(folder.name, splits, split_of(top), top)
        others = [file for file in images if file.split("/")[0] not in splits.values()]
        _tell(folder, others, "images lie in no class of a split, and are left out")
        return {split: _of_classes(folder, f"{top}/", files) for split, top in splits.items()}
    words = [split_of(top) for top in flat]
    of_splits = len(words) > 1 and None not in words and len(set(words)) == len(words)
    return {"train": _of_classes(folder, "", files)} if flat and not of_splits else {}


def _of_classes(root: Path, base: str, files: list[str]) -> Rows:
    """Images in folders of classes below one folder, `base`."""
    groups: dict[str, list[str]] = {}
    for file in files:
        if file.startswith(base):
            own, *below = file.removeprefix(base).split("/", 1)
            groups.setdefault(base + own if below else "", []).append(file)
    loose, kept, labels = _ending(groups.pop("", []), ENDINGS), [], []
    _tell(root, loose, f"images in {Path(base).name or root.name} lie in no folder of a class, and are left out")
    for where, every in groups.items():
        every = [file for file in every if not file.endswith("/")]
        gone = dict.fromkeys(file for file in every if not (root / file).exists())
        images = [file for file in _ending(every, ENDINGS) if file not in gone]
        if deep := next((file for file in images if file.count("/") > where.count("/") + 1), None):
            raise ValueError(
                f"{deep} lies in a folder below that of its class, which could be {Path(where).name} or "
                f"{Path(deep).parent.name}; move the images of each class into one folder"
            )
        others = [file for file in every if not file.lower().endswith(ENDINGS)]
        if not every:
            log.warning("%s: the folder %s is empty, and no class", root.name, where)
        if others and not images:
            kinds = ", ".join(sorted({Path(file).suffix.lower() or Path(file).name for file in others}))
            raise ValueError(f"{where}: no file of the class is an image that can be read ({kinds}); convert them")
        _tell(root, others, f"files in {where} are not images that can be read, and are left out")
        _tell(root, list(gone), f"links in {where} point to nothing, and are left out")
        kept += images
        labels += [Path(where).name] * len(images)
    return Rows(_file_blobs(root, [root / file for file in kept]), tuple(labels), by_folder=True)


def _file_blobs(root: Path, files: list[Path], extra: Iterable[Path] = ()) -> Blobs:
    names = tuple(os.path.relpath(path, root) for path in files)
    return Blobs(tuple((str(path), 0, -1) for path in files), names, stamp_of([*files, *extra]))


@contextlib.contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    """A file of text that is read in the block. Raises ValueError, with its name, where it cannot be."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path.name} cannot be read as a table in UTF-8: {error}") from error


def _columns(path: Path) -> list[str]:
    """The names in the first row of a CSV or JSONL."""
    with _text(path) as file:
        is_csv = path.suffix.lower() == ".csv"
        names = next(csv.reader(file), ()) if is_csv else dict(json.loads(next(filter(str.strip, file), "{}")))
        return [name.strip() for name in names]


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a CSV or JSONL: texts without blanks at their ends, and from JSONL also lists and objects."""
    is_csv, options = path.suffix.lower() == ".csv", {"skipinitialspace": True, "strict": True}
    with _text(path) as file:
        rows = csv.DictReader(file, **options) if is_csv else map(json.loads, filter(str.strip, file))
        for number, row in enumerate(map(dict, rows), 1):
            if any(row.pop(None, ())):
                raise ValueError(f"row {number} has more values than there are columns; put quotes around commas")
            values = {str(k).strip(): "" if v is None else v for k, v in row.items()}
            yield {k: v if isinstance(v, dict | list) else str(v).strip() for k, v in values.items()}


def _by_table(folder: Path, tables: list[Path], files: list[str]) -> dict[str, Rows]:
    """Images with a table of their labels, one in the folder, or one in the folder of each split."""
    found: dict[str, dict[Path, str]] = {}
    seen: set[str] = set()
    for table in tables:
        of_table = split_of(table.parent.name) if table.parent != folder else None
        if len(tables) > 1 and (of_table is None or of_table in found):
            shown = ", ".join(os.path.relpath(path, folder) for path in tables)
            raise ValueError(
                f"{folder.name} holds {shown}; give one table with a column split, or one in the folder of each split"
            )
        columns = _columns(table)
        column = next((name for name in LABELS if name in columns), None)
        if column is None:
            raise ValueError(f"{table.name} has no column {LABELS[0]}; its columns are {', '.join(columns)}")
        for number, entry in enumerate(_entries(table), 1):
            if not any(entry.values()):
                continue
            word, name, label = (entry.get(key, "") for key in ("split", "file_name", column))
            if not all(isinstance(value, str) for value in (word, name, label)):
                raise ValueError(
                    f"{table.name}: row {number} has several values in one place; give one split and label"
                )
            split = of_table or (split_of(word) if word else "train")
            rows, path = found.setdefault(split or "", {}), os.path.abspath(table.parent / name)
            if split is None or not name or path in seen:
                what = f"an unknown split, {word!r}" if split is None else f"{name} again" if name else "no file_name"
                raise ValueError(f"{table.name}: row {number} has {what}; complete the table")
            seen.add(path)
            rows[table.parent / name] = label
    if not seen:
        raise ValueError(f"{', '.join(path.name for path in tables)} holds no rows")
    rest = [file for file in _ending(files, ENDINGS) if os.path.abspath(folder / file) not in seen]
    _tell(folder, rest, "images in the folder are left out, as no table names them")
    return {split: Rows(_file_blobs(folder, [*r], tables), tuple(r.values())) for split, r in found.items()}


def _by_split(folder: Path, files: list[str]) -> dict[str, list[Path]]:
    """Files by their folder's name, or the first word of their own. If none names a split, all are one.

    Raises ValueError where a split comes from two folders or words, and where it is another word that names one.
    """
    found: dict[str | None, list[Path]] = {}
    sources: dict[str, str] = {}
    for path in (folder / file for file in files):
        own = "" if path.parent == folder else path.parent.name
        words = re.split(r"[-_. 0-9]+", path.name)
        split = split_of(own) or split_of(words[0])
        if split:
            source = own if split_of(own) else f"{own}/{words[0]}".removeprefix("/")
            _claim(folder.name, sources, split, source)
        elif any(map(split_of, words)):
            raise ValueError(f"{folder.name}: begin the name of {path.name} with its split, or put it in its folder")
        found.setdefault(split, []).append(path)
    rest = found.pop(None, [])
    if found:
        _tell(folder, [path.name for path in rest], "files belong to no split, and are ignored")
    return found or {"train": rest}


def _tar_rows(folder: Path, paths: list[Path]) -> Rows:
    """Samples of webdataset tars: members that share a name up to its first dot."""
    pieces, names, labels, bare, masks = [], [], [], [], []
    for path in paths:
        if path.suffix != ".tar":
            raise ValueError(f"{folder.name}: {path.name} is compressed; unpack it to a plain .tar")
        with _opened(path) as tar:
            samples: dict[str, dict[str, tarfile.TarInfo]] = {}
            for member in (m for m in tar if not m.isdir() and not Path(m.name).name.startswith(".")):
                if not member.isfile():
                    raise ValueError(
                        f"{folder.name}: {path.name} holds {member.name} as a link; write it with the files"
                    )
                stem, _, kind = Path(member.name).name.partition(".")
                sample = samples.setdefault(str(Path(member.name).parent / stem), {})
                if sample.setdefault(kind.lower(), member) is not member:
                    raise ValueError(f"{folder.name}: {path.name} holds {member.name} twice")
            for key, sample in samples.items():
                images = [member for kind, member in sample.items() if f".{kind}" in ENDINGS]
                if len(images) > 1:
                    raise ValueError(f"{path.name}: {key} has several images, {', '.join(sample)}; leave one")
                if not images:
                    bare += [member.name for member in sample.values()]
                    continue
                label = _tar_label(tar, sample, f"{path.name}: {key}")
                masks += [member.name for kind, member in sample.items() if "." in kind and _ending([kind], ENDINGS)]
                pieces.append((str(path), images[0].offset_data, images[0].size))
                names.append(key)
                labels.append(label)
    if dotted := next((name for name in _ending(bare, ENDINGS) if Path(name).name.count(".") > 1), None):
        raise ValueError(
            f"{folder.name}: names of files in its tars have dots before their ending, such as {Path(dotted).name}, "
            "where the name of a sample ends; rename them without"
        )
    _tell(folder, masks, "files in tars belong to another image, by their names up to the first dot, and are left out")
    _tell(folder, bare, "files in tars belong to no image, and are left out")
    return Rows(Blobs(tuple(pieces), tuple(names), stamp_of(paths)), tuple(labels))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar that is read to its end. Raises ValueError, with its name, for one that is damaged or cut short."""
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
            with path.open("rb") as file:
                file.seek(tar.offset)
                rest = file.read(2**20)
            if not rest or rest.strip(b"\0"):
                raise ValueError(
                    f"{path.name} has no end, or goes on after it: it was cut short, or joined from several"
                )
    except tarfile.TarError as error:
        raise ValueError(f"{path.name} cannot be read as a tar: {error}") from error


def _tar_label(tar: tarfile.TarFile, sample: dict[str, tarfile.TarInfo], where: str) -> str | int | None:
    """A sample's `cls`, `label` in its `json`, or `txt`: a number, or a name."""
    for kind in ("cls", "json", "txt"):
        if kind not in sample:
            continue
        try:
            value = tar.extractfile(sample[kind]).read().decode("utf-8-sig").strip()
            if kind == "json":
                about = json.loads(value)
                value = next((about[name] for name in LABELS if isinstance(about.get(name), str | int)), "")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{where}.{kind} cannot be read as a label: {error}") from error
        if value != "":
            return int(value) if kind != "txt" and str(value).isdecimal() else str(value)
    return None


def _saved(folder: Path, saved: list[Path]) -> dict[str, Rows]:
    """What `save_to_disk` wrote: one set of splits, one set, or a set in the folder of each split."""
    import datasets

    whole = {path.parent for path in saved if (path.parent / "dataset_dict.json").is_file()}
    if len(whole) > 1 or (whole and any(path.parent not in whole for path in saved)):
        raise ValueError(f"{folder.name} holds several saved data sets; give the folder of one")
    loaded = datasets.load_from_disk(str(*whole)) if whole else {p.name: datasets.load_from_disk(str(p)) for p in saved}
    return read_tables(folder.name, loaded, stamp_of([path / "state.json" for path in saved]))


def _parquet(folder: Path, files: list[str]) -> dict:
    """Tables of `datasets` by split. Raises ValueError where files have their classes in different orders."""
    import datasets
    import pyarrow
    import pyarrow.parquet as pq

    names: dict[str, tuple[list[str], str]] = {}
    for file in files:
        try:
            schema = pq.read_schema(folder / file)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{folder.name}: {file} cannot be read as parquet: {error}") from error
        for column, kind in datasets.Features.from_arrow_schema(schema).items():
            if isinstance(kind, datasets.ClassLabel):
                first, where = names.setdefault(column, (kind.names, file))
                if first != kind.names:
                    raise ValueError(
                        f"{folder.name}: {where} and {file} have the classes of {column} in different orders "
                        f"({', '.join(first[:5])} and {', '.join(kind.names[:5])}); write both with the same"
                    )
    listed = {split: list(map(str, paths)) for split, paths in _by_split(folder, files).items()}
    return datasets.load_dataset("parquet", data_files=listed)


def read_tables(name: str, loaded: Mapping[str, Any], stamp: str) -> dict[str, Rows]:
    """Splits of `datasets`, by the types of their columns. Raises ValueError for no images, or no labels."""
    import datasets

    theirs: dict[str, str] = {}
    for word in filter(split_of, loaded):
        _claim(name, theirs, split_of(word), word)
    if len(loaded) == 1:
        theirs = theirs or {"train": next(iter(loaded))}
    if not theirs:
        raise ValueError(f"{name} has no split called train or test; its splits are {', '.join(loaded)}")
    if others := [f"{word} ({len(loaded[word])} rows)" for word in loaded if word not in theirs.values()]:
        log.warning("%s: ignored the splits %s", name, ", ".join(others))
    features = loaded[next(iter(theirs.values()))].features
    if "split" in features and any(len(loaded[word].unique("split")) > 1 for word in theirs.values()):
        raise ValueError(
            f"{name} has several values in a column split; store each split in a file, or a set, of its own"
        )
    images = [c for c, kind in features.items() if isinstance(kind, datasets.Image)]
    images = images or [c for c in IMAGES if _holds_files(features.get(c))]
    image = next((column for column in IMAGES if column in images), images[0] if len(images) == 1 else None)
    kinds = [c for c, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    named = [c for c in LABELS if c in features]
    texts = [c for c in named if getattr(features[c], "dtype", "") in ("string", "large_string")]
    labels = [*(c for c in named if c in kinds), *texts, *(kinds if len(kinds) == 1 else ()), *named]
    label = next(iter(labels), None)
    if image is None or label is None or not isinstance(features[label], datasets.ClassLabel | datasets.Value):
        raise ValueError(
            f"{name} has no one column of images and one of labels; its columns are {', '.join(features)}. Call them "
            f"{IMAGES[0]}, with files in bytes, and {LABELS[0]}, with names or whole numbers"
        )
    rows = {}
    for split, word in theirs.items():
        table, own = loaded[word], loaded[word].features.get(label)
        if image not in table.features or type(own) is not type(features[label]):
            raise ValueError(
                f"{name}: {word} lacks {image} or {label}, or has labels of another type than other splits"
            )
        encoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        values = table[label][:]
        if isinstance(own, datasets.ClassLabel):
            values = [None if value is None or value < 0 else own.names[value] for value in values]
        blobs = Blobs((), tuple(f"row {i}" for i in range(len(table))), f"{stamp} {split}", encoded)
        rows[split] = Rows(blobs, tuple(values))
    return rows


def _holds_files(kind: Any) -> bool:
    """Whether a column that `datasets` does not know as images holds their files, as bytes."""
    return (isinstance(kind, dict) and "bytes" in kind) or getattr(kind, "dtype", "") in ("binary", "large_binary")
