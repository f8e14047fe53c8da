"""Captions are true of their positives, training resumes, and the embedded encoder knows its emoji."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import interrupt_at
from residual import load_dataset, load_encoder
from residual.artwork import STYLES, load_artwork, vocabulary
from residual.render import BACKDROPS, COLOURS, draw_scenes
from residual.selection import class_encodings, encode_images, zero_shot_accuracy
from residual.sources import ZOO
from residual.zoo.captions import STYLE_WORDS, load_concepts, write_captions
from residual.zoo.train import _write_log, build_tokenizer, contrastive_loss, train_clip


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


def test_training_stopped_and_resumed_ends_with_the_same_weights(npm, tmp_path, monkeypatch):
    options = {"styles": STYLES[:1], "steps": 4, "batch": 8, "every": 2}
    train_clip(tmp_path / "whole", npm, **options)
    monkeypatch.setattr("residual.zoo.train._write_log", interrupt_at(_write_log, 2))
    with pytest.raises(KeyboardInterrupt):
        train_clip(tmp_path / "part", npm, **options)
    monkeypatch.undo()
    train_clip(tmp_path / "part", npm, **options)
    whole, part = (load_file(tmp_path / run / "open_clip_model.safetensors") for run in ("whole", "part"))
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    with pytest.raises(ValueError, match="other settings"):
        train_clip(tmp_path / "part", npm, **options | {"seed": 1})
    assert load_encoder(str(tmp_path / "whole")).encode_text(["a red circle"]).shape == (1, 128)


def test_the_tokenizer_is_the_same_every_time_and_spells_what_it_does_not_know(npm):
    first, again = (build_tokenizer(load_concepts(npm), 3000, 24) for _ in range(2))
    assert first.get_vocab() == again.get_vocab()
    words = first.convert_ids_to_tokens(first("Red pizzzza").input_ids)
    assert words[0] == "red"
    assert words[1:4] == ["p", "##i", "##z"]
    assert words[-1] == "[EOS]"
    assert "[UNK]" not in words


@pytest.mark.parametrize(("task", "at_least"), [("emoji-flags", 0.45), ("emoji-food", 0.35)])  # chance is below 0.01
def test_the_embedded_encoder_names_its_emoji(task, at_least):
    encoder, data = load_encoder("mini-openclip"), load_dataset(task, "test").head(500)
    accuracy, error = zero_shot_accuracy(encode_images(encoder, data), class_encodings(encoder, data), data.labels)
    assert accuracy > at_least
    assert error < 0.03


def test_the_embedded_weights_are_small_and_in_half_precision():
    path = ZOO / "mini-openclip/open_clip_model.safetensors"
    assert path.stat().st_size < 12e6
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}
