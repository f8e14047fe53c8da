"""Sets as people lay them out: every image keeps its class, official splits stay apart, losses are told."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from residual import load_dataset
from residual.data.images import decode
from test_hub import COLOURS, png, write_tar

pytestmark = pytest.mark.usefixtures("own_cache")
WORDS = ("red", "green", "blue")


def coloured(data) -> list[str]:
    """The class that each image's colour stands for."""
    seen = [image.getpixel((20, 20)) for image in data.images]
    return [
        WORDS[min(range(3), key=lambda c: sum(abs(a - b) for a, b in zip(COLOURS[c], own, strict=True)))]
        for own in seen
    ]


def right(data) -> bool:
    return coloured(data) == [data.classes[label] for label in data.labels.tolist()]


def nshards(folder: Path) -> None:
    for split, count in (("train", 30), ("test", 15)):
        write_tar(folder / split / "0.tar", count)
        (folder / split / "nshards.txt").write_text("1\n")
    (folder / "classnames.txt").write_text("\ufeffred \r\ngreen\r\nblue\r\n\r\n", newline="")


def flat_tars(folder: Path) -> None:
    write_tar(folder / "train-000.tar", 30)
    write_tar(folder / "test-000.tar", 15)
    write_tar(folder / "extra-000.tar", 6)
    (folder / "classnames.txt").write_text("\n".join(WORDS))


