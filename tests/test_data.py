"""Embedded data sets: deterministic, split without leaks, and what they say they are."""

from __future__ import annotations

import pytest
import torch

from residual import dataset_names, load_dataset
from residual.artwork import load_artwork, vocabulary
from residual.data import SPLITS, Dataset
from residual.render import BACKDROPS, COLOURS, draw_scenes


@pytest.mark.parametrize("name", ["emoji-food", "digits"])
def test_the_same_seed_gives_the_same_images(name):
    first, again, other = (load_dataset(name, "test", seed=seed).fingerprint() for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("name", ["emoji-activities", "digits"])
def test_splits_share_no_image(name):
    seen = set()
    for split in SPLITS:
        data = load_dataset(name, split)
        images = {image.numpy().tobytes() for image in data.images}
        assert len(images) > 0.99 * len(data)
        assert not seen & images
        seen |= images
        assert set(data.labels.tolist()) == set(range(len(data.classes)))


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [("imagenet", "train", "unknown data set 'imagenet'; choose from emoji"), ("digits", "dev", "unknown split 'dev'")],
)
def test_unknown_names_are_named(name, split, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(name, split)


def test_labels_must_fit_the_classes():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="labels run from 0 to 3, with 2 classes"):
        Dataset("x", "test", images, torch.tensor([0, 3]), ("a", "b"), ("{}",))
    with pytest.raises((ValueError, TypeError)):  # the latter by the types in shapes, which tests check
        Dataset("x", "test", images, torch.tensor([0]), ("a",), ("{}",))


def test_every_name_loads_and_reads_like_english():
    assert "emoji" in dataset_names()
    names = [item.name for item in vocabulary()]
    assert len(set(names)) == len(names)
    assert {"flag of france", "pizza", "grinning face"} <= set(names)
    assert all(name == name.strip() and ":" not in name[:1] and "_" not in name for name in names)


def test_a_plain_scene_is_its_colour_and_its_drawing():
    sprites = torch.zeros(200, 4, 72, 72, dtype=torch.uint8)  # all transparent
    scene = draw_scenes(sprites, generator=torch.Generator().manual_seed(0))
    plain = scene.images[scene.backdrop == BACKDROPS.index("plain")].double()
    assert plain.flatten(2).std(2).max() == 0
    expected = torch.tensor(list(COLOURS.values()))[scene.colour[scene.backdrop == 0]].double()
    assert (plain.mean((2, 3)) - expected).abs().mean() < 20
    sprites[:, 0], sprites[:, 3] = 255, 255  # all red
    red = draw_scenes(sprites, generator=torch.Generator().manual_seed(0))
    share = ((red.images[:, 0] == 255) & (red.images[:, 1] == 0)).double().mean((1, 2))
    assert share[scene.size > 0.9].min() > 0.5
    assert share[scene.size < 0.5].max() < 0.3


def test_artwork_of_npm_is_missed_with_advice(tmp_path):
    with pytest.raises(FileNotFoundError, match="make artwork"):
        load_artwork(("noto",), tmp_path)
    with pytest.raises(ValueError, match="unknown styles"):
        load_artwork(("apple",))
