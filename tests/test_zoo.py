"""Captions are true of their positives, training resumes, and the embedded encoder knows its emoji."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from conftest import interrupt_at
from miniature import ENCODERS, WEIGHTS
from miniature.__main__ import main
from miniature.emoji import load_artwork, vocabulary
from miniature.scenes import BACKDROPS, COLOURS, sample_scenes
from miniature.training.batches import Batches, Renderer, build_tokenizer
from miniature.training.captions import STYLE_WORDS, load_concepts, write_captions
from miniature.training.objectives import Batch, Contrast, assignments, contrastive_loss, distillation_loss
from miniature.training.recipes import OUTPUT, RECIPES, build_encoder
from miniature.training.train import _Run, train
from residual import load_dataset, load_encoder
from residual.selection import class_encodings, encode_images, knn_accuracy, zero_shot_accuracy


@pytest.fixture(scope="module")
def npm(tmp_path_factory):
    """A stand-in for the npm packages: keywords, and Twemoji's drawings under Noto's file names."""
    root = tmp_path_factory.mktemp("npm")
    (root / "openmoji/data").mkdir(parents=True)
    rows = [{"hexcode": item.code, "subgroups": "sub-group", "tags": f"{item.group}, thing"} for item in vocabulary()]
    (root / "openmoji/data/openmoji.json").write_text(json.dumps(rows))
    return root


def test_captions_are_positives_of_the_scenes_they_are_true_of(npm):
    artwork, concepts = load_artwork(), load_concepts(npm)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(40, (300,), generator=generator)
    scene = sample_scenes(len(drawn), generator)
    captions = write_captions(concepts, artwork, drawn, scene, generator)
    assert captions.positives.diagonal().all()
    names = [vocabulary()[i].name for i in drawn.tolist()]
    exact = 0
    for column, text in enumerate(captions.texts):
        if text in names:  # a bare name: true of every scene of that emoji, of no other
            exact += 1
            assert captions.positives[:, column].tolist() == [name == text for name in names]
        if " on a striped background" in text:
            assert not captions.positives[scene.kind != BACKDROPS.index("striped"), column].any()
        for index, colour in enumerate(COLOURS):
            if text == f"something on a {colour} background":
                expected = (scene.kind == 0) & (scene.colour == index)
                assert captions.positives[:, column].equal(expected)
    assert exact > 10
    assert any(STYLE_WORDS[0] in text for text in captions.texts)
    assert not any(word in text for text in captions.texts for word in STYLE_WORDS[1:])


def test_the_loss_is_least_where_all_positives_are_alike():
    text = torch.eye(4)
    positives = torch.eye(4, dtype=torch.bool)
    assert contrastive_loss(text, text, torch.tensor(50.0), positives) < 1e-6
    both = positives | positives.flip(0)
    shared = torch.nn.functional.normalize(text + text.flip(0), dim=1)
    good = contrastive_loss(shared, text, torch.tensor(5.0), both)
    assert good < contrastive_loss(text, text, torch.tensor(5.0), both)


def test_naming_the_emoji_adds_to_the_loss(npm, artwork):
    recipe = small("mini-openclip", identity=0.0)
    batches = Batches(recipe, npm)
    batch = Renderer(batches.artwork, torch.device("cpu"))(batches[0])
    encoder = build_encoder("mini-openclip", recipe, len(batches.tokenizer))
    plain, naming = Contrast(encoder, 0.0), Contrast(encoder, 0.5)
    torch.nn.init.zeros_(naming.classify.weight)
    torch.nn.init.zeros_(naming.classify.bias)
    assert naming.classify.in_features == OUTPUT
    assert naming(batch).item() == pytest.approx(plain(batch).item() + 0.5 * math.log(1897), rel=1e-4)


def small(name, **changes):
    """The recipe of an encoder of two layers, on Twemoji alone, for four steps of eight images."""
    options = {
        "styles": MappingProxyType({"twemoji": 1.0}),
        "steps": 4,
        "batch": 8,
        "layers": 2,
        "width": 48,
        "heads": 3,
    }
    return dataclasses.replace(RECIPES[name], **options | changes)


@pytest.fixture
def artwork(monkeypatch):
    """Decoded once for all runs."""
    monkeypatch.setattr("miniature.training.batches.load_artwork", functools.cache(load_artwork))


@pytest.mark.parametrize("name", ["mini-clip", "mini-blip", "mini-dinov2", "mini-vit"])
def test_training_stopped_and_resumed_ends_with_the_same_weights(name, npm, artwork, tmp_path, monkeypatch):
    options = {"recipe": small(name), "every": 2}
    train(name, tmp_path / "whole", npm, **options)
    with monkeypatch.context() as patch:
        patch.setattr(_Run, "checkpoint", interrupt_at(_Run.checkpoint, 2))
        with pytest.raises(KeyboardInterrupt):
            train(name, tmp_path / "part", npm, **options)
    train(name, tmp_path / "part", npm, **options)
    (file,) = (path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    whole, part = (load_file(tmp_path / run / file) for run in ("whole", "part"))
    assert all(torch.equal(whole[key], part[key]) for key in whole)
    assert {value.dtype for value in whole.values()} == {torch.float16}
    with pytest.raises(ValueError, match="other settings"):
        train(name, tmp_path / "part", npm, recipe=small(name, seed=9))
    encoder = load_encoder(str(tmp_path / "whole"))
    assert encoder.family == load_encoder(name).family
    assert (encoder.layers, encoder.heads, encoder.dtype) == (2, 3, torch.float32)
    if encoder.reads_text:
        assert encoder.encode_text(["a red circle"]).shape == (1, 128)


@pytest.mark.parametrize("name", ["mini-openclip", "mini-dinov2"])
def test_a_batch_drawn_by_another_process_is_the_same(name, npm, artwork):
    batches = Batches(small(name), npm)
    render = Renderer(batches.artwork, torch.device("cpu"))
    here, (there,) = batches[2], DataLoader(batches, batch_size=None, sampler=[2], num_workers=1)
    for field in dataclasses.fields(Batch):
        a, b = (getattr(render(drawn), field.name) for drawn in (here, there))
        assert (a is None and b is None) or a.equal(b)
    assert len(render(here).images) == len(here.rows) * len(here.views)


def test_assignments_use_all_prototypes_alike():
    logits = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) + torch.arange(16) / 8
    assigned = assignments(logits, temperature=1.0, rounds=50)
    assert torch.allclose(assigned.sum(1), torch.ones(64), atol=1e-5)
    assert torch.allclose(assigned.sum(0), torch.full((16,), 4.0), atol=1e-3)


def test_distillation_is_least_where_the_views_agree():
    view = 0.8 * torch.eye(8)
    agreeing = distillation_loss([view, view], [view, view])
    assert agreeing < 0.01
    assert distillation_loss([view, view.roll(1, 0)], [view, view.roll(1, 0)]) > agreeing + 1


def test_the_command_line_names_what_is_wrong(npm, tmp_path, capsys):
    arguments = ["train", "mini-openclip", "--out", str(tmp_path)]
    assert main([*arguments, "--npm", str(tmp_path / "none")]) == 2
    assert "make artwork" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "maxi-openclip"])
    assert "mini-blip" in capsys.readouterr().err


def test_the_tokenizer_is_the_same_every_time_and_spells_what_it_does_not_know(npm):
    first, again = (build_tokenizer(load_concepts(npm)) for _ in range(2))
    assert first.get_vocab() == again.get_vocab()
    words = first.convert_ids_to_tokens(first("Red pizzzza").input_ids)
    assert words[:2] == ["[CLS]", "red"]
    assert words[2:5] == ["p", "##i", "##z"]
    assert words[-1] == "[EOS]"
    assert "[UNK]" not in words


@pytest.mark.parametrize("name", ["mini-openclip", "mini-clip", "mini-blip"])
@pytest.mark.parametrize("task", ["emoji-flags", "emoji-food"])  # chance is below 0.01
def test_text_aligned_encoders_name_their_emoji(name, task):
    encoder, data = load_encoder(name), load_dataset(task, "test", count=250)
    accuracy, error = zero_shot_accuracy(encode_images(encoder, data), class_encodings(encoder, data), data.labels)
    assert accuracy > 0.85
    assert error < 0.03


@pytest.mark.parametrize("name", ["mini-dinov2", "mini-vit"])
def test_encoders_without_words_know_emoji_better_than_random_weights(name):
    train, test = load_dataset("emoji-flags", "train", count=500), load_dataset("emoji-flags", "test", count=200)
    share = {}
    for own in (name, f"{name}@random"):
        encoder = load_encoder(own)
        pairs = [(encode_images(encoder, data), data.labels) for data in (train, test)]
        share[own] = knn_accuracy(*pairs)[0]
    assert share[name] > share[f"{name}@random"] + 0.1
    with pytest.raises(ValueError, match="no text tower"):
        encoder.encode_text(["flag"])


def test_the_embedded_weights_are_small_in_half_precision_and_described():
    files = [path for name in RECIPES for path in (WEIGHTS / name).iterdir()]
    assert set(ENCODERS) == set(RECIPES)
    assert max(path.stat().st_size for path in files) < 13e6
    assert sum(path.stat().st_size for path in files) < 60 * 2**20
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 5
    assert {value.dtype for path in weights for value in load_file(path).values()} == {torch.float16}
    for name, recipe in RECIPES.items():
        card = (WEIGHTS / name / "README.md").read_text()
        assert all(word in card for word in ("Limits", f"{recipe.steps:,} steps", f"seed {recipe.seed}", name))
        assert (WEIGHTS / name / "training.csv").read_text().splitlines()[-1].startswith(f"{recipe.steps},")