def json_labels(folder: Path) -> None:
    for split, count in (("train", 30), ("test", 15)):
        (folder / split).mkdir(parents=True)
        with tarfile.open(folder / split / "0.tar", "w") as tar:
            for index in range(count):
                about = json.dumps({"label": WORDS[index % 3], "width": 40}).encode()
                for ending, data in (("json", about), ("png", png(index % 3, index))):
                    info = tarfile.TarInfo(f"s{index:03d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def folders(splits: tuple[str, str], classes=WORDS):
    def write(folder: Path) -> None:
        for split, count in zip(splits, (30, 15), strict=True):
            for index in range(count):
                path = folder / split / classes[index % 3] / f"test_{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(index % 3, index))
        (folder / splits[0] / "stray.png").write_bytes(png(0, 0))
        (folder / ".DS_Store").write_bytes(b"x")

    return write


def unlabelled_test(folder: Path) -> None:
    folders(("train", "val"))(folder)
    (folder / "test").mkdir()
    for index in range(5):
        (folder / "test" / f"{index}.png").write_bytes(png(0, index))


def table(splits: dict[str, range], **columns):
    """Parquet with columns made of an index; `image` is bytes without metadata, as pandas would write it."""

    def write(folder: Path) -> None:
        (folder / "data").mkdir(parents=True)
        for split, rows in splits.items():
            made = {"image": [{"bytes": png(i % 3, i), "path": None} for i in rows]}
            made |= {name: [value(i) for i in rows] for name, value in columns.items()}
            datasets.Dataset.from_dict(made).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")

    return write


BOTH = {"train": range(30), "test": range(15)}
BOTH_NAMES = tuple(BOTH)
LAYOUTS = {
    "tars beside nshards.txt": nshards,
    "tars without folders": flat_tars,
    "labels in json": json_labels,
    "splits in capitals": folders(("Train", "TEST")),
    "splits by other names": folders(("training", "evaluation")),
    "a test split without labels": unlabelled_test,
    "words in a column": table(BOTH, species=lambda i: WORDS[i % 3]),
    "names beside numbers": table(BOTH, label=lambda i: i % 3, label_name=lambda i: WORDS[i % 3]),
    "another picture": table(BOTH, mask=lambda i: {"bytes": png(0, 0), "path": None}, label=lambda i: WORDS[i % 3]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_official_splits_with_every_image_in_its_class(tmp_path, layout):
    LAYOUTS[layout](tmp_path / "set")
    parts = {split: load_dataset(tmp_path / "set", split) for split in ("train", "validation", "test")}
    held = 0 if layout == "a test split without labels" else 3
    whole = {"train": 30 - held, "validation": held, "test": 15}
    if not held:  # the validation split is tested on, and some of training validates
        whole = {"train": 27, "validation": 3, "test": 15}
    assert {split: len(data) for split, data in parts.items()} == whole
    for data in parts.values():
        assert sorted(data.classes) == sorted(WORDS)
        assert right(data)


@pytest.mark.parametrize("classes", [("train", "car", "test-tube"), ("dev", "train", "val")])
def test_classes_that_are_called_like_splits_keep_their_images(tmp_path, classes):
    for index in range(30):
        path = tmp_path / "set" / classes[index % 3] / f"train_{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(index % 3, index))
    parts = [load_dataset(tmp_path / "set", split) for split in ("train", "validation", "test")]
    assert [len(data) for data in parts] == [18, 6, 6]
    assert {data.classes for data in parts} == {tuple(sorted(classes))}
    folders(("train", "test"), classes)(tmp_path / "divided")
    assert [len(load_dataset(tmp_path / "divided", split)) for split in ("train", "validation", "test")] == [27, 3, 15]


def test_classes_are_the_same_in_all_splits_and_unlabelled_rows_are_told(tmp_path, caplog):
    def label(i):
        return None if i == 0 else WORDS[i % 3] if i < 20 else "green"

    table({"train": range(30), "test": range(1, 3)}, label=label)(tmp_path / "set")
    train, test = load_dataset(tmp_path / "set"), load_dataset(tmp_path / "set", "test")
    assert train.classes == test.classes == ("blue", "green", "red")
    assert right(test)
    assert "1 of 30 images have no label" in caplog.text


def test_a_list_of_names_in_another_order_does_not_move_labels(tmp_path):
    folders(("train", "test"))(tmp_path / "set")
    (tmp_path / "set/classnames.txt").write_text("\n".join(WORDS))  # the type's order is by the alphabet
    assert right(load_dataset(tmp_path / "set", "test"))
    (tmp_path / "set/classnames.txt").write_text("one\ntwo")
    with pytest.raises(ValueError, match=r"classnames\.txt names 2 classes, but labels have 3"):
        load_dataset(tmp_path / "set", "test")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (table(BOTH, label=lambda i: i % 3), r"numbers for labels and no classnames\.txt"),
        (table(BOTH, label=lambda i: i / 2), "labels are not whole numbers, such as 0.5"),
        (table(BOTH, label=lambda i: [WORDS[0]]), r"no one column of images and one of labels; its columns"),
        (table(BOTH, boxes=lambda i: i), r"its columns are image, boxes\. Call them image, with files in"),
        (table(BOTH, label=lambda i: None), "no labelled split: labels are empty in test, train"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path, write, message):
    write(tmp_path / "set")
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path / "set")


def test_names_and_templates_are_read_as_they_are_meant(tmp_path):
    nshards(tmp_path / "set")
    templates = "a photo of a {c}.\n{c} in {braces}\nno place at all\n"
    (tmp_path / "set/zeroshot_classification_templates.txt").write_text(templates)
    data = load_dataset(tmp_path / "set", "test")
    assert data.classes == WORDS
    assert [template.format("cat") for template in data.templates] == ["a photo of a cat.", "cat in {braces}"]
    (tmp_path / "set/classnames.txt").write_text("red\n\ngreen\nblue")
    with pytest.raises(ValueError, match=r"line 2 of classnames\.txt is blank"):
        load_dataset(tmp_path / "set")


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    folders(("train", "test"))(tmp_path / "set")
    path = tmp_path / "set/test/red/test_0.png"
    Image.fromarray(np.full((30, 40), 128 * 256, np.uint16)).save(path)
    grey = [image for image in load_dataset(tmp_path / "set", "test").images if image.getpixel((20, 20)) == (128,) * 3]
    assert len(grey) == 1


def test_the_only_image_of_a_class_is_trained_on(tmp_path):
    folders(("train", "test"))(tmp_path / "set")
    for split in ("train", "test"):
        (tmp_path / "set" / split / "rare").mkdir()
        (tmp_path / "set" / split / "rare/1.png").write_bytes(png(1, 1))
    train = load_dataset(tmp_path / "set")
    assert torch.bincount(train.labels).tolist() == [9, 9, 1, 9]


def test_images_left_out_are_told_by_their_files(tmp_path, caplog):
    folders(("train", "test"))(tmp_path / "set")
    (tmp_path / "set/test/red/test_0.png").write_bytes(b"")
    assert load_dataset(tmp_path / "set", "test").excluded == (str(Path("test/red/test_0.png")),)
    assert "1 of 15 images cannot be decoded and are left out: test/red/test_0.png" in caplog.text


NUMBERED = tuple(map(str, range(12)))
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")


def number_of(image: Image.Image) -> int:
    """The number that `numbered` drew: its red value, in steps of 20."""
    return round(image.getpixel((1, 1))[0] / 20)


def numbered(folder: Path) -> None:
    for number in NUMBERED:
        (folder / number).mkdir(parents=True)
        for index in range(5):
            Image.new("RGB", (8, 8), (20 * int(number), index, 0)).save(folder / number / f"{index}.png")


def numbered_table(folder: Path) -> None:
    kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=sorted(NUMBERED)))
    order = sorted(NUMBERED)
    rows = [(order.index(number), number, index) for number in NUMBERED for index in range(5)]
    made = {
        "image": [Image.new("RGB", (8, 8), (20 * int(n), i, 0)) for _, n, i in rows],
        "label": [r for r, *_ in rows],
    }
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_dict(made, features=kinds).to_parquet(folder / "data/train-00000-of-00001.parquet")


