"""An extraction can be killed, damaged, run twice or run out of disk, and ends with the same numbers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from filelock import FileLock

from conftest import interrupt_at, write_config
from residual import extract, files, load_encoder, load_units, trace
from residual.data.dataset import Dataset
from residual.extraction import pixels_for
from residual.files import write_bytes
from residual.spectrum import pca
from residual.store import StoreError, join_units

OPTIONS = {"coordinates": "float32", "batch": 8, "shard": 16, "progress": False}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def shards(root):
    return [*root.glob("*/shard-*")]


def test_moments_and_coordinates_are_those_of_the_units(encoder, dataset, tmp_path):
    stored = extract(encoder, dataset, root=tmp_path, **OPTIONS)
    units = trace(encoder, dataset.images)
    assert stored.labels == units.labels
    assert stored.head_moments.count == len(dataset)
    spectra, unit = stored.head_pca(), pca(units["L1.H2"].double())
    k = spectra.eigenvalues.shape[-1]
    torch.testing.assert_close(spectra.eigenvalues[1, 2], unit.eigenvalues[:k], rtol=1e-5, atol=1e-9)
    samples = stored.head_coordinates(1, 2)
    ours, theirs = (torch.cdist(x[:20], x[20:]) for x in (samples.float(), units["L1.H2"]))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(stored.outputs(), units.output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stored.block_coordinates(2), units["L1.MLP"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stored.output_moments.mean.float(), units.output.mean(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(stored.class_labels(), dataset.labels)


def test_joined_parts_are_the_whole(encoder, dataset, small, tmp_path):
    whole = extract(encoder, dataset, root=tmp_path, **OPTIONS)
    images = dataset.head(40), dataset._take(torch.arange(40, 70))
    parts = [extract(encoder, part, root=tmp_path, **OPTIONS) for part in images]
    joined = join_units(parts)
    assert joined.manifest.count == joined.head_moments.count == 70
    assert joined.manifest.split == "train+train"
    assert joined.manifest.dataset_hash not in {part.manifest.dataset_hash for part in parts}
    for name in ("head_moments", "block_moments", "output_moments"):
        ours, theirs = getattr(joined, name), getattr(whole, name)
        torch.testing.assert_close(ours.mean, theirs.mean)
        torch.testing.assert_close(ours.scatter, theirs.scatter)
    torch.testing.assert_close(joined.head_coordinates(1, 2), whole.head_coordinates(1, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(joined.outputs(), whole.outputs(), rtol=1e-4, atol=1e-5)
    assert joined.class_labels().equal(dataset.labels)
    for other, options in ((small("vit"), OPTIONS), (encoder, OPTIONS | {"coordinates": None})):
        with pytest.raises(ValueError, match="cannot be joined"):
            join_units([whole, extract(other, dataset, root=tmp_path, **options)])


def test_a_second_run_does_no_work(encoder, dataset, tmp_path, monkeypatch):
    first = extract(encoder, dataset, root=tmp_path, **OPTIONS)
    monkeypatch.setattr("residual.extraction.trace", None)
    second = extract(encoder, dataset, root=tmp_path, **OPTIONS)
    assert torch.equal(first.head_moments.scatter, second.head_moments.scatter)


def test_what_an_extraction_depends_on_has_a_folder_of_its_own(encoder, dataset, small, tmp_path):
    folders = {extract(encoder, dataset, root=tmp_path, **OPTIONS).folder}
    folders.add(extract(encoder, dataset.head(40), root=tmp_path, **OPTIONS).folder)
    folders.add(extract(encoder, dataset, root=tmp_path, **OPTIONS | {"coordinates": None}).folder)
    encoder.model.visual.proj[0, 0] += 1
    folders.add(extract(encoder, dataset, root=tmp_path, **OPTIONS).folder)
    assert len(folders) == 4


@pytest.mark.parametrize("when", [1, 3, 6])
def test_an_interrupted_run_ends_with_the_same_bytes(encoder, dataset, tmp_path, monkeypatch, when):
    whole = extract(encoder, dataset, root=tmp_path / "whole", **OPTIONS)
    monkeypatch.setattr("residual.extraction.trace", interrupt_at(trace, when))
    with pytest.raises(KeyboardInterrupt):
        extract(encoder, dataset, root=tmp_path / "part", **OPTIONS)
    resumed = extract(encoder, dataset, root=tmp_path / "part", **OPTIONS)
    assert contents(resumed.folder) == contents(whole.folder)


# Processes that import little again; macOS does not let a process with these libraries fork.
FORKS = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    FORKS.set_forkserver_preload(["residual.encoders.from_open_clip", "residual.extraction"])


def extract_noise(encoder_folder: str, root: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (400, 3, 32, 32), generator=generator, dtype=torch.uint8)
    data = Dataset("noise", "train", images, torch.zeros(400, dtype=torch.int64), ("a",), ("{}",))
    extract(load_encoder(encoder_folder, pretrained=False), data, root=root, **OPTIONS)


def start(encoder_folder, root):
    process = FORKS.Process(target=extract_noise, args=(str(encoder_folder), str(root)))
    process.start()
    return process


def ended(process):
    process.join()
    return process.exitcode


def test_killed_and_doubled_processes_end_with_the_same_bytes(tmp_path):
    write_config(tmp_path / "openclip", "openclip")
    for _ in range(2):
        process, seen = start(tmp_path / "openclip", tmp_path / "killed"), len(shards(tmp_path / "killed"))
        deadline = time.monotonic() + 60
        while len(shards(tmp_path / "killed")) <= seen + 2 and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        assert len(shards(tmp_path / "killed")) > seen + 2
        process.kill()
        assert ended(process) == -signal.SIGKILL
    pair = [start(tmp_path / "openclip", tmp_path / "killed") for _ in range(2)]
    assert [ended(process) for process in pair] == [0, 0]
    assert ended(start(tmp_path / "openclip", tmp_path / "whole")) == 0
    (killed,), (whole,) = ([*(tmp_path / name).iterdir()] for name in ("killed", "whole"))
    assert contents(killed) == contents(whole)
    assert not list(killed.glob("*.partial"))


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "frames.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damage_is_named_and_mended(encoder, dataset, tmp_path, caplog, name, damage):
    stored = extract(encoder, dataset, root=tmp_path, **OPTIONS)
    before, path = contents(stored.folder), stored.folder / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-7] if damage == "truncated" else data[:-7] + bytes([data[-7] ^ 1]) + data[-6:])
    with pytest.raises(StoreError, match=name):
        load_units(stored.folder)
    extract(encoder, dataset, root=tmp_path, **OPTIONS)
    assert name in caplog.text
    assert contents(stored.folder) == before


@pytest.mark.parametrize("text", ["", "{", '{"encoder": 3}'])
def test_an_unreadable_manifest_means_starting_anew(encoder, dataset, tmp_path, caplog, text):
    stored = extract(encoder, dataset, root=tmp_path, **OPTIONS)
    before = contents(stored.folder)
    (stored.folder / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match="run extract again"):
        load_units(stored.folder)
    extract(encoder, dataset, root=tmp_path, **OPTIONS)
    assert "cannot be read" in caplog.text
    assert contents(stored.folder) == before


def test_an_incomplete_folder_is_not_opened(encoder, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("residual.extraction.trace", interrupt_at(trace, 5))
    with pytest.raises(KeyboardInterrupt):
        extract(encoder, dataset, root=tmp_path, **OPTIONS)
    (folder,) = tmp_path.iterdir()
    with pytest.raises(StoreError, match="32 of 70 images"):
        load_units(folder)


def test_infinite_outputs_are_not_stored(encoder, dataset, tmp_path):
    encoder.tower.blocks[1].mlp[-1].weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity for images 0 to 7"):
        extract(encoder, dataset, root=tmp_path, **OPTIONS)


def test_a_full_disk_leaves_the_last_good_state(tmp_path):
    """The file-size limit stands in for a full disk: writing fails in the middle of a file."""
    path = tmp_path / "file"
    write_bytes(path, b"good")
    code = """
        import resource, signal, sys
        from pathlib import Path
        from residual.files import write_bytes
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_bytes(Path(sys.argv[1]), bytes(5000))
        except OSError as error:
            print(error)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], capture_output=True, text=True)
    assert "no room for file" in out.stdout
    assert path.read_bytes() == b"good"
    assert os.listdir(tmp_path) == ["file"]


