"""Sets in the three common formats, built here and read by the real `datasets`; and what can go wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from edition.inputs import task_parts
from edition.pages import ParameterError
from edition.parameters import check_parameters
from hub_server import Hub
from residual import extract, load_dataset
from residual.alignment import FineTuned, fit
from residual.data.catalogue import catalogue
from residual.data.hub import DataError
from residual.selection import encode_images

COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))
NAMES = ("red thing", "green thing", "blue thing")


pytestmark = pytest.mark.usefixtures("own_cache")


def png(label: int, index: int) -> bytes:
    """An image of its class's colour, of a size and brightness of its own."""
    pixels = np.full((30 + index % 7, 40, 3), COLOURS[label], np.uint8)
    pixels[: index + 1, 0] = index
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path: Path, count: int, broken: tuple[int, ...] = (), classes: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index in range(count):
            image = png(index % 3, index)
            for ext, data in (
                ("cls", str(index % classes).encode()),
                ("png", image[:60] if index in broken else image),
            ):
                info = tarfile.TarInfo(f"s{index:07d}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_webdataset(folder: Path, broken: tuple[int, ...] = ()) -> Path:
    write_tar(folder / "train/0.tar", 60, broken)
    write_tar(folder / "test/0.tar", 30)
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na drawing of a {c}.\n")
    return folder


def write_images(folder: Path, splits: dict[str, int]) -> Path:
    for split, count in splits.items():
        for index in range(count):
            path = folder / split / NAMES[index % 3] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(index % 3, index))
    return folder


def write_parquet(folder: Path) -> Path:
    found = datasets.load_dataset(str(write_images(folder.with_name("images"), {"train": 60, "test": 30})))
    (folder / "data").mkdir(parents=True)
    for split, table in found.items():
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