@pytest.mark.parametrize("write", [numbered, numbered_table])
def test_classes_named_by_numbers_take_the_line_of_that_number(tmp_path, write):
    write(tmp_path / "set")
    (tmp_path / "set/classnames.txt").write_text("\n".join(NAMES))
    data = load_dataset(tmp_path / "set", "train")
    assert data.classes == NAMES
    assert {data.classes[label] for label in data.labels.tolist()} == set(NAMES)
    for image, label in zip(data.images, data.labels.tolist(), strict=True):
        assert data.classes[label] == NAMES[number_of(image)]
    (tmp_path / "set/classnames.txt").write_text("\n".join(NAMES[:11]))
    with pytest.raises(ValueError, match="labels run from 0 to 11, but 11 classes have names"):
        load_dataset(tmp_path / "set", "train")


def test_names_in_no_certain_order_are_refused_with_both(tmp_path):
    folders(("train", "test"))(tmp_path / "set")
    (tmp_path / "set/classnames.txt").write_text("cat\ndog\nemu")
    with pytest.raises(ValueError, match=r"cat, dog, emu, .* not those of the folders \(blue, green, red"):
        load_dataset(tmp_path / "set")
    synsets = ("n01440764", "n01443537", "n01484850")  # whose order is a convention
    folders(("train", "test"), synsets)(tmp_path / "imagenet")
    (tmp_path / "imagenet/classnames.txt").write_text("\n".join(WORDS))
    assert right(load_dataset(tmp_path / "imagenet"))


def test_names_that_folders_join_are_those_of_the_list_and_are_said_as_words(tmp_path):
    folders(("train", "test"), ("deep_red", "leaf-green", "sky_blue"))(tmp_path / "set")
    data = load_dataset(tmp_path / "set")
    assert data.classes == ("deep_red", "leaf-green", "sky_blue")
    assert data.prompts() == ["a photo of a deep red.", "a photo of a leaf green.", "a photo of a sky blue."]
    (tmp_path / "set/classnames.txt").write_text("sky blue\nDeep red\nleaf green")
    assert load_dataset(tmp_path / "set").classes == ("Deep red", "leaf green", "sky blue")
    assert "an emoji of t-rex" in [p.lower() for p in load_dataset("emoji-animals", "test").prompts()]


def test_labels_in_text_files_have_no_line_ends(tmp_path):
    for split, count in (("train", 30), ("test", 15)):
        (tmp_path / "set" / split).mkdir(parents=True)
        with tarfile.open(tmp_path / "set" / split / "0.tar", "w") as tar:
            for index in range(count):
                for ending, data in (("txt", f"{WORDS[index % 3]}\n".encode()), ("png", png(index % 3, index))):
                    info = tarfile.TarInfo(f"s{index:03d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    data = load_dataset(tmp_path / "set", "test")
    assert data.classes == ("blue", "green", "red")
    assert right(data)


def test_a_label_that_is_not_a_number_is_a_missing_one(tmp_path, caplog):
    table(BOTH, label=lambda i: float("nan") if i == 4 else float(i % 3))(tmp_path / "set")
    (tmp_path / "set/classnames.txt").write_text("\n".join(WORDS))
    assert right(load_dataset(tmp_path / "set"))
    assert "1 of 30 images have no label and are left out" in caplog.text


def test_links_to_folders_are_followed_and_a_class_without_images_is_refused(tmp_path):
    folders(("train", "test"))(tmp_path / "set")
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "set/train/red").rename(elsewhere)
    (tmp_path / "set/train/red").symlink_to(elsewhere)
    assert right(data := load_dataset(tmp_path / "set"))
    assert len(data) == 27
    (tmp_path / "set/train/red").unlink()
    (tmp_path / "set/train/red").mkdir()
    (tmp_path / "set/train/red/1.heic").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"train/red: no file of the class is an image that can be read \(\.heic\)"):
        load_dataset(tmp_path / "set")


