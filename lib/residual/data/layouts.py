"""Local folders of labelled images, in three layouts that are read strictly. No other is guessed at.

a. Images in a folder for each class, below a folder for each split, or none. Class folders win: tables, lists and
   archives beside them are ignored. Or images with a CSV or JSONL of `file_name`, `label` and perhaps `split`, as text.
b. webdataset tars whose samples have `cls` (or `json` with a `label`, or `txt`), and classnames.txt for numbers.
c. Parquet, or what `save_to_disk` of `datasets` wrote, with a column of images and one of labels.
"""

from __future__ import annotations

import csv
import json
import logging
import re
import tarfile
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from residual.data.images import Blobs, stamp_of
from residual.files import is_pointer, pointer_fault

SPLIT_WORDS = {
    "train": ("train", "training", "trainset"),
    "validation": ("validation", "valid", "val", "dev", "valset"),
    "test": ("test", "testing", "testset", "eval", "evaluation"),
}
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
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
    files = sorted(path for path in _visible(folder) if path.is_file())
    if pointer := next(filter(is_pointer, files), None):
        raise ValueError(f"{folder.name}: {pointer_fault(pointer)}")
    pickles = [path for path in files if path.suffix.lower() in (".pkl", ".pickle", ".joblib")]
    for path in pickles:
        log.warning("%s: left out %s, a pickle, which could run a program and is never opened", folder.name, path.name)
    tars = [path for path in _near(folder) if path.name.lower().endswith((".tar", ".tar.gz", ".tgz"))]
    tables = [path for path in _near(folder) if path.suffix.lower() in (".csv", ".jsonl")]
    parquet = [path for path in _near(folder) if path.suffix.lower() == ".parquet"]
    zips = [path for path in _near(folder) if path.suffix.lower() in (".zip", ".rar", ".7z")]
    labelled = [path for path in tables if "file_name" in _columns(path)]
    by_class = _class_folders(folder)
    if by_class and not (labelled and len({label for rows in by_class.values() for label in rows.labels}) == 1):
        if beside := [path.name for path in (*tars, *tables, *parquet, *zips, *folder.glob("*.json"))]:
            log.warning("%s: ignored %s beside the folders of classes", folder.name, ", ".join(beside[:5]))
        return by_class
    if labelled:
        return _by_table(folder, labelled)
    if tars:
        return {split: _tar_rows(folder, paths) for split, paths in _by_split(folder, tars).items()}
    if saved := [
        path.parent for path in files if path.name == "dataset_info.json" and path.with_name("state.json").is_file()
    ]:
        return _saved(folder, saved)
    if parquet:
        return read_tables(folder.name, _parquet(folder, parquet), stamp_of(parquet))
    if zips:
        raise ValueError(f"{folder.name} holds {zips[0].name}; unpack it first: {LAYOUTS}")
    found = f"{pickles[0].name}, a pickle, which is never opened" if pickles else "no labelled images"
    raise ValueError(f"{folder.name} holds {found}; {LAYOUTS}")


def _visible(folder: Path) -> Iterator[Path]:
    """Everything below a folder, but for what is hidden and what systems leave. Links to folders are followed."""
    for path in _inside(folder):
        yield path
        if path.is_dir():
            yield from _visible(path)


def _near(folder: Path) -> list[Path]:
    """Files in a folder, and in its folders."""
    return [path for path in _visible(folder) if path.is_file() and len(path.relative_to(folder).parts) <= 2]


def _inside(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".") and path.name not in JUNK]


def _folders(folder: Path) -> list[Path]:
    return [path for path in _inside(folder) if path.is_dir()]


def _is_image(path: Path) -> bool:
    return path.name.lower().endswith(ENDINGS)


def _class_folders(folder: Path) -> dict[str, Rows]:
    """Images in folders of classes; none where there are no such folders."""
    inside = {path: any(map(_is_image, _inside(path))) for path in _folders(folder)}
    splits: dict[str, Path] = {}
    for path in inside:
        deeper = any(_is_image(file) for own in _folders(path) for file in _inside(own))
        if (split := split_of(path.name)) and deeper:
            if split in splits:
                raise ValueError(f"{folder.name} holds both {splits[split].name} and {path.name}; keep one")
            splits[split] = path
    if splits:
        if others := [path.name for path in inside if path not in splits.values()]:
            log.warning("%s: ignored %s, which hold no split, or no images by class", folder.name, ", ".join(others))
        return {split: _by_class(folder, path) for split, path in splits.items()}
    return {"train": _by_class(folder, folder)} if any(inside.values()) else {}


