"""Trainings come out the same every time, end in time, go on where they were stopped, and refuse bad input."""

from __future__ import annotations

import pytest
import torch

from conftest import pixels_of
from residual import trace, training
from residual.alignment import FineTuned, LinearAligner, Schedule, find_rate, fit, transformed
from residual.selection import zero_shot_accuracy


def hidden_classes(seed):
    """Classes that are there in the encodings, but turned away from their texts."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(7))).Q
    labels = torch.arange(600) % 4
    outputs = (5 * torch.eye(16)[labels] + torch.randn(600, 16, generator=generator)) @ turn
    return outputs, labels


CLASSES = torch.eye(16)[:4]


def test_fitting_turns_encodings_towards_their_classes_and_is_deterministic():
    train, validation, test = (hidden_classes(seed) for seed in (0, 1, 2))
    assert zero_shot_accuracy(test[0], CLASSES, test[1])[0] < 0.5
    weights = []
    for _ in range(2):
        aligner = LinearAligner(16)
        result = fit(aligner, train, validation, CLASSES, scale=20.0)
        weights.append(aligner.weight.detach().clone())
    assert weights[0].equal(weights[1])
    assert 6 <= len(result.accuracies) <= 30
    with torch.no_grad():
        assert zero_shot_accuracy(aligner(test[0]), CLASSES, test[1])[0] > 0.95
        best = zero_shot_accuracy(aligner(validation[0]), CLASSES, validation[1])[0]
    assert best == result.accuracy  # the best is restored


def test_training_ends_when_nothing_gets_better():
    train, validation = hidden_classes(0), hidden_classes(1)
    result = fit(LinearAligner(16), train, validation, CLASSES, rate=1e-9)
    assert len(result.accuracies) == 1 + training.PATIENCE
    assert result.rate == 1e-9


def test_the_rate_found_trains_and_leaves_the_aligner_as_it_was():
    train = hidden_classes(0)
    aligner = LinearAligner(16)
    rate = find_rate(aligner, train, CLASSES, scale=20.0)
    assert aligner.weight.equal(torch.eye(16))
    assert 1e-4 < rate < 1
    with pytest.raises(ValueError, match="not finite"):
        find_rate(aligner, (train[0] * float("nan"), train[1]), CLASSES)


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([2.0, 1.9, 1.5, 1.4, 1.38, 5.0, 5.2, 2.0, 1.37, 1.36, 1.35, 9.0], 2),  # 5.2 to 1.37 is a recovery
        ([2.0, 1.5, 1.0, 0.9, 0.4, 0.15, 0.14, 9.0], 4),  # the largest share, not the largest difference
        ([1.0, 0.5, 0.4, 0.39, 1e-3, 1e-5, 1e-8, 0.0, 9.0], 3),  # below a thousandth nothing counts
    ],
)
def test_the_rate_is_where_the_lowest_loss_falls_by_the_largest_share(monkeypatch, losses, best):
    rates = torch.logspace(-6, 0, len(losses)).double().numpy()
    monkeypatch.setattr(training, "_range_test", lambda *_: (rates, losses))
    assert find_rate(LinearAligner(16), hidden_classes(0), CLASSES) == rates[best]


def test_where_no_rate_lowers_the_loss_the_smallest_is_taken_and_told(monkeypatch, caplog):
    monkeypatch.setattr(training, "_range_test", lambda *_: (torch.logspace(-6, 0, 4).numpy(), [1.0, 1.5, 2.0, 9.0]))
    assert find_rate(LinearAligner(16), hidden_classes(0), CLASSES) == pytest.approx(1e-6)
    assert "no learning rate lowers the loss" in caplog.text
    monkeypatch.setattr(training, "_range_test", lambda *_: (torch.logspace(-6, 0, 4).numpy(), [1e-4, 1e-5, 1e-6, 9.0]))
    caplog.clear()
    assert find_rate(LinearAligner(16), hidden_classes(0), CLASSES) == pytest.approx(1e-6)
    assert not caplog.text


def test_a_training_that_ended_is_not_repeated(tmp_path, monkeypatch):
    train, validation = hidden_classes(0), hidden_classes(1)
    first = LinearAligner(16)
    expected = fit(first, train, validation, CLASSES, cache=tmp_path)
    monkeypatch.setattr(training, "find_rate", None)
    monkeypatch.setattr(training, "AdamWScheduleFree", None)
    again = LinearAligner(16)
    assert fit(again, train, validation, CLASSES, cache=tmp_path) == expected
    assert again.weight.equal(first.weight)


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: data[:-500] + b"\1" + data[-499:]])
def test_a_damaged_file_is_told_and_trained_anew(tmp_path, caplog, damage):
    train = hidden_classes(0)
    fit(LinearAligner(16), train, train, CLASSES, rate=1e-2, cache=tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    assert fit(LinearAligner(16), train, train, CLASSES, rate=1e-2, cache=tmp_path).accuracy > 0.9
    assert "training again" in caplog.text


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (torch.zeros(600, dtype=torch.long), CLASSES[:1], "1 class; classification needs at least two"),
        (torch.arange(600) % 3, CLASSES, r"no training image of classes \[3\]"),
        (torch.arange(600) % 5, CLASSES, "labels run from 0 to 4, but 4 classes need 0 to 3"),
        (torch.arange(600) % 4 - 1, CLASSES, "labels run from -1"),
        (torch.arange(599) % 4, CLASSES, "600 training images and 599 labels"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(labels, classes, message):
    inputs, truth = hidden_classes(0)
    with pytest.raises(ValueError, match=message):
        fit(LinearAligner(16), (inputs, labels), (inputs, truth), classes)


def test_a_change_of_any_row_is_another_training(tmp_path):
    train, validation = ((outputs.repeat(5, 1), labels.repeat(5)) for outputs, labels in map(hidden_classes, (0, 1)))
    fit(LinearAligner(16), train, validation, CLASSES, rate=1e-3, cache=tmp_path)
    for row in (1, 1501, 2999):
        other = train[0].clone()
        other[row, 3] += 1e-3
        fit(LinearAligner(16), (other, train[1]), validation, CLASSES, rate=1e-3, cache=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_a_training_of_other_inputs_or_another_schedule_is_not_taken(tmp_path, monkeypatch):
    train, validation = hidden_classes(0), hidden_classes(1)

    def run(*splits):
        fit(LinearAligner(16), *splits, CLASSES, rate=1e-3, cache=tmp_path)

    run(train, validation)
    run(train, (validation[0] + 1, validation[1]))
    late = train[0].clone()
    late[400] += 1
    run((late, train[1]), validation)
    monkeypatch.setattr(training, "PATIENCE", 2)
    run(train, validation)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_of_several_rates_the_validation_split_chooses():
    train, validation = hidden_classes(0), hidden_classes(1)
    cosine, fits, weights = Schedule(cosine=True), {}, {}
    for rate in (1e-6, 1e-3):
        aligner = LinearAligner(16)
        fits[rate] = fit(aligner, train, validation, CLASSES, rate=rate, schedule=cosine)
        weights[rate] = aligner.weight
        assert len(fits[rate].accuracies) == training.EPOCHS
    aligner = LinearAligner(16)
    chosen = fit(aligner, train, validation, CLASSES, rate=(1e-6, 1e-3), schedule=cosine)
    assert fits[1e-3].accuracy > fits[1e-6].accuracy
    assert chosen == fits[1e-3]
    assert aligner.weight.equal(weights[1e-3])


@pytest.mark.parametrize("family", ["openclip", "blip", "clip"])
def test_fine_tuning_trains_the_vision_tower_alone(small, dataset, family):
    encoder = small(family)
    tuned = FineTuned(encoder)
    before = {name: p.clone() for name, p in tuned.named_parameters()}
    assert tuned(dataset.images[:4]).allclose(encoder.encode_image(dataset.images[:4]), atol=1e-5)
    images, classes = (dataset.images, dataset.labels), torch.eye(encoder.output_dim)[:3]
    fit(tuned, images, images, classes, rate=1e-3)
    assert transformed(tuned, dataset.images, workers=1).equal(transformed(tuned, dataset.images))
    moved = {name for name, p in tuned.named_parameters() if not p.equal(before[name])}
    assert moved
    assert all("visual" in name or "vision" in name for name in moved)
    assert {name for name, p in tuned.named_parameters() if p.requires_grad} >= moved
    pixels = pixels_of(encoder)
    assert not tuned.encoder.encode_image(pixels).allclose(encoder.encode_image(pixels))
    assert trace(tuned.encoder, pixels).total().allclose(tuned.encoder.encode_image(pixels), atol=1e-4)


@pytest.mark.parametrize("where", ["training", "validation", "class"])
def test_nan_is_refused_before_training(where):
    train, validation, classes = hidden_classes(0), hidden_classes(1), CLASSES.clone()
    {"training": train[0], "validation": validation[0], "class": classes}[where][3, 2] = float("nan")
    aligner = LinearAligner(16)
    with pytest.raises(ValueError, match=f"{where} .*NaN"):
        fit(aligner, train, validation, classes)
    assert aligner.weight.equal(torch.eye(16))