def test_files_beside_images_are_counted(tmp_path, caplog):
    folders(("train", "test"))(tmp_path / "set")
    for index in range(3):
        (tmp_path / f"set/train/green/{index}.heic").write_bytes(b"x")
    assert len(load_dataset(tmp_path / "set", "train")) == 27
    told = "3 files in train/green are not images that can be read, and are left out, such as 0.heic"
    assert told in caplog.text
    assert "1 images in train lie in no folder of a class, and are left out, such as stray.png" in caplog.text


def test_a_third_level_of_folders_is_refused(tmp_path):
    folders(("train", "test"))(tmp_path / "set")
    (tmp_path / "set/train/red/camera0").mkdir()
    (tmp_path / "set/train/red/camera0/1.png").write_bytes(png(0, 0))
    with pytest.raises(ValueError, match="below that of its class, which could be red or camera0"):
        load_dataset(tmp_path / "set")


def test_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (40, 30), "white")
    picture.paste("red", (0, 0, 10, 30))  # to the left, in the file
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", exif=exif, quality=95)
    shown = decode(buffer.getvalue())
    assert shown.size == (30, 40)
    assert shown.getpixel((15, 3))[1] < 60  # the red is above
    assert shown.getpixel((15, 35))[1] > 200


def transparent(mode: str) -> bytes:
    """A black square on a transparent ground."""
    picture = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (5, 5, 15, 15))
    options = {}
    if mode == "P":
        palette = Image.new("P", (20, 20), 1)
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.paste(0, (5, 5, 15, 15))
        picture, options = palette, {"transparency": 1}
    elif mode == "L with a transparent grey":
        picture = Image.new("L", (20, 20), 7)
        picture.paste(0, (5, 5, 15, 15))
        options = {"transparency": 7}
    else:
        picture = picture.convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L with a transparent grey"])
def test_what_is_transparent_shows_the_ground(tmp_path, mode):
    for ground, colour in (("white", (255, 255, 255)), ("#00ff00", (0, 255, 0))):
        shown = decode(transparent(mode), ground)
        assert shown.getpixel((1, 1)) == colour
        assert shown.getpixel((10, 10)) == (0, 0, 0)
    folders(("train", "test"))(tmp_path / "set")
    (tmp_path / "set/test/red/test_0.png").write_bytes(transparent(mode))
    sets = [load_dataset(tmp_path / "set", "test", ground=ground) for ground in ("white", "lime")]
    corners = [{image.getpixel((1, 1)) for image in data.images if image.size == (20, 20)} for data in sets]
    assert corners == [{(255, 255, 255)}, {(0, 255, 0)}]
    assert sets[0].fingerprint() != sets[1].fingerprint()
    with pytest.raises(ValueError, match="unknown color specifier"):
        load_dataset(tmp_path / "set", "test", ground="whitish")


@pytest.mark.parametrize("splits", [True, False])
@pytest.mark.parametrize("name", ["notes.csv", "about.json", "old.tar", "old.zip", "metadata.csv"])
def test_folders_of_classes_win_over_what_lies_beside_them(tmp_path, caplog, name, splits):
    for split, count in (("train", 30), ("test", 15)):
        for index in range(count):
            folder = tmp_path / "set" / (split if splits else ".") / WORDS[index % 3]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{split}{index}.png").write_bytes(png(index % 3, index))
    (tmp_path / "set" / name).write_bytes(b"file_name,label\nred/train0.png,blue\n")
    parts = [load_dataset(tmp_path / "set", split) for split in ("train", "validation", "test")]
    assert [len(data) for data in parts] == ([27, 3, 15] if splits else [27, 9, 9])
    assert all(map(right, parts))
    assert f"set: ignored {name} beside the folders of classes" in caplog.text