def _by_class(root: Path, folder: Path) -> Rows:
    files, labels = [], []
    for own in _folders(folder):
        every = [path for path in _visible(own) if not path.is_dir()]
        images = [path for path in every if _is_image(path) and path.is_file()]
        others = [path for path in every if not _is_image(path)]
        where = own.relative_to(root)
        if deep := next((path for path in images if path.parent != own), None):
            raise ValueError(
                f"{deep.relative_to(root)} lies in a folder below that of its class, which could be {own.name} or "
                f"{deep.parent.name}; move the images of each class into one folder"
            )
        if others and not images:
            kinds = ", ".join(sorted({path.suffix.lower() or path.name for path in others}))
            raise ValueError(f"{where}: no file of the class is an image that can be read ({kinds}); convert them")
        _tell(f"{root.name}: %d files in {where} are not images that can be read, and are left out", others)
        _tell(
            f"{root.name}: %d links in {where} point to nothing, and are left out", [p for p in every if not p.exists()]
        )
        if not every:
            log.warning("%s: the folder %s is empty, and no class", root.name, where)
        files += images
        labels += [unicodedata.normalize("NFC", own.name)] * len(images)
    loose = [path for path in _inside(folder) if path.is_file() and _is_image(path)]
    _tell(f"{root.name}: %d images in {folder.name} lie in no folder of a class, and are left out", loose)
    return Rows(_file_blobs(root, files), tuple(labels), by_folder=True)


def _tell(message: str, paths: list[Path]) -> None:
    if paths:
        log.warning(message + ", such as %s", len(paths), paths[0].name)


def _file_blobs(root: Path, files: list[Path], extra: Iterable[Path] = ()) -> Blobs:
    names = tuple(str(path.relative_to(root)) for path in files)
    return Blobs(tuple((str(path), 0, -1) for path in files), names, stamp_of([*files, *extra]))


def _columns(path: Path) -> list[str]:
    first = next(iter(_entries(path)), {})
    return list(first)


