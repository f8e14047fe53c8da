"""Embedded data sets: deterministic, split without leaks, cached, and what they say they are."""

from __future__ import annotations

import os

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from miniature import counts, fourteen
from miniature.emoji import load_artwork, vocabulary
from miniature.photographs import MORE, draw_tiles, photo_tiles, photograph
from miniature.reference import pick_drawings
from miniature.scenes import BACKDROPS, COLOURS, RESTYLES, draw_scenes, restyle
from miniature.sets import FONTS, PHOTOGRAPHS, drawing_pools
from miniature.shapes import HUES, PATTERNS, SHAPES, shape_masks
from miniature.splits import balanced
from miniature.textures import TEXTURES, draw_textures
from residual import load_dataset, task_names
from residual.data.dataset import Dataset
from residual.data.names import SPLITS
from residual.files import cache_folder

DIVIDED = ("reference", "emoji-groups", "styles", "numerals", "photographs")


def test_there_are_fourteen_sets_and_ten_labelled_tasks_and_more():
    assert len(fourteen()) == 14
    assert {"shapes-shape", "shapes-colour", "shapes-pattern", "styles-style"} <= set(task_names())


@pytest.mark.parametrize("name", fourteen())
def test_every_set_is_whole_and_balanced(name):
    data = load_dataset(name, "validation")
    assert data.images.shape[1:] == (3, 48, 48)
    assert len(data) >= (1000 if name != "digits" else 350)
    assert counts(name)["train"] >= (10_000 if name in ("reference", "random") else 1000)
    assert torch.bincount(data.labels, minlength=len(data.classes)).min() > 0
    assert len(set(data.classes)) == len(data.classes)
    assert len(set(data.templates)) >= 3
    assert all(template.count("{}") == 1 for template in data.templates)
    assert all(len(factor.values) == len(data) for factor in data.factors.values())


@pytest.mark.parametrize("name", fourteen())
def test_the_same_seed_gives_the_same_images(name, monkeypatch, tmp_path):
    kept = load_dataset(name, "validation", count=200).fingerprint()
    monkeypatch.setenv("RESIDUAL_CACHE", str(tmp_path))
    assert load_dataset(name, "validation", count=200).fingerprint() == kept
    assert load_dataset(name, "validation", count=200, seed=1).fingerprint() != kept