def test_a_split_that_comes_twice_is_refused(tmp_path):
    folders(("val", "validation"))(tmp_path / "set")
    with pytest.raises(ValueError, match="set holds both val and validation; keep one"):
        load_dataset(tmp_path / "set")


def test_an_empty_label_is_a_missing_one_and_names_beside_words_are_told(tmp_path, caplog):
    table(BOTH, label=lambda i: "  " if i == 4 else WORDS[i % 3])(tmp_path / "set")
    (tmp_path / "set/classnames.txt").write_text("one\ntwo\nthree")
    assert load_dataset(tmp_path / "set").classes == ("blue", "green", "red")
    assert "1 of 30 images have no label and are left out" in caplog.text
    assert "labels are words already, so classnames.txt is not read" in caplog.text


def test_numbers_that_begin_with_one_are_told(tmp_path, caplog):
    folders(("train", "test"), ("1", "2", "3"))(tmp_path / "set")
    (tmp_path / "set/classnames.txt").write_text("\n".join(WORDS))
    with pytest.raises(ValueError, match="names, which are counted from 0; number the classes from 0"):
        load_dataset(tmp_path / "set")
    (tmp_path / "set/classnames.txt").write_text("\n".join(("none", *WORDS)))
    assert right(load_dataset(tmp_path / "set"))
    assert "no class has the number 0, the first line of classnames.txt, 'none'" in caplog.text


def test_few_images_of_a_drawn_set_are_few(tmp_path):
    assert len(load_dataset("digits", "test", count=20)) == 20
    with pytest.raises(ValueError, match="count = 0: at least 16 images of shapes"):
        load_dataset("shapes", "test", count=0)


def test_pickles_are_named_and_never_opened(tmp_path, caplog):
    folders(("train", "test"))(tmp_path / "set")
    for folder in (tmp_path / "set", tmp_path / "only"):
        folder.mkdir(exist_ok=True)
        (folder / "labels.pkl").write_bytes(b"cos\nsystem\n(S'touch attacked'\ntR.")
    assert len(load_dataset(tmp_path / "set")) > 0
    assert "set: left out labels.pkl, a pickle, which could run a program and is never opened" in caplog.text
    with pytest.raises(ValueError, match=r"only holds labels\.pkl, a pickle, which is never opened; give images"):
        load_dataset(tmp_path / "only")


LEFT_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # by `datasets`


@LEFT_OPEN
def test_a_table_that_names_not_all_images_is_told(tmp_path, caplog):
    (tmp_path / "set").mkdir()
    for index in range(12):
        (tmp_path / "set" / f"{index}.png").write_bytes(png(index % 3, index))
    rows = "".join(f"{index}.png,{WORDS[index % 3]}\n" for index in range(9))
    (tmp_path / "set/metadata.csv").write_text(f"file_name,label\n{rows}")
    load_dataset(tmp_path / "set")
    assert "3 images in the folder are left out, as no table names them, such as 10.png" in caplog.text


@LEFT_OPEN
def test_a_column_of_splits_divides_a_table(tmp_path):
    (tmp_path / "set").mkdir()
    rows = []
    for index in range(24):
        (tmp_path / "set" / f"{index}.png").write_bytes(png(index % 3, index))
        rows.append(f"{index}.png,{WORDS[index % 3]},{'test' if index >= 15 else 'train'}\n")
    (tmp_path / "set/metadata.csv").write_text(f"file_name,label,split\n{''.join(rows)}")
    assert [len(load_dataset(tmp_path / "set", split)) for split in ("train", "validation", "test")] == [12, 3, 9]


def test_parquet_files_whose_classes_are_in_different_orders_are_refused(tmp_path):
    (tmp_path / "set").mkdir()
    for split, names in (("train", WORDS), ("test", WORDS[::-1])):
        columns = {
            "image": [{"bytes": png(index % 3, index), "path": None} for index in range(12)],
            "label": [names.index(WORDS[index % 3]) for index in range(12)],
        }
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(names)))
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"set/{split}.parquet")
    with pytest.raises(ValueError, match=r"test\.parquet and train\.parquet have the classes of label in different"):
        load_dataset(tmp_path / "set")


