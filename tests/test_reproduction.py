"""Cells are joined by the paper's names and judged by their tolerance; a shuffled label order is noticed."""

from __future__ import annotations

import pandas as pd
import pytest
from IPython.display import HTML

from edition.reproduction import TOLERANCES, beside, check_base, compare, published_name, ranks, tally
from edition.results import published
from residual.data.catalogue import catalogue


def test_every_published_data_set_is_in_the_catalogue():
    names = {*published("unit_selection")["dataset"], *published("dataset_order")["dataset"]} - {"Average"}
    assert names == {*(published_name(name) for name in catalogue()), published_name("random")} - {"ImageNet"}


def test_cells_are_joined_and_judged_within_tolerance():
    ours = pd.DataFrame({
        "model": "CLIP-L", "dataset": ["cifar10", "mnist@abc", "digits"], "strategy": "B",
        "accuracy": [0.95, 0.1, 0.9], "accuracy_se": 0.002,
    })  # fmt: skip
    theirs = published("unit_selection")
    cells = compare(ours, theirs, ["model", "dataset", "strategy"], ["accuracy"])
    found = cells.set_index("dataset")
    assert set(found.index) == {"CIFAR10", "MNIST"}
    base = theirs[(theirs["model"] == "CLIP-L") & (theirs["dataset"] == "CIFAR10") & (theirs["strategy"] == "B")]
    assert found["difference"]["CIFAR10"] == pytest.approx(0.95 - base["accuracy"].iloc[0])
    assert found["tolerance"].unique() == pytest.approx([0.024])
    assert found["verdict"].to_dict() == {"CIFAR10": "reproduced", "MNIST": "not reproduced"}
    assert tally(cells) == "1 of 2 cells are within tolerance."
    shown = beside(cells, ["dataset"], ["model", "strategy"]).to_html()
    assert "0.95 (" in shown
    assert shown.count(") x") == 1
    vague = compare(ours.assign(accuracy_se=0.03), theirs, ["model", "dataset", "strategy"], ["accuracy"])
    assert vague.set_index("dataset")["verdict"].to_dict() == {"CIFAR10": "too few images", "MNIST": "not reproduced"}


@pytest.mark.parametrize(
    ("name", "keys", "quantities"),
    [
        ("intrinsic_dimension", ["model", "layer"], ["linear_id", "twonn_id", "ratio", "evr1"]),
        ("textspan_agreement", ["figure", "model", "layer", "head"], ["z"]),
        ("encoder_correlation", ["model_a", "model_b"], ["pearson"]),
        ("alignment", ["table", "model", "method"], ["accuracy"]),
    ],
)
def test_the_papers_own_tables_reproduce_themselves_and_nothing_else_does(name, keys, quantities):
    theirs = published(name).drop(columns=["dataset"], errors="ignore").drop_duplicates(keys)
    cells = compare(theirs, theirs, keys, quantities, reference="imagenet")
    assert len(cells) == len(theirs) * len(quantities)
    assert set(cells["verdict"]) == {"reproduced"}
    far = theirs.assign(
        **{q: theirs[q] + 1.1 * (TOLERANCES[q][0] + TOLERANCES[q][1] * theirs[q].abs()) for q in quantities}
    )
    assert set(compare(far, theirs, keys, quantities)["verdict"]) == {"not reproduced"}
    elsewhere = compare(theirs, theirs, keys, quantities, reference="cifar100")
    assert elsewhere.empty
    assert isinstance(beside(elsewhere, keys[:1], keys[1:]), HTML)


def test_places_are_told_where_all_the_papers_data_sets_are_there():
    names = [*(name for name in catalogue() if name != "imagenet"), "random", "digits"]
    means = pd.DataFrame({"CLIP-L": range(len(names), 0, -1)}, index=names)
    found = ranks(means).set_index("dataset")["rank"]
    assert found.to_dict() == {name: i + 1 for i, name in enumerate(names[:-1])}
    assert ranks(means.drop("mnist")).empty


def test_the_spread_of_heads_is_no_error_and_few_images_are_not_judged():
    theirs = published("intrinsic_dimension").query("model == 'OpenCLIP-L'")
    keys, quantities = ["model", "layer"], ["linear_id", "twonn_id"]
    ours = theirs[[*keys, *quantities]].assign(twonn_id_se=0.05)
    assert set(compare(ours, theirs, keys, quantities, reference="imagenet")["verdict"]) == {"reproduced"}
    few = compare(ours, theirs, keys, quantities, reference="imagenet", images=500)
    assert set(few["verdict"]) == {"too few images"}
    off = ours.assign(linear_id=ours["linear_id"] + 3, twonn_id=ours["twonn_id"] + 3)
    assert set(compare(off, theirs, keys, quantities, reference="imagenet")["verdict"]) == {"not reproduced"}


def test_a_base_far_from_the_published_one_stops_the_run():
    theirs = published("unit_selection")
    with pytest.raises(ValueError, match=r"CLIP-L on cifar10: .* 0\.102, published .*different orders.*base_tolerance"):
        check_base("CLIP-L", "cifar10", 0.102, theirs)
    check_base("CLIP-L", "cifar10", 0.102, theirs, tolerance=1.0)
    check_base("CLIP-L", "cifar10", 0.94, theirs)
    check_base("mini-clip", "cifar10", 0.1, theirs)
    check_base("CLIP-L", "digits", 0.1, theirs)