WRITERS = {
    "webdataset": write_webdataset,
    "parquet": write_parquet,
    "images": lambda folder: write_images(folder, {"train": 60, "test": 30}),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_kind_of_data(tmp_path, kind, encoder):
    folder = WRITERS[kind](tmp_path / "mes données")  # a space, and no ASCII
    splits = {split: load_dataset(str(folder), split) for split in ("train", "validation", "test")}
    assert {split: len(data) for split, data in splits.items()} == {"train": 54, "validation": 6, "test": 30}
    for data in splits.values():
        assert sorted(data.classes) == sorted(NAMES)
        for image, label in zip(data.images, data.labels.tolist(), strict=True):
            assert image.mode == "RGB"
            assert image.getpixel((20, 20)) == COLOURS[NAMES.index(data.classes[label])]
    assert len(torch.bincount(splits["train"].labels).unique()) == 1
    seen = [
        {images.checksums[row] for row in images.rows.tolist()}
        for images in (splits["train"].images, splits["validation"].images)
    ]
    assert not seen[0] & seen[1]
    expected = ("a photo of a {}.", "a drawing of a {}.") if kind == "webdataset" else ("a photo of a {}.",)
    assert splits["train"].templates == expected
    again, other = load_dataset(str(folder)), load_dataset(str(folder), seed=1)
    assert again.fingerprint() == splits["train"].fingerprint() != other.fingerprint()


def test_a_set_that_is_not_divided_is_divided_by_class(tmp_path):
    folder = write_images(tmp_path / "set", {"train": 60})
    parts = task_parts(str(folder), 1000, 0)
    assert {split: len(data) for split, (data, _) in parts.items()} == {"train": 36, "validation": 12, "test": 12}
    seen = [
        images.checksums[row] for images in (data.images for data, _ in parts.values()) for row in images.rows.tolist()
    ]
    assert len(set(seen)) == 60


def test_corrupt_images_are_counted_named_and_left_out(tmp_path, caplog):
    broken, sound = write_webdataset(tmp_path / "set", broken=(3, 17)), write_webdataset(tmp_path / "sound")
    parts = {split: load_dataset(str(broken), split) for split in ("train", "validation")}
    assert sorted(key for data in parts.values() for key in data.excluded) == ["s0000003", "s0000017"]
    for split, data in parts.items():  # the others stay where they were
        left, whole = len(data.excluded), len(load_dataset(str(sound), split))
        assert sum(1 for _ in data.images) == len(data) == whole - left
        told = f"set, {split}: {left} of {whole} images cannot be decoded and are left out: {', '.join(data.excluded)}"
        assert (told in caplog.text) == (left > 0)
    write_tar(sound / "test/0.tar", 30, broken=tuple(range(30)))
    with pytest.raises(ValueError, match="not one image of test can be read: they cannot be decoded"):
        load_dataset(str(sound), "test")


def test_units_are_those_of_the_preprocessed_images_with_workers_or_without(tmp_path, encoder):
    data = load_dataset(str(write_webdataset(tmp_path / "set")))

    def run(name, **more):
        options = {"coordinates": "float32", "batch": 7, "shard": 20, "progress": False} | more
        return extract(encoder, data, root=tmp_path / name, **options)

    plain, helped = run("plain"), run("helped", workers=1)
    pixels = torch.stack([encoder.preprocess(image) for image in data.images])
    assert plain.outputs().allclose(encoder.encode_image(pixels), atol=1e-5)
    assert encode_images(encoder, data).allclose(plain.outputs(), atol=1e-5)
    assert helped.outputs().equal(plain.outputs())
    assert helped.head_moments.scatter.equal(plain.head_moments.scatter)
    assert plain.class_labels().equal(data.labels)


def test_batches_are_halved_where_memory_does_not_suffice(tmp_path, encoder, dataset, monkeypatch, caplog):
    from residual import extraction

    trace, sizes = extraction.trace, []

    def small_memory(encoder, pixels):
        sizes.append(len(pixels))
        if len(pixels) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return trace(encoder, pixels)

    monkeypatch.setattr(extraction, "trace", small_memory)
    units = extract(encoder, dataset, root=tmp_path, coordinates="float32", batch=64, progress=False)
    assert sizes[:3] == [64, 32, 16]
    assert "batches of 16" in caplog.text
    assert units.outputs().allclose(encoder.encode_image(dataset.images), atol=1e-5)
    monkeypatch.setattr(extraction, "trace", lambda *_: (_ for _ in ()).throw(RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        extract(encoder, dataset, root=tmp_path / "b", progress=False)


def test_fine_tuning_takes_images_of_a_file(tmp_path, encoder):
    parts = task_parts(str(write_webdataset(tmp_path / "set")), 60, 0)
    (seen, known), (held, truth) = ((parts[split][0].images, parts[split][1]) for split in ("train", "validation"))
    classes = torch.nn.functional.normalize(
        torch.randn(3, encoder.output_dim, generator=torch.Generator().manual_seed(0))
    )
    result = fit(FineTuned(encoder), (seen, known), (held, truth), classes, rate=1e-3, cache=tmp_path / "fits")
    assert result.accuracy > 0.9


def test_bad_sets_say_what_is_wrong(tmp_path):
    folder = write_webdataset(tmp_path / "set")
    (folder / "classnames.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="labels run from 0 to 2, but 2 classes have names"):
        load_dataset(str(folder))
    (folder / "classnames.txt").unlink()
    with pytest.raises(ValueError, match=r"numbers for labels and no classnames\.txt"):
        load_dataset(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no labelled images; give images in a folder for each class"):
        load_dataset(str(tmp_path / "empty"))
    text = tmp_path / "text"
    text.mkdir()
    (text / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(
        ValueError, match=r"text holds no labelled images, but train\.csv, whose columns are a, b, where"
    ):
        load_dataset(str(text))
    (write_webdataset(tmp_path / "cut") / "train/0.tar").write_bytes((tmp_path / "cut/test/0.tar").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"0\.tar cannot be read as a tar: unexpected end of data"):
        load_dataset(str(tmp_path / "cut"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset x is a gated dataset on the Hub."), "hf auth login"),
        (datasets.exceptions.DatasetNotFoundError("Dataset x doesn't exist"), "Check the name"),
        (ConnectionError("Couldn't reach it"), "set HF_HOME to a cache that holds it, or give a local folder"),
        (TimeoutError("timed out"), "what was downloaded so far is kept"),
        (OSError(28, "No space left on device"), "there is no room left where HF_HOME"),
        (PermissionError(13, "Permission denied"), "it cannot be written where HF_HOME"),
    ],
)  # fmt: skip
def test_what_a_hub_can_do_to_us_is_told_with_its_remedy(monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DataError, match=f"cifar10.*{message}"):
        load_dataset("cifar10")


def test_the_newest_revision_is_read_unless_another_is_given(tmp_path, monkeypatch):
    folder, asked = write_webdataset(tmp_path / "set"), []

    def fake(repo, *, revision, **_):
        asked.append((repo, revision))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    for name in ("cifar10", "cifar10", "cifar10@" + "c" * 40, "someone/things"):
        assert load_dataset(name, "test").classes == NAMES
    repo = "clip-benchmark/wds_vtab-cifar10"
    assert asked == [(repo, None), (repo, "c" * 40), ("someone/things", None)]


def test_chapters_take_data_sets_of_a_hub_and_folders_and_refuse_others(tmp_path):
    check_parameters(tasks=["cifar10", "org/name", str(tmp_path), "digits"], dataset="imagenet@abc")
    with pytest.raises(ParameterError, match=r"unknown data set 'cifar11'; choose from .*cifar10"):
        check_parameters(tasks=["cifar11"])
    with pytest.raises(ParameterError, match="unknown data set"):
        check_parameters(dataset=str(tmp_path / "none"))


def test_the_catalogue_holds_the_papers_sets():
    assert len(catalogue()) == 13  # and random images, which are drawn
    for entry in catalogue().values():
        counts = entry.counts()
        assert all(count > 0 for count in counts.values())
        assert sum(counts.values()) <= entry.train + entry.test
    assert catalogue()["imagenet"].counts()["train"] == 80_000


LOAD = """
import sys
from residual import load_dataset
from residual.data.hub import DataError
for name in map(str.strip, sys.stdin):
    try:
        data = load_dataset(name, "test")
        print(len(data), *data.classes, *data.templates, sep="|", flush=True)
    except DataError as error:
        print("DataError:", *str(error).split(), flush=True)
"""


@contextlib.contextmanager
def loading(server, folder: Path, **more: str) -> Iterator[Callable[[str], Callable[[], str]]]:
    """Another process that loads sets' test splits from our hub, with caches below `folder`.

    Yields `load`: load(name) starts a load, and returns a function that waits for its line of output.
    """
    own = {"HF_ENDPOINT": server.address, "HF_HOME": str(folder / "home"), "RESIDUAL_CACHE": str(folder / "cache")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", LOAD], env=os.environ | own | more, **pipes) as run:

        def load(name: str) -> Callable[[], str]:
            print(name, file=run.stdin, flush=True)
            return lambda: run.stdout.readline().strip()

        yield load
        run.stdin.close()
        assert run.wait() == 0


CARD = """---
dataset_info:
  splits:
  - name: train
    num_examples: 60
  - name: test
    num_examples: {}
---
"""


def test_two_processes_fetch_parquet_into_one_cache_and_wrong_sizes_are_noticed(tmp_path):
    folder = write_parquet(tmp_path / "set")
    (folder / "README.md").write_text(CARD.format(30))
    wrong = shutil.copytree(folder, tmp_path / "wrong")
    (wrong / "README.md").write_text(CARD.format(29))
    with (
        Hub({"org/set": folder, "org/wrong": wrong}).serving() as server,
        loading(server, tmp_path) as one,
        loading(server, tmp_path) as other,
    ):
        told = [load("org/set") for load in (one, other)]
        assert [line() for line in told] == ["|".join(["30", *sorted(NAMES), "a photo of a {}."])] * 2
        assert "org/wrong cannot be fetched" in (told := one("org/wrong")())
        assert "SplitsVerificationError" in told or "NonMatchingSplitsSizesError" in told


def test_a_hub_that_fails_in_the_middle_is_told_and_taken_up_again(tmp_path):
    folder = write_webdataset(tmp_path / "set")
    whole = "|".join(["30", *NAMES, "a photo of a {}.", "a drawing of a {}."])
    with Hub({"clip-benchmark/wds_vtab-cifar10": folder}).serving() as server:
        with loading(server, tmp_path) as load:
            for fault, remedy in (
                ("busy", "cannot be fetched"),
                ("gated", "hf auth login"),
                ("cut", "what was downloaded so far is kept"),
            ):
                server.fault = fault
                told = load("cifar10")()
                assert told.startswith("DataError: cifar10: ")
                assert remedy in told
            server.fault = ""
            assert "org/none cannot be fetched" in load("org/none")()
        with loading(server, tmp_path) as load:
            assert load("cifar10")() == whole
    with loading(server, tmp_path, HF_HUB_OFFLINE="1") as load:  # and without a network from then on
        assert load("cifar10")() == whole


def test_prompts_of_the_paper_stand_in_for_those_of_the_hub(tmp_path):
    """SVHN's set of the hub has numbers as words, RESISC45's four templates; the paper's are others."""
    repos = {}
    for name, classes in (("svhn", 10), ("resisc45", 45)):
        folder = repos[catalogue()[name].repo] = tmp_path / name
        for split in ("train", "test"):
            write_tar(folder / split / "0.tar", 3 * classes, classes=classes)
        (folder / "classnames.txt").write_text("\n".join(f"word {i}" for i in range(classes)))
        (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.")
    with Hub(repos).serving() as server:
        read = "import json; from residual import load_dataset\n"
        read += "for name in ('svhn', 'resisc45'): print(json.dumps(load_dataset(name, 'test').prompts()))"
        env = os.environ | {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        told = subprocess.run([sys.executable, "-c", read], env=env, capture_output=True, text=True, check=True)
    numbers, places = map(json.loads, told.stdout.splitlines())
    assert numbers == [f'a photo of the number: "{i}".' for i in range(10)]
    assert len(places) == len(set(places)) == 45 * 18
    assert "aerial view of the word 44." in places