@pytest.mark.parametrize("count", [62, 64, 128, 200])
def test_few_images_come_from_all_classes(count):
    """Classes of `shapes` come shape by shape, and in each the patterns in turn: no shape or pattern may be missing."""
    labels = balanced(count, 256, torch.Generator().manual_seed(0))
    assert len(labels.unique()) == len(labels) == count
    assert len((labels // 32).unique()) == 8
    assert len((labels % 4).unique()) == 4


@pytest.mark.parametrize(("count", "classes"), [(256, 256), (300, 256), (10, 3)])
def test_no_class_has_two_images_more_than_another(count, classes):
    often = torch.bincount(balanced(count, classes, torch.Generator().manual_seed(0)), minlength=classes)
    assert often.sum() == count
    assert often.max() - often.min() <= 1


@pytest.mark.parametrize("name", fourteen())
def test_splits_share_no_image(name):
    seen = set()
    for split in ("validation", "test"):
        data = load_dataset(name, split, count=1000)
        images = {image.numpy().tobytes() for image in data.images}
        assert len(images) > 0.99 * len(data)
        assert not seen & images
        seen |= images


@pytest.mark.parametrize("name", DIVIDED)
@pytest.mark.parametrize("seed", [0, 1])
def test_artworks_are_divided_among_the_splits_where_identity_is_not_the_class(name, seed):
    sprites = load_artwork().sprites
    seen = set()
    for split in SPLITS:
        artwork = load_dataset(name, split, seed=seed, count=500).factors["artwork"].values
        own = set(artwork[artwork >= 0].tolist())
        if name in ("reference", "emoji-groups", "styles"):  # some emoji share a drawing
            own = {sprites[index].numpy().tobytes() for index in own}
        assert len(own) >= 4
        assert not seen & own
        seen |= own


@pytest.mark.parametrize("split", ["validation", "test"])
def test_no_drawing_for_testing_hardly_differs_from_one_of_training(split):
    drawn = load_artwork().sprites.float() / 255
    seen = torch.cat([drawn[:, :3] * drawn[:, 3:] + 0.5 * (1 - drawn[:, 3:]), drawn[:, 3:]], 1)
    train, own, whole = (
        torch.cat(drawing_pools(part, 0, twins=twins))
        for part, twins in (("train", False), (split, False), (split, True))
    )
    assert set(own.tolist()) < set(whole.tolist())
    assert torch.cdist(seen[own].flatten(1), seen[train].flatten(1)).min() > 0.1 * (4 * 72 * 72) ** 0.5


def test_classes_by_identity_have_drawings_that_differ():
    for name in ("emoji-flags", "emoji-animals", "emoji-food", "emoji-faces", "sketch"):
        names = load_dataset(name, "test", count=300).classes
        sprites = load_artwork().sprites
        rows = [i for i, item in enumerate(vocabulary()) if item.name in names]
        assert len(rows) == len(names) == len({sprites[i].numpy().tobytes() for i in rows})
        if name == "emoji-flags":
            assert "flag of france" in names
            assert "flag of clipperton island" not in names


def test_the_factors_of_shapes_are_in_the_pixels():
    data = load_dataset("shapes", "test")
    factor = {name: own.values for name, own in data.factors.items()}
    images = data.images.float()
    corner = images[:, :, 0, 0]
    grounds = torch.tensor([COLOURS[name] for name in data.factors["background"].names]).float()
    assert torch.cdist(corner, grounds).argmin(1).equal(factor["background"])
    assert torch.cdist(corner, grounds).amin(1).max() == 0
    hues = torch.tensor([COLOURS[name] for name in HUES]).float()
    exact = (images[:, None] - hues[None, :, :, None, None]).abs().amax(2) < 2  # [n hue h w]
    assert exact.sum((2, 3)).argmax(1).equal(factor["colour"])
    white = (images > 250).all(1).sum((1, 2)) / exact.sum((1, 2, 3))  # relative to the shape's coloured pixels
    dark = factor["background"] != 2
    solid = factor["pattern"] == PATTERNS.index("solid")
    assert white[dark & solid].max() == 0
    assert white[dark & ~solid].min() > 0
    # The middle of circles, squares, diamonds and crosses is where their outline is centred.
    off = (images - corner[:, :, None, None]).abs().amax(1) > 8
    axis = torch.arange(48) + 0.5
    for row in (factor["shape"] < 2).nonzero().flatten()[:200].tolist():
        columns, lines = axis[off[row].any(0)], axis[off[row].any(1)]
        centre = torch.stack([columns.min() + columns.max(), lines.min() + lines.max()]) / 48 - 1
        assert (centre - torch.stack([factor["x"][row], factor["y"][row]])).abs().max() < 0.06
        radius = (columns.max() - columns.min() + 1) / 48
        assert 0.75 < radius / factor["size"][row] < 1.1


def test_a_mask_covers_what_is_drawn_and_nothing_else():
    data = load_dataset("shapes", "test", size=56, count=300)
    factor = {name: own.values for name, own in data.factors.items()}
    place = torch.stack([factor["x"], factor["y"]], 1)
    masks = shape_masks(factor["shape"], factor["size"], factor["angle"], place, size=56)
    images = data.images.float()
    hues = torch.tensor([COLOURS[name] for name in HUES]).float()[factor["colour"]]
    ground = images[:, :, :1, :1]
    bare = (images - ground).abs().amax(1) < 2
    whole = (images - hues[:, :, None, None]).abs().amax(1) < 2
    assert masks[whole].min() > 0.99  # nothing but the shape has its colour
    solid = factor["pattern"] == 0
    assert masks[solid][bare[solid]].max() < 0.02
    assert (masks[solid] - (~bare[solid]).float()).abs().mean() < 0.05


def test_the_shapes_are_the_shapes_they_are_called():
    data = load_dataset("shapes", "train")
    solid = data.factors["pattern"].values == 0
    shape, angle = data.factors["shape"].values[solid], data.factors["angle"].values[solid]
    images = data.images[solid].float()
    masks = (images - images[:, :, :1, :1]).abs().amax(1) > 60
    crops = []
    for mask in masks:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].float()[None, None]
        crops.append(torch.nn.functional.interpolate(crop, 24, mode="area")[0, 0])
    crops = torch.stack(crops)
    upright = angle.abs() < 0.05

    def of(name):
        return crops[(shape == SHAPES.index(name)) & upright].mean(0)

    fill = {name: of(name).mean().item() for name in SHAPES}
    assert abs(fill["circle"] - 0.785) < 0.03
    assert fill["square"] > 0.93
    assert abs(fill["diamond"] - 0.5) < 0.04
    assert abs(fill["triangle"] - 0.5) < 0.04
    assert of("ring")[12, 12] == 0 < of("circle")[12, 12]
    assert of("triangle")[22].mean() > 0.85 > 0.2 > of("triangle")[1].mean()
    assert of("heart")[1, 12] < 0.4 < of("heart")[3, 5]  # a notch between two lobes
    assert of("cross")[12].mean() > 0.95
    assert of("cross")[2].mean() < 0.5
    tips = of("star")
    assert tips[0, 10:14].mean() > 0.2 > tips[0, :8].mean()
    assert tips.mean() < 0.45
    half = len(crops) // 2
    model = KNeighborsClassifier(1).fit(crops[:half].flatten(1), shape[:half])
    assert model.score(crops[half:].flatten(1), shape[half:]) > 0.97


def test_tasks_of_shapes_ask_for_their_factors():
    whole = load_dataset("shapes", "test")
    for factor in ("shape", "colour", "pattern"):
        task = load_dataset(f"shapes-{factor}", "test")
        assert task.images.equal(whole.images)
        words = [task.classes[label] for label in task.labels.tolist()]
        assert all(word in caption.split() for word, caption in zip(words, whole.captions(), strict=True))
    assert "a striped blue circle" in whole.captions()
    few = whole.head(5)
    assert len(few.factors["x"].values) == 5
    assert few.images.untyped_storage().nbytes() == few.images.nbytes


def test_random_images_are_uniform_in_what_the_zoo_sees():
    data = load_dataset("random", "train")
    assert len(data) == 10_000
    counts = torch.bincount(data.images[:500].flatten().long(), minlength=256).double()
    assert (counts / counts.mean() - 1).abs().max() < 0.05


def test_textures_have_two_colours_and_the_striped_ones_stripes():
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(len(TEXTURES)).repeat(20)
    images = draw_textures(kind, generator=generator).float()
    flat = images.flatten(2)
    spread = flat - flat.mean(2, keepdim=True)
    shares = torch.linalg.svdvals(spread)  # mixtures of two colours lie on one line
    assert (shares[:, 1] / shares[:, 0]).max() < 0.03
    assert flat.std(2).amax(1).min() > 10
    grey = images.mean(1) - images.mean((1, 2, 3))[:, None, None]
    spectrum = torch.fft.fft2(grey).abs().flatten(1) ** 2
    peak = spectrum.sort(descending=True).values[:, :6].sum(1) / spectrum.sum(1)
    mean = {name: peak[kind == index].mean().item() for index, name in enumerate(TEXTURES)}
    assert mean["striped"] > mean["gridded"] > mean["grainy"]


def test_fonts_and_photographs_ship_with_their_packages():
    data = load_dataset("numerals", "validation")
    assert {FONTS[i] for i in data.factors["artwork"].values.tolist()} <= set(FONTS)
    assert len(load_dataset("photographs", "validation").classes) == len(PHOTOGRAPHS) == 15


@pytest.mark.parametrize("seed", [0, 1])
def test_no_two_tiles_of_a_photograph_overlap_in_any_split(seed):
    taken = {name: torch.zeros(photograph(name).shape[1:], dtype=torch.int) for name in (*PHOTOGRAPHS, *MORE)}
    for split in SPLITS:
        for tile in photo_tiles(split, seed):
            part = photograph(tile.photograph)[:, tile.top :, tile.left :][:, : tile.side, : tile.side]
            assert part.shape[1:] == (tile.side, tile.side)
            assert part.std() >= 2
            taken[tile.photograph][tile.top : tile.top + tile.side, tile.left : tile.left + tile.side] += 1
    assert all(times.max() == 1 for times in taken.values())
    assert min(times.float().mean() for times in taken.values()) > 0.4


@pytest.mark.parametrize("split", SPLITS)
def test_the_reference_set_uses_no_piece_twice(split):
    data = load_dataset("reference", split)
    tile, artwork = data.factors["tile"].values, data.factors["artwork"].values
    tiles, used = photo_tiles(split, 0), tile[tile >= 0]
    assert used.sort().values.equal(torch.arange(len(used)))
    assert len(used) <= len(tiles)
    pictures = data.images[data.labels == data.classes.index("photograph")]
    order = tile[data.labels == data.classes.index("photograph")]
    assert pictures.equal(draw_tiles([tiles[index] for index in order.tolist()], 48))
    assert (artwork < 0).equal(data.labels >= data.classes.index("photograph"))
    assert torch.bincount(artwork[artwork >= 0]).max() <= len(RESTYLES)
    digits = load_dataset("digits", split)
    written = data.images[data.labels == data.classes.index("handwritten number")]
    assert len(written) == min(len(data) // 16, -(-len(digits) // 3))
    as_tasks_read = digits.balanced(len(digits) // 2).images
    assert len({image.numpy().tobytes() for image in (*written, *as_tasks_read)}) == len(written) + len(as_tasks_read)


def test_a_drawing_comes_once_in_each_style_and_each_outline_once():
    sprites = load_artwork().sprites
    flags = sprites[[i for i, item in enumerate(vocabulary()) if item.group == "Flags"]]
    drawing, style = pick_drawings(flags, 6 * len(flags), torch.Generator().manual_seed(0))
    black = style == RESTYLES.index("silhouette")
    outlines = len({flag[3].numpy().tobytes() for flag in flags})
    pairs = list(zip(drawing.tolist(), style.tolist(), strict=True))
    assert len(set(pairs)) == len(set(pairs[: 5 * len(flags) + outlines])) == 5 * len(flags) + outlines
    assert black[: 5 * len(flags) + outlines].sum() == outlines < len(flags) / 2


def test_a_style_changes_what_it_says():
    sprites = load_artwork().sprites[:20]
    drawn = {style: restyle(sprites, style) for style in RESTYLES}
    assert drawn["colour"].equal(sprites)
    assert drawn["grey"][:, 0].equal(drawn["grey"][:, 2])
    assert drawn["silhouette"][:, :3].max() == 0
    assert drawn["silhouette"][:, 3].equal(sprites[:, 3])
    assert drawn["negative"][:, :3].equal(255 - sprites[:, :3])
    assert drawn["blocky"][0, :, :6, :6].flatten(1).float().std(1).max() == 0
    assert 0.02 < (drawn["line"][:, 3] > 128).double().mean() < 0.4
    with pytest.raises(ValueError, match="unknown style 'oil'"):
        restyle(sprites, "oil")


def test_what_is_drawn_is_kept_and_what_is_damaged_drawn_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("RESIDUAL_CACHE", str(tmp_path / "né w"))
    first = load_dataset("digits", "test")
    (path,) = cache_folder().glob("digits-test-0-*.safetensors")
    written = path.stat().st_mtime_ns
    assert load_dataset("digits", "test").fingerprint() == first.fingerprint()
    assert path.stat().st_mtime_ns == written
    whole = path.read_bytes()
    for damaged in (whole[:1000], b"", whole[:-5] + bytes(5)):
        path.write_bytes(damaged)
        caplog.clear()
        assert load_dataset("digits", "test").fingerprint() == first.fingerprint()
        assert "is damaged" in caplog.text
        caplog.clear()
        assert load_dataset("digits", "test").fingerprint() == first.fingerprint()
        assert not caplog.text


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RESIDUAL_CACHE", str(tmp_path / "file" / "below"))
    assert len(load_dataset("digits", "test")) == 360
    assert "cannot be cached" in caplog.text
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("imagenet-r", "train", "unknown data set 'imagenet-r'; choose from reference"),
        ("shapes-size", "train", "unknown data set 'shapes-size'"),
        ("digits", "dev", "unknown split 'dev'"),
    ],
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


def test_every_emoji_reads_like_english():
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
    assert share[scene.size < 0.6].max() < 0.45
    black = draw_scenes(sprites, generator=torch.Generator().manual_seed(0), onto=torch.zeros(200, 3, 48, 48))
    inside = (black.images[:, 0] > 128).double()
    where = torch.stack([inside.mean(1), inside.mean(2)], -1) * (torch.arange(48)[None, :, None] - 23.5) / 24
    middle = where.sum(1) / inside.mean((1, 2))[:, None] / 48
    assert (middle - black.position).abs().max() < 0.1  # the edge cuts corners off


def test_artwork_of_npm_is_missed_with_advice(tmp_path):
    with pytest.raises(FileNotFoundError, match="make artwork"):
        load_artwork(("noto",), tmp_path)
    with pytest.raises(ValueError, match="unknown styles"):
        load_artwork(("apple",))


def test_a_balanced_part_has_of_each_class_as_many_as_can_be():
    whole = load_dataset("emoji-flags", "validation")
    part = whole.balanced(len(whole.classes))
    assert set(part.labels.tolist()) == set(whole.labels.tolist())
    assert part.labels.bincount().max() - 1 <= 1
    first = {label: int((whole.labels == label).nonzero()[0]) for label in set(whole.labels.tolist())}
    rows = {tuple(image.flatten().tolist()) for image in part.images}
    assert all(tuple(whole.images[row].flatten().tolist()) in rows for row in list(first.values())[:5])
    with pytest.raises(ValueError, match="does not fit"):
        whole.balanced(len(whole) + 1)
