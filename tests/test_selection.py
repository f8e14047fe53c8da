"""Accuracies from encodings, and of heads alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import page_functions
from edition.chapter import Chapter
from edition.pages import chapter_defaults, chapter_path
from residual import extract, trace
from residual.data.dataset import Dataset
from residual.selection import (
    METHODS,
    ablate,
    class_encodings,
    knn_accuracy,
    score_units,
    select_top,
    zero_shot_accuracy,
)


def clusters(count, generator):
    labels = torch.arange(count) % 3
    return torch.eye(8)[labels] * 5 + 0.3 * torch.randn(count, 8, generator=generator), labels


def test_neighbours_name_clusters_whatever_their_length():
    generator = torch.Generator().manual_seed(0)
    train, test = clusters(60, generator), clusters(30, generator)
    assert knn_accuracy(train, test) == (1.0, 0.0)
    longer = test[0] * torch.arange(1, 31)[:, None]
    assert knn_accuracy(train, (longer, test[1]))[0] == 1.0
    share, error = knn_accuracy(train, (test[0], (test[1] + (torch.arange(30) < 10)) % 3))
    assert share == pytest.approx(20 / 30)
    assert error == pytest.approx((2 / 9 / 30) ** 0.5)


def test_too_few_neighbours_are_refused():
    few = clusters(6, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="6 training images, fewer than neighbours=10"):
        knn_accuracy(few, few)


def test_zero_shot_counts_the_nearest_by_cosine():
    outputs, labels = clusters(30, torch.Generator().manual_seed(0))
    share, error = zero_shot_accuracy(outputs, torch.eye(8)[:3], (labels + (torch.arange(30) < 15)) % 3)
    assert share == 0.5
    assert error == pytest.approx((0.25 / 30) ** 0.5)


def task(encoder, tmp_path, classes=3):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (40, 3, 32, 32), generator=generator, dtype=torch.uint8)
    names = tuple(f"thing {i}" for i in range(classes))
    data = Dataset("noise", "validation", images, torch.arange(40) % classes, names, ("a {}", "{}"))
    return data, extract(encoder, data, root=tmp_path, coordinates="float32", batch=16, progress=False)


@pytest.mark.parametrize("family", ["openclip", "blip", "dinov2"])
def test_scores_are_what_they_say_of_heads_in_output_space(small, family, tmp_path):
    encoder = small(family)
    data, stored = task(encoder, tmp_path)
    units = trace(encoder, data.images)
    classes = F.normalize(torch.randn(3, encoder.output_dim, generator=torch.Generator().manual_seed(0)), dim=1)
    scores = {m: score_units(stored, m, classes) for m in METHODS}
    span = torch.linalg.pinv(classes.double()) @ classes.double()
    for layer, head in ((0, 0), (1, 3), (2, 2)):
        own, output = units[f"L{layer}.H{head}"].double().numpy(), units.output.double().numpy()
        per_image = [np.corrcoef(a, b)[0, 1] for a, b in zip(own, output, strict=True)]
        assert scores["U"][layer, head] == pytest.approx(np.mean(per_image), abs=1e-5)
        pairs = zip(own @ span.numpy(), output @ span.numpy(), strict=True)
        assert scores["U|T"][layer, head] == pytest.approx(
            np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs]), abs=1e-5
        )
        assert scores["S"][layer, head] == zero_shot_accuracy(torch.tensor(own).float(), classes, data.labels)[0]
    other = score_units(stored, "S", classes, labels=(data.labels + 1) % 3)
    assert not other.equal(scores["S"])
    assert scores["R"].equal(score_units(stored, "R", seed=0))
    assert not scores["R"].equal(score_units(stored, "R", seed=1))


def test_the_highest_are_selected_and_the_first_among_equals():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.5, 0.5]])
    assert select_top(scores, 1).nonzero().tolist() == [[0, 1]]
    assert select_top(scores, 3).nonzero().tolist() == [[0, 1], [0, 2], [1, 0]]
    assert select_top(scores, 6).all()
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"k must be from 1 to 6, the number of heads, not {k}"):
            select_top(scores, k)
    with pytest.raises(ValueError, match="NaN"):
        select_top(scores * float("nan"), 1)


def test_ablation_keeps_what_it_says(encoder, tmp_path):
    data, stored = task(encoder, tmp_path)
    units = trace(encoder, data.images)
    every = torch.ones(encoder.layers, encoder.heads, dtype=torch.bool)
    heads = [label for label in units.labels if ".H" in label]
    assert ablate(stored, every).allclose(sum(units[label] for label in heads), atol=1e-4)
    kept = torch.zeros_like(every)
    kept[1, 2] = kept[2, 0] = True
    chosen = units["L1.H2"] + units["L2.H0"]
    assert ablate(stored, kept).allclose(chosen, atol=1e-5)
    rest = sum(units[label].mean(0) for label in units.labels if label not in ("L1.H2", "L2.H0"))
    assert ablate(stored, kept, means=stored).allclose(chosen + rest, atol=1e-4)
    with pytest.raises(ValueError, match=r"selected must have shape \[3, 4\]"):
        ablate(stored, kept[:2])


def test_class_encodings_are_normalised_means_of_normalised_texts(encoder, tmp_path):
    data, _ = task(encoder, tmp_path)
    data = replace(data, classes=("dog", "cat", "cow"), templates=("a {}", "a photo of some {} in the rain"))
    with torch.no_grad():
        texts = F.normalize(encoder.encode_text(data.prompts()), dim=1)
    means = torch.stack([(texts[2 * c] + texts[2 * c + 1]) / 2 for c in range(3)])
    assert means.norm(dim=1).max() < 0.9999  # so that it matters
    torch.testing.assert_close(class_encodings(encoder, data), means / means.norm(dim=1, keepdim=True))


def test_names_that_repeat_are_equal_directions_with_a_warning(encoder, tmp_path, caplog):
    data, _ = task(encoder, tmp_path)
    classes = class_encodings(encoder, replace(data, classes=("a", "b", "a")))
    assert classes[0].equal(classes[2])
    third = (data.labels == 2).float().mean().item()
    assert "class names ['a'] repeat" in caplog.text
    assert f"at most {100 * (1 - third):.1f} % of the images can be right" in caplog.text


def test_tasks_that_cannot_be_scored_are_refused(encoder, small, tmp_path):
    data, stored = task(encoder, tmp_path)
    with pytest.raises(ValueError, match="method must be one of"):
        score_units(stored, "UT")
    with pytest.raises(ValueError, match="needs class encodings"):
        score_units(stored, "S")
    with pytest.raises(ValueError, match="one class, 'a'; classification needs at least two"):
        class_encodings(encoder, replace(data, classes=("a",), labels=data.labels * 0))
    for family in ("dinov2", "vit"):
        with pytest.raises(ValueError, match="has no text tower or no tokenizer; use a text-aligned encoder"):
            class_encodings(small(family), data)


def test_groups_of_units_add_up_to_the_encoder():
    values = chapter_defaults(chapter_path("selection")) | {"encoders": ["mini-openclip"], "tasks": ["digits"]}
    run = Chapter("selection", values | {"images": 100, "reference_images": 130, "dataset": "digits"})
    ((encoder, task),) = run.pairs()
    units, classes = run.units(encoder, "digits", "test"), {(encoder.name, task): run.classes(encoder, task)}
    page = page_functions("selection", "of_layer", "groups_of", "hits", run=run, classes=classes)
    rows = {
        (group, layer): page["hits"](encoder, task, outputs.float())
        for group, layer, outputs in page["groups_of"](units)
    }
    assert rows["up to a layer", encoder.layers - 1].equal(page["hits"](encoder, task, units.outputs()))
    heads = page["hits"](encoder, task, ablate(units, torch.ones(units.head_grid, dtype=torch.bool)))
    assert rows["heads", -1].equal(heads)
    assert len(rows) == 2 * encoder.layers + 3