def tar_of(path, names):
    with tarfile.open(path, "w") as tar:
        for name, data in names:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))


def test_masks_in_a_tar_are_not_taken_for_images(tmp_path):
    (tmp_path / "set").mkdir()
    names = []
    for index in range(24):
        names += [(f"s{index}.cls", str(index % 3).encode()), (f"s{index}.mask.png", png(0, 99))]
        names.append((f"s{index}.png", png(index % 3, index)))
    tar_of(tmp_path / "set/train.tar", names)
    (tmp_path / "set/classnames.txt").write_text("\n".join(WORDS))
    data = load_dataset(tmp_path / "set")
    assert len({image.tobytes() for image in data.pil_images(len(data))}) == len(data)


def test_dots_in_the_names_of_a_tar_are_refused(tmp_path):
    (tmp_path / "set").mkdir()
    names = [(f"img.{i:03}.{kind}", data) for i in range(12) for kind, data in (("cls", b"0"), ("png", png(0, i)))]
    tar_of(tmp_path / "set/train.tar", names)
    (tmp_path / "set/classnames.txt").write_text("a\nb")
    with pytest.raises(ValueError, match=r"have dots before their ending, such as img\.0\d\d\.png"):
        load_dataset(tmp_path / "set")


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    folders(("train", "test"))(tmp_path / "set")
    (tmp_path / "set/classnames.txt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"classnames\.txt is a pointer of git-LFS"):
        load_dataset(tmp_path / "set")


def test_labels_of_a_table_are_text_as_it_is_written(tmp_path):
    codes = ("NA", "None", "null", "1", "1.0", "007")
    (tmp_path / "set").mkdir()
    lines = ["file_name,label"]
    for index in range(60):
        (tmp_path / f"set/{index}.png").write_bytes(png(index % 3, index))
        lines.append(f"{index}.png,{codes[index % 6]}")
    (tmp_path / "set/labels.csv").write_text("\ufeff" + "\r\n".join(lines), newline="")
    parts = [load_dataset(tmp_path / "set", split) for split in ("train", "validation", "test")]
    assert {data.classes for data in parts} == {tuple(sorted(codes))}
    assert [len(data) for data in parts] == [36, 12, 12]


def test_the_same_name_in_two_forms_of_unicode_is_one_class(tmp_path):
    folders(("train", "test"), ("caf\u00e9", "green", "blue"))(tmp_path / "set")
    (tmp_path / "set/test/caf\u00e9").rename(tmp_path / "set/test/cafe\u0301")
    parts = [load_dataset(tmp_path / "set", split) for split in ("train", "test")]
    assert {data.classes for data in parts} == {("blue", "caf\u00e9", "green")}


def test_images_that_are_not_there_are_missing_and_not_broken(tmp_path, caplog):
    (tmp_path / "set").mkdir()
    lines = ["file_name,label", *(f"{index}.png,{WORDS[index % 3]}" for index in range(30))]
    for index in range(27):
        (tmp_path / f"set/{index}.png").write_bytes(png(index % 3, index))
    (tmp_path / "set/labels.csv").write_text("\n".join(lines))
    sizes = [len(load_dataset(tmp_path / "set", split)) for split in ("train", "validation", "test")]
    assert sum(sizes) == 27
    assert "images are missing and are left out" in caplog.text
    assert "decoded" not in caplog.text
    for path in (tmp_path / "set").glob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"they are missing, such as \d+\.png"):
        load_dataset(tmp_path / "set")


def test_a_saved_data_set_is_read(tmp_path):
    kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(WORDS)))
    made = {"image": [{"bytes": png(i % 3, i), "path": None} for i in range(30)], "label": [i % 3 for i in range(30)]}
    datasets.Dataset.from_dict(made, features=kinds).save_to_disk(tmp_path / "one")
    assert len(data := load_dataset(tmp_path / "one")) == 18
    assert right(data)


def test_archives_are_to_be_unpacked(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"set holds train\.zip; unpack it first"):
        load_dataset(tmp_path / "set")


