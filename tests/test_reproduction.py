"""Cells are joined by the paper's names, and a shuffled label order is noticed."""

from __future__ import annotations

import pandas as pd
import pytest

from residual.chapters import published
from residual.hub import catalogue
from residual.reproduction import check_base, compare


def test_every_published_data_set_is_in_the_catalogue():
    names = set(published("unit_selection")["dataset"]) - {"Average"}
    assert names <= {entry.published for entry in catalogue().values()}


def test_cells_are_joined_and_judged_within_tolerance():
    ours = pd.DataFrame({
        "model": "CLIP-L", "dataset": ["cifar10", "mnist@abc", "digits"], "strategy": "B",
        "accuracy": [0.95, 0.1, 0.9], "accuracy_se": 0.002,
    })  # fmt: skip
    theirs = published("unit_selection")
    found = compare(ours, theirs, "strategy").set_index("dataset")
    assert set(found.index) == {"CIFAR10", "MNIST"}
    base = theirs[(theirs["model"] == "CLIP-L") & (theirs["dataset"] == "CIFAR10") & (theirs["strategy"] == "B")]
    assert found["difference"]["CIFAR10"] == pytest.approx(0.95 - base["accuracy"].iloc[0])
    assert found["verdict"].to_dict() == {"CIFAR10": "reproduced", "MNIST": "not reproduced"}


def test_a_base_far_from_the_published_one_stops_the_run():
    theirs = published("unit_selection")
    with pytest.raises(ValueError, match=r"CLIP-L on cifar10: .* 0\.102, published .*different orders.*base_tolerance"):
        check_base("CLIP-L", "cifar10", 0.102, theirs)
    check_base("CLIP-L", "cifar10", 0.102, theirs, tolerance=1.0)
    check_base("CLIP-L", "cifar10", 0.94, theirs)
    check_base("mini-clip", "cifar10", 0.1, theirs)
    check_base("CLIP-L", "digits", 0.1, theirs)
