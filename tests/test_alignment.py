"""The linear aligner finds what a linear map can find, the same way every time."""

from __future__ import annotations

import torch

from residual.alignment import LinearAligner, fit
from residual.selection import zero_shot_accuracy


def hidden_classes(seed):
    """Classes that are there in the encodings, but turned away from their texts."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(7))).Q
    labels = torch.arange(600) % 4
    outputs = (5 * torch.eye(16)[labels] + torch.randn(600, 16, generator=generator)) @ turn
    return outputs, labels


def test_it_starts_as_the_identity_and_has_the_published_number_of_parameters():
    outputs, _ = hidden_classes(0)
    aligner = LinearAligner(16)
    assert aligner(outputs).equal(outputs)
    for dimension, count in ((256, 65_792), (512, 262_656), (768, 590_592)):
        assert sum(p.numel() for p in LinearAligner(dimension).parameters()) == count


def test_fitting_turns_encodings_towards_their_classes_and_is_deterministic():
    train, validation, test = (hidden_classes(seed) for seed in (0, 1, 2))
    classes = torch.eye(16)[:4]
    assert zero_shot_accuracy(test[0], classes, test[1])[0] < 0.5
    weights = []
    for _ in range(2):
        aligner = LinearAligner(16)
        best = fit(aligner, train, validation, classes, scale=20.0)
        weights.append(aligner.weight.detach().clone())
    assert weights[0].equal(weights[1])
    with torch.no_grad():
        assert zero_shot_accuracy(aligner(test[0]), classes, test[1])[0] > 0.95
        assert zero_shot_accuracy(aligner(validation[0]), classes, validation[1])[0] == best  # the best is restored