def test_folders_of_one_number_are_refused_and_broken_links_counted(tmp_path, caplog):
    for index in range(18):
        path = tmp_path / "set" / ("0", "00", "1")[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(index % 3, index))
    (tmp_path / "set/1/98.png").symlink_to(tmp_path / "nowhere")
    load_dataset(tmp_path / "set")
    assert "1 links in 1 point to nothing, and are left out, such as 98.png" in caplog.text
    (tmp_path / "set/classnames.txt").write_text("a\nb")
    with pytest.raises(ValueError, match="several folders have one number"):
        load_dataset(tmp_path / "set")


def test_tables_in_the_folders_of_splits_divide_a_set(tmp_path):
    for split, count in (("train", 30), ("test", 15)):
        (tmp_path / "set" / split).mkdir(parents=True)
        for index in range(count):
            (tmp_path / f"set/{split}/{index}.png").write_bytes(png(index % 3, index))
        rows = "".join(f"{index}.png, {WORDS[index % 3]}\n" for index in range(count))
        (tmp_path / f"set/{split}/metadata.csv").write_text(f"file_name, label\n{rows}")
    parts = [load_dataset(tmp_path / "set", split) for split in ("train", "validation", "test")]
    assert [len(data) for data in parts] == [27, 3, 15]
    assert all(map(right, parts))
    for path in (tmp_path / "set").glob("*/*.csv"):
        path.unlink()
    with pytest.raises(ValueError, match="holds no labelled images"):  # train and test are no classes
        load_dataset(tmp_path / "set")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0.png,red,holdout", "row 1 has an unknown split, 'holdout'"),
        ("0.png,red,train\n0.png,blue,test", r"row 2 has 0\.png again"),
        ("0.png,red, yellow,train", "row 1 has more values than there are columns; put quotes around commas"),
        ('0.png,"red,train', "unexpected end of data"),
        ("0.png,red,train\n0.png,blue,train", r"row 2 has 0\.png again"),
        (",red,train", "row 1 has no file_name"),
    ],
)
def test_rows_that_cannot_be_right_are_refused(tmp_path, rows, message):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/labels.csv").write_text(f"file_name,label,split\n{rows}\n")
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path / "set")


@pytest.mark.parametrize(
    ("file", "head"),
    [("labels.csv", "filename,label"), ("labels.csv", "file_name;label"), ("labels.tsv", "file_name\tlabel")],
)
def test_one_folder_of_images_beside_a_table_of_another_kind_is_no_class(tmp_path, file, head):
    for index in range(12):
        path = tmp_path / f"set/images/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(index % 3, index))
    (tmp_path / "set" / file).write_text(f"{head}\n{head.replace('label', 'red')}\n")
    columns = f", whose columns are {', '.join(head.split(','))}, where file_name" if file.endswith("csv") else "; take"
    with pytest.raises(ValueError, match=f"has images in folders of one name alone, and beside them {file}{columns}"):
        load_dataset(tmp_path / "set")


@pytest.mark.parametrize("label", [{"name": "red"}, ["red"]])
def test_labels_of_several_values_are_refused(tmp_path, label):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/labels.jsonl").write_text(json.dumps({"file_name": "0.png", "label": label}))
    with pytest.raises(ValueError, match=r"labels\.jsonl: row 1 has several values in one place"):
        load_dataset(tmp_path / "set")


def test_tars_lose_nothing_in_silence(tmp_path, caplog):
    (tmp_path / "set").mkdir()
    rows = [
        (f"{i}.{end}", data)
        for i in range(24)
        for end, data in (("cls", b"red"), ("png", png(0, i)), ("1.png", png(1, i)))
    ]
    tar_of(path := tmp_path / "set/train.tar", rows)
    load_dataset(tmp_path / "set")
    assert "24 files in tars belong to another image" in caplog.text
    path.write_bytes(2 * (whole := path.read_bytes()))  # cat a.tar b.tar
    with pytest.raises(ValueError, match=r"train\.tar has no end, or goes on after it"):
        load_dataset(tmp_path / "set")
    path.write_bytes(whole)
    path.write_bytes(path.read_bytes()[: 512 * 8])  # a program was killed after a whole file
    with pytest.raises(ValueError, match=r"train\.tar has no end, or goes on after it"):
        load_dataset(tmp_path / "set")
    path.write_bytes(png(0, 0))
    with pytest.raises(ValueError, match=r"train\.tar cannot be read as a tar"):
        load_dataset(tmp_path / "set")
    tar_of(path, [("0.cls", b"red"), ("0.png", png(0, 0)), ("0.jpg", png(1, 0))])
    with pytest.raises(ValueError, match=r"train\.tar: 0 has several images, cls, png, jpg; leave one"):
        load_dataset(tmp_path / "set")
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.LNKTYPE, "1.png"
        tar.addfile(link)
    with pytest.raises(ValueError, match=r"train\.tar holds 0\.png as a link"):
        load_dataset(tmp_path / "set")


