"""Checks say what the numbers say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from edition.claims import (
    bootstrap,
    bootstrap_rows,
    check,
    claim_table,
    claims,
    found,
    hunchback,
    published_statistics,
    trend,
    verdict_grid,
)
from edition.results import published

SPREAD = np.array([-1, 0, 0, 1.0])[None]  # four heads around each layer's mean, standard error 0.41


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([10, 14, 18, 20, 18, 15, 12], "supported"),
        ([10, 11, 12, 13, 14, 15, 16], "not supported"),
        ([16, 15, 14, 13, 12, 11, 10], "not supported"),
        ([10, 10.5, 11, 11, 10.8, 10.5, 10], "inconclusive"),
        ([10] * 7, "not supported"),
    ],
)
def test_a_hunch_has_two_sides(values, verdict):
    assert claims()["hunched"].verdict(hunchback(np.array(values)[:, None] + SPREAD)) == verdict


@pytest.mark.parametrize(
    ("values", "rises", "falls"),
    [
        ([1, 2, 3, 4, 5, 7, 6], "supported", "not supported"),
        ([7, 6, 5, 4, 3, 2, 1], "not supported", "supported"),
        ([3, 3, 3, 3, 3, 3, 3], "not supported", "not supported"),
        ([1, 5, 2, 3, 6, 2, 5], "inconclusive", "not supported"),
    ],
)
def test_a_trend_has_a_direction(values, rises, falls):
    assert claims()["linear-rises"].verdict(trend(np.array(values))) == rises
    assert claims()["evr1-falls"].verdict(trend(np.array(values))) == falls


def test_a_verdict_changes_at_its_bounds():
    up, down = claims()["order-agrees"], claims()["low-dimensional"]
    assert [up.verdict(v) for v in (0.9, 0.89, 0.7, 0.69)] == [
        "supported",
        "inconclusive",
        "inconclusive",
        "not supported",
    ]
    assert [down.verdict(v) for v in (0.6, 0.61, 0.8, 0.81)] == [
        "supported",
        "inconclusive",
        "inconclusive",
        "not supported",
    ]
    assert up.verdict(float("nan")) == "inconclusive"
    same = claims()["textspan-is-somp"]
    assert [same.verdict(v) for v in (1.0, 0.99)] == ["supported", "not supported"]
    assert [up.verdict(0.95, ends) for ends in ((0.9, 1.0), (0.89, 1.0))] == ["supported", "inconclusive"]
    assert [up.verdict(0.6, ends) for ends in ((0.5, 0.69), (0.5, 0.71))] == ["not supported", "inconclusive"]
    assert [down.verdict(0.5, ends) for ends in ((0.1, 0.6), (0.1, 0.7))] == ["supported", "inconclusive"]
    row = check("order-agrees", "mini", 0.95, (0.9, 1.0)).iloc[0].drop("share")
    assert row.tolist() == ["order-agrees", "mini", 0.95, 0.9, 1.0, "supported"]


def test_an_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(60):
        value, (low, high) = bootstrap(np.mean, generator.normal(size=(6, 8)), seed=seed)
        assert low <= value <= high
        hits += low <= 0 <= high
    assert 48 <= hits <= 60  # 95 % of 60 is 57; percentile intervals of small samples are short


def test_an_interval_keeps_heads_in_their_layer():
    heads = np.arange(5.0)[:, None].repeat(3, 1)
    assert bootstrap(trend, heads) == (pytest.approx(1), (pytest.approx(1), pytest.approx(1)))


def test_claims_refuse_what_they_cannot_judge():
    for values in ([1.0, 2.0], [1.0, np.nan, 2.0]):
        with pytest.raises(ValueError, match="at least 3 layers"):
            trend(np.array(values))


def test_tables_show_every_row_in_words():
    rows = pd.concat(
        [check("hunched", "a", 3.0, (2.0, 4.0)), check("hunched", "b", 0.0), check("order-agrees", "b", 0.8)]
    )
    html = claim_table(rows).to_html()
    assert html.count(claims()["hunched"].claim) == 2
    assert "2.00 to 4.00" in html
    html = verdict_grid(rows).to_html()
    assert all(cell in html for cell in ("yes 3.00", "no 0.00", "? 0.80"))


def test_what_was_found_counts_trained_encoders():
    rows = pd.concat([check("hunched", m, v) for m, v in (("a", 3.0), ("b", 0.0), ("a@random", 9.0))])
    line = f"- {claims()['hunched'].claim} ({claims()['hunched'].measured}: 0.00 to 3.00; with random weights: 9.00): "
    assert found(rows) == line + "**supported by 1 of 2**."
    undecided = pd.concat([rows, check("hunched", "c", 1.5)])
    assert found(undecided) == line + "**supported by 1 of 3**, undecided for 1."


def test_a_claim_of_two_halves_needs_both():
    close = check("rd-star-close", "a", -0.01, (-0.015, 0.0), share=0.3)
    large = check("rd-star-close", "b", -0.01, (-0.015, 0.0), share=0.5)
    assert [*close["verdict"], *large["verdict"]] == ["supported", "not supported"]
    assert "-0.01, with 0.30 of the parameters" in claim_table(close).to_html()
    assert "-0.01, with 0.30 to 0.50 of the parameters): **supported by 1 of 2**" in found(pd.concat([close, large]))


def test_statistics_of_published_tables():
    values = published_statistics(published)
    table = published("unit_selection").query("model == 'BLIP-L' and dataset != 'Average'")
    means = table.groupby("strategy")["accuracy"].mean()
    assert values["heads-carry"][1] >= means["H"] / means["B"] >= values["heads-carry"][0]


def test_an_interval_over_tasks_holds_the_statistic_and_shrinks_with_their_number():
    generator = np.random.default_rng(0)
    widths = []
    for count in (5, 500):
        tasks = pd.DataFrame({"a": generator.normal(0.6, 0.1, count), "b": 0.5})
        value, (low, high) = bootstrap_rows(lambda t: (t["a"] - t["b"]).mean(), tasks)
        assert low < value < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    assert np.isnan(bootstrap_rows(lambda t: t["a"].mean(), tasks.head(2))[1]).all()