def _entries(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV or JSONL, as text."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".csv":
            yield from csv.DictReader(file)
        else:
            yield from (
                {k: "" if v is None else str(v) for k, v in json.loads(line).items()} for line in file if line.strip()
            )


def _by_table(folder: Path, tables: list[Path]) -> dict[str, Rows]:
    """Images with a table of their labels, one in the folder, or one in the folder of each split."""
    found: dict[str, tuple[list[Path], list[str | None]]] = {}
    for table in tables:
        of_table = split_of(table.parent.name) if table.parent != folder else None
        if len(tables) > 1 and (of_table is None or of_table in found):
            raise ValueError(
                f"{folder.name} holds several tables of labels, {', '.join(p.name for p in tables)}; keep one"
            )
        column = next((name for name in LABELS if name in _columns(table)), None)
        if column is None:
            raise ValueError(f"{table.name} has no column {LABELS[0]}; its columns are {', '.join(_columns(table))}")
        for entry in _entries(table):
            split = of_table or split_of(entry.get("split") or "") or "train"
            paths, labels = found.setdefault(split, ([], []))
            paths.append(table.parent / entry["file_name"])
            labels.append(unicodedata.normalize("NFC", (entry[column] or "").strip()) or None)
    named = {path.resolve() for paths, _ in found.values() for path in paths}
    images = [path for path in _visible(folder) if path.is_file() and _is_image(path)]
    rest = [path for path in images if path.resolve() not in named]
    _tell(f"{folder.name}: %d images in the folder are left out, as no table names them", rest)
    return {split: Rows(_file_blobs(folder, paths, tables), tuple(labels)) for split, (paths, labels) in found.items()}


def _by_split(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Files by their folder's name, or the first word of their own. If none names a split, all are one."""
    found: dict[str | None, list[Path]] = {}
    for path in files:
        own = split_of(re.split(r"[-_. 0-9]", path.name)[0])
        found.setdefault(
            split_of(path.parent.name) if path.parent != folder and split_of(path.parent.name) else own, []
        ).append(path)
    rest = found.pop(None, [])
    if found:
        _tell(f"{folder.name}: %d files belong to no split, and are ignored", rest)
    return found or {"train": rest}


def _tar_rows(folder: Path, paths: list[Path]) -> Rows:
    """Samples of webdataset tars: members that share a name up to its first dot."""
    pieces, names, labels, bare = [], [], [], []
    for path in paths:
        if path.suffix != ".tar":
            raise ValueError(f"{folder.name}: {path.name} is compressed; unpack it to a plain .tar")
        with tarfile.open(path, "r:") as tar:
            samples: dict[str, dict[str, tarfile.TarInfo]] = {}
            for member in (member for member in tar if member.isfile() and not Path(member.name).name.startswith(".")):
                stem, _, kind = Path(member.name).name.partition(".")
                samples.setdefault(str(Path(member.name).parent / stem), {})[kind.lower()] = member
            for key, sample in samples.items():
                image = next((sample[kind] for kind in sample if f".{kind}" in ENDINGS), None)
                label = _tar_label(tar, sample, f"{path.name}: {key}")
                if image is None:
                    bare += [Path(member.name) for member in sample.values()]
                    continue
                pieces.append((str(path), image.offset_data, image.size))
                names.append(key.removeprefix("./"))
                labels.append(label)
    if dotted := next(
        (path.name for path in bare if re.fullmatch(r".*\..*\.\w+", path.name) and _is_image(path)), None
    ):
        raise ValueError(
            f"{folder.name}: names of files in its tars have dots before their ending, such as {dotted}, where the "
            "name of a sample ends; rename them without"
        )
    _tell(f"{folder.name}: %d files in tars belong to no image, and are left out", bare)
    return Rows(Blobs(tuple(pieces), tuple(names), stamp_of(paths)), tuple(labels))


def _tar_label(tar: tarfile.TarFile, sample: dict[str, tarfile.TarInfo], where: str) -> str | int | None:
    """A sample's `cls`, `label` in its `json`, or `txt`: a number, or a name."""
    for kind in ("cls", "json", "txt"):
        if kind not in sample:
            continue
        try:
            value = tar.extractfile(sample[kind]).read().decode("utf-8-sig").strip()
            if kind == "json":
                about = json.loads(value)
                value = next((about[name] for name in LABELS if about.get(name) is not None), "")
        except ValueError as error:
            raise ValueError(f"{where}.{kind} cannot be read as a label: {error}") from error
        if value != "":
            return int(value) if kind != "txt" and str(value).isdecimal() else str(value)
    return None


def _saved(folder: Path, saved: list[Path]) -> dict[str, Rows]:
    import datasets

    loaded = datasets.load_from_disk(str(folder if (folder / "dataset_dict.json").is_file() else saved[0]))
    loaded = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    return read_tables(folder.name, loaded, stamp_of([path / "state.json" for path in saved]))


def _parquet(folder: Path, files: list[Path]) -> dict:
    """Tables of `datasets` by split. Raises ValueError where files have their classes in different orders."""
    import datasets
    import pyarrow.parquet as pq

    names: dict[str, tuple[list[str], Path]] = {}
    for path in files:
        for column, kind in datasets.Features.from_arrow_schema(pq.read_schema(path)).items():
            if isinstance(kind, datasets.ClassLabel):
                first, where = names.setdefault(column, (kind.names, path))
                if first != kind.names:
                    raise ValueError(
                        f"{folder.name}: {where.name} and {path.name} have the classes of {column} in different orders "
                        f"({', '.join(first[:5])} and {', '.join(kind.names[:5])}); write both with the same"
                    )
    listed = {split: list(map(str, paths)) for split, paths in _by_split(folder, files).items()}
    return datasets.load_dataset("parquet", data_files=listed)


def read_tables(name: str, loaded: dict, stamp: str) -> dict[str, Rows]:
    """Splits of `datasets`, by the types of their columns. Raises ValueError for no images, or no labels."""
    import datasets

    tables = {ours: loaded[theirs] for theirs in loaded if (ours := split_of(theirs))}
    if not tables and len(loaded) == 1:
        tables = {"train": next(iter(loaded.values()))}
    if not tables:
        raise ValueError(f"{name} has no split called train or test; its splits are {', '.join(loaded)}")
    features = next(iter(tables.values())).features
    images = [c for c, kind in features.items() if isinstance(kind, datasets.Image)] or [
        c for c in IMAGES if c in features
    ]
    image = next((column for column in IMAGES if column in images), images[0] if len(images) == 1 else None)
    kinds = [c for c, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    texts = [c for c in LABELS if c in features and getattr(features[c], "dtype", "") in ("string", "large_string")]
    label = next(
        iter([*(c for c in LABELS if c in kinds), *kinds, *texts, *(c for c in LABELS if c in features)]), None
    )
    if image is None or label is None or not isinstance(features[label], datasets.ClassLabel | datasets.Value):
        raise ValueError(
            f"{name} has no one column of images and one of labels; its columns are {', '.join(features)}. Call them "
            f"{IMAGES[0]} and {LABELS[0]}"
        )
    rows = {}
    for split, table in tables.items():
        encoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        own, values = features[label], table[label][:]
        if isinstance(own, datasets.ClassLabel):
            values = [None if value is None or value < 0 else own.names[value] for value in values]
        blobs = Blobs((), tuple(f"row {i}" for i in range(len(table))), f"{stamp} {split}", encoded)
        rows[split] = Rows(blobs, tuple(values))
    return rows