def test_a_broken_table_beside_folders_of_classes_changes_nothing(tmp_path, caplog):
    folders(("train", "test"), ("100% red", "green", "blue"))(tmp_path / "set")
    (tmp_path / "set/notes.csv").write_bytes("file_name;\u00e9".encode("latin-1"))
    (tmp_path / "set/log.jsonl").write_text("[1, 2]\n")
    (tmp_path / "set/train/100% red/x.txt").write_text("")
    assert len(load_dataset(tmp_path / "set", "test")) == 15
    assert "set: ignored log.jsonl, notes.csv beside" in caplog.text
    assert "1 files in train/100% red are not images that can be read" in caplog.text


def test_saved_sets_of_splits_keep_them(tmp_path):
    for split, count in (("train", 30), ("test", 15)):
        rows = {"image": [{"bytes": png(i % 3, i), "path": None} for i in range(count)]}
        kinds = datasets.Features(image=datasets.Image(), label=datasets.Value("string"), view=datasets.ClassLabel(2))
        rows |= {"label": [WORDS[i % 3] for i in range(count)], "view": [i % 2 for i in range(count)]}
        datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(tmp_path / "set" / split)
    parts = [load_dataset(tmp_path / "set", split) for split in ("train", "validation", "test")]
    assert [len(data) for data in parts] == [27, 3, 15]
    assert all(map(right, parts))


def test_saved_splits_whose_classes_are_in_different_orders_keep_their_names(tmp_path):
    for split, names in (("train", WORDS), ("test", WORDS[::-1])):
        kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(names)))
        rows = {"image": [{"bytes": png(i % 3, i), "path": None} for i in range(30)]}
        rows["label"] = [names.index(WORDS[i % 3]) for i in range(30)]
        datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(tmp_path / "set" / split)
    assert all(right(load_dataset(tmp_path / "set", split)) for split in ("train", "validation", "test"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": "0.png", "label": "red"}, "has no one column of images"),
        ({"image": [0, 1, 2], "label": "red"}, "has no one column of images"),
        (
            {"image": {"bytes": png(0, 0), "path": None}, "label": "red", "split": None},
            "several values in a column split",
        ),
    ],
)
def test_columns_that_hold_no_files_and_columns_of_splits_are_refused(tmp_path, columns, message):
    (tmp_path / "set").mkdir()
    rows = [{name: value or BOTH_NAMES[row % 2] for name, value in columns.items()} for row in range(12)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set/0.parquet")
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path / "set")


def test_a_damaged_parquet_is_told_as_damaged(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"set: train\.parquet cannot be read as parquet"):
        load_dataset(tmp_path / "set")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train-0", "training-0"), "holds both train and training; keep one"),
        (("a/train-0", "b/train-0"), "holds both a/train and b/train; keep one"),
        (("set-train-0", "set-test-0"), "begin the name of set-test-0.tar with its split"),
    ],
)
def test_files_of_uncertain_splits_are_refused(tmp_path, names, message):
    for name in names:
        write_tar(tmp_path / "set" / f"{name}.tar", 6)
    (tmp_path / "set/classnames.txt").write_text("\n".join(WORDS))
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path / "set")


def test_a_member_that_comes_twice_is_refused_and_names_that_are_said_alike_are_told(tmp_path, caplog):
    (tmp_path / "set").mkdir()
    tar_of(tmp_path / "set/train.tar", [("0.png", png(0, 0)), ("0.PNG", png(1, 0)), ("0.cls", b"red")])
    with pytest.raises(ValueError, match=r"train\.tar holds 0\.PNG twice"):
        load_dataset(tmp_path / "set")
    folders(("train", "test"), ("hot-dog", "hot_dog", "Hot dog"))(tmp_path / "food")
    load_dataset(tmp_path / "food")
    assert "names of classes repeat, as they are said: Hot dog, hot-dog, hot_dog" in caplog.text