def test_moments_only_have_no_coordinates(encoder, dataset, tmp_path):
    stored = extract(encoder, dataset, root=tmp_path, **OPTIONS | {"coordinates": None})
    with pytest.raises(StoreError, match="no coordinates"):
        stored.head_coordinates(0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"coordinates": "int8"}, "float16"), ({"batch": 0}, "positive"), ({"split": "all"}, "unknown split 'all'")],
)
def test_bad_arguments_are_refused_before_any_work(encoder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        extract(encoder, "reference", root=tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_images_of_another_size_go_through_preprocessing(encoder, tmp_path):
    images = torch.randint(0, 256, (5, 3, 48, 40), dtype=torch.uint8)
    data = Dataset("other", "test", images, torch.zeros(5, dtype=torch.int64), ("a",), ("{}",))
    assert extract(encoder, data, root=tmp_path, progress=False).output_moments.count == 5


def test_pixels_are_not_preprocessed_twice(encoder):
    pixels = torch.randn(2, 3, 24, 24)  # as of an encoder that is run at another size than it was published with
    assert pixels_for(encoder, pixels) is pixels
    assert pixels_for(encoder, torch.zeros(2, 3, 24, 24, dtype=torch.uint8)).shape[2:] == encoder.tower.image_size


@pytest.mark.parametrize(("precision", "largest"), [("bfloat16", 2e-2), ("float16", 3e-3)])
def test_half_precision_is_near_and_is_not_taken_for_single(encoder, dataset, tmp_path, precision, largest):
    whole = extract(encoder, dataset, root=tmp_path, **OPTIONS)
    half = extract(encoder, dataset, root=tmp_path, precision=precision, **OPTIONS)
    assert half.folder != whole.folder
    assert half.manifest.precision == f"float32, {precision} by autocast"
    error = (half.head_outputs(1, 2) - whole.head_outputs(1, 2)).norm() / whole.head_outputs(1, 2).norm()
    assert 0 < error < largest
    with pytest.raises(ValueError, match=r"precision must be one of .* not 'int8'"):
        extract(encoder, dataset, root=tmp_path, precision="int8", **OPTIONS)


def test_only_a_long_wait_for_another_run_is_told(tmp_path, monkeypatch, caplog):
    done = threading.Event()

    def wait():
        with files.locked(tmp_path / "lock", "the set"):
            done.set()

    for silence, told in ((30.0, ""), (0.05, "another run is using the set; waiting for it")):
        monkeypatch.setattr(files, "SILENCE", silence)
        done.clear()
        waiting = threading.Thread(target=wait)
        with FileLock(tmp_path / "lock"):
            waiting.start()
            assert not done.wait(0.4)
        assert done.wait(20)
        waiting.join()
        assert (told in caplog.text) if told else not caplog.text
