"""Captions are true of their positives, training resumes, and the embedded encoder knows its emoji."""

from __future__ import annotations

import dataclasses
import functools
import json
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file

from conftest import interrupt_at
from residual import load_dataset, load_encoder
from residual.data.miniature.emoji import load_artwork, vocabulary
from residual.data.miniature.scenes import BACKDROPS, COLOURS, draw_scenes
from residual.encoders.names import EMBEDDED, MINI
from residual.selection import class_encodings, encode_images, knn_accuracy, zero_shot_accuracy
from zoo.__main__ import main
from zoo.captions import STYLE_WORDS, load_concepts, write_captions
from zoo.objectives import assignments, contrastive_loss, distillation_loss
from zoo.recipes import RECIPES
from zoo.train import _dropped, _Run, build_tokenizer, train


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
    scene = draw_scenes(artwork.sprites[drawn], generator=generator)
    captions = write_captions(concepts, artwork, drawn, scene, generator)
    assert captions.positives.diagonal().all()
    names = [vocabulary()[i].name for i in drawn.tolist()]
    exact = 0
    for column, text in enumerate(captions.texts):
        if text in names:  # a bare name: true of every scene of that emoji, of no other
            exact += 1
            assert captions.positives[:, column].tolist() == [name == text for name in names]
        if " on a striped background" in text:
            assert not captions.positives[scene.backdrop != BACKDROPS.index("striped"), column].any()
        for index, colour in enumerate(COLOURS):
            if text == f"something on a {colour} background":
                expected = (scene.backdrop == 0) & (scene.colour == index)
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


def small(name, **changes):
    """The recipe of an encoder, on Twemoji alone, for four steps of eight images."""
    options = {"styles": MappingProxyType({"twemoji": 1.0}), "steps": 4, "batch": 8}
    return dataclasses.replace(RECIPES[name], **options | changes)


@pytest.fixture
def artwork(monkeypatch):
    """Decoded once for all runs."""
    monkeypatch.setattr("zoo.train.load_artwork", functools.cache(load_artwork))


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
    assert (encoder.layers, encoder.heads, encoder.dtype) == (8, 8, torch.float32)
    if encoder.reads_text:
        assert encoder.encode_text(["a red circle"]).shape == (1, 128)


def test_dropped_patches_leave_the_class_token_and_the_order_of_images(npm):
    tokens = torch.arange(4 * 37 * 2).reshape(4, 37, 2).float()
    identity = torch.nn.Identity()
    with _dropped(identity, 0.5):
        kept = identity(tokens)
    assert kept.shape == (4, 19, 2)
    assert kept[:, 0].equal(tokens[:, 0])
    for before, after in zip(tokens, kept, strict=True):
        assert {tuple(row) for row in after.tolist()} <= {tuple(row) for row in before.tolist()}
        assert len(after.unique(dim=0)) == 19
    assert identity(tokens).equal(tokens)
    with _dropped(identity, 1.0):
        assert identity(tokens).equal(tokens)


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
    encoder, data = load_encoder(name), load_dataset(task, "test").head(500)
    accuracy, error = zero_shot_accuracy(encode_images(encoder, data), class_encodings(encoder, data), data.labels)
    assert accuracy > 0.6
    assert error < 0.03


@pytest.mark.parametrize("name", ["mini-dinov2", "mini-vit"])
def test_encoders_without_words_know_emoji_better_than_random_weights(name):
    train, test = (load_dataset("emoji-flags", split).head(1000) for split in ("train", "test"))
    share = {}
    for own in (name, f"{name}@random"):
        encoder = load_encoder(own)
        pairs = [(encode_images(encoder, data), data.labels) for data in (train, test)]
        share[own] = knn_accuracy(*pairs)[0]
    assert share[name] > share[f"{name}@random"] + 0.1
    with pytest.raises(ValueError, match="no text tower"):
        encoder.encode_text(["flag"])


def test_the_embedded_weights_are_small_in_half_precision_and_described():
    files = [path for name in RECIPES for path in (MINI / name).iterdir()]
    assert set(EMBEDDED) == set(RECIPES)
    assert max(path.stat().st_size for path in files) < 12e6
    assert sum(path.stat().st_size for path in files) < 40e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 5
    assert {value.dtype for path in weights for value in load_file(path).values()} == {torch.float16}
    for name, recipe in RECIPES.items():
        card = (MINI / name / "README.md").read_text()
        assert all(word in card for word in ("Limits", f"{recipe.steps:,} steps", f"seed {recipe.seed}", name))
        assert (MINI / name / "training.csv").read_text().splitlines()[-1].startswith(f"{recipe.steps},")
