"""Accuracies from encodings."""

from __future__ import annotations

import pytest
import torch

from residual.selection import knn_accuracy, zero_shot_accuracy


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
