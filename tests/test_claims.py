"""Outcomes say what the numbers say, beside a matched control."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from edition.claims import (
    ANY,
    BY_TASK,
    FAILS,
    HOLDS,
    UNDECIDED,
    UNTESTABLE,
    Estimate,
    by_heads,
    by_tasks,
    check,
    claim_table,
    claims,
    found,
    hit_letters,
    hunchback,
    judged,
    rank_correlation,
    standing_out,
    trend,
)


def near(value, error=0.01, count=1000):
    """An estimate whose interval is about two errors to each side."""
    return Estimate(value, value + error * np.random.default_rng(0).normal(size=count))


@pytest.mark.parametrize(
    ("values", "size"), [([10, 15, 20, 16, 12], 0.4), ([10, 12, 14, 16], 0.0), ([16, 14, 12, 10], 0.0), ([10] * 7, 0.0)]
)
def test_a_hunch_has_two_sides(values, size):
    heads = np.array(values)[:, None] + np.array([-1, 0, 0, 1.0])
    assert hunchback(heads) == hunchback(np.array(values)) == pytest.approx(size)


@pytest.mark.parametrize(
    ("values", "rises", "falls"),
    [
        ([1, 2, 3, 4, 5, 7, 6], HOLDS, FAILS),
        ([7, 6, 5, 4, 3, 2, 1], FAILS, HOLDS),
        ([3, 3, 3, 3, 3, 3, 3], FAILS, FAILS),
        ([1, 5, 2, 3, 6, 2, 5], FAILS, FAILS),
    ],
)
def test_a_trend_has_a_direction(values, rises, falls):
    assert check("linear-rises", "a", trend(np.array(values)))["outcome"] == rises
    assert check("evr1-falls", "a", trend(np.array(values)))["outcome"] == falls


@pytest.mark.parametrize(
    ("claim", "value", "error", "outcome"),
    [
        ("linear-rises", 0.71, 0.1, HOLDS),  # at the bound, and far from none
        ("linear-rises", 0.69, 0.1, UNDECIDED),
        ("linear-rises", 0.40, 0.1, FAILS),  # the whole interval is short of the bound
        ("linear-rises", 0.75, 0.5, UNDECIDED),  # could be none
        ("evr1-falls", -0.75, 0.1, HOLDS),
        ("evr1-falls", -0.40, 0.1, FAILS),
        ("rd-like-lin", -0.005, 0.01, HOLDS),  # as good, to within the margin
        ("rd-like-lin", -0.02, 0.01, UNDECIDED),
        ("rd-like-lin", -0.06, 0.01, FAILS),
        ("rd-near-tuned", 0.01, 0.01, HOLDS),
        ("rd-near-tuned", 0.09, 0.01, FAILS),
    ],
)
def test_an_outcome_changes_at_the_bound_and_at_none(claim, value, error, outcome):
    assert check(claim, "a", near(value, error))["outcome"] == outcome


@pytest.mark.parametrize(
    ("value", "control", "outcome"),
    [
        (near(0.9), near(0.2), HOLDS),
        (near(0.9), near(0.8), ANY),
        (near(0.9), near(0.95), ANY),
        (near(0.75), Estimate(0.69, 0.69 + np.random.default_rng(1).normal(0, 0.1, 1000)), UNDECIDED),
        (near(0.2), near(0.9), FAILS),
        (near(0.9), Estimate(np.nan), HOLDS),
    ],
)
def test_what_random_weights_do_too_is_no_evidence_of_training(value, control, outcome):
    row = check("linear-rises", "a", value, control)
    assert row["outcome"] == outcome
    assert row["control"] == control.value or np.isnan(control.value)


def test_draws_in_common_make_a_difference_precise():
    shared = np.random.default_rng(0).normal(0, 0.2, 1000)
    low, high = (Estimate(0.9, 0.9 + shared) - Estimate(0.6, 0.6 + shared)).interval()
    assert low == pytest.approx(0.3) == high


def test_each_encoder_is_judged_beside_its_own_control():
    estimates = {"linear-rises": {m: near(v) for m, v in (("a", 0.9), ("a@random", 0.9), ("b", 0.9), ("c", 0.1))}}
    reasons = {("linear-rises", "c"): "it has too few layers"}
    rows = judged(estimates, untestable=reasons).set_index("model")
    assert rows["outcome"].to_dict() == {"a": ANY, "b": HOLDS, "c": UNTESTABLE}
    assert rows.loc["c", "reason"] == "it has too few layers"
    assert np.isnan(rows.loc["b", "control"])


def test_an_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(60):
        estimate = by_heads(np.mean, generator.normal(size=(6, 8)), seed=seed)
        low, high = estimate.interval()
        assert low <= estimate.value <= high
        covered += low <= 0 <= high
    assert 48 <= covered <= 60  # 95 % of 60 is 57; percentile intervals of small samples are short


def test_an_interval_corrects_the_bias_of_a_trend_of_noisy_means():
    shifts, gains = [], []
    for seed in range(10):
        heads = np.arange(8)[:, None] + 3 * np.random.default_rng(seed).normal(size=(8, 6))
        estimate = by_heads(trend, heads)
        shifts.append(np.median(estimate.draws) - estimate.value)
        gains.append(estimate.interval()[0] - np.quantile(estimate.draws, 0.025))
    assert np.mean(shifts) < -0.01  # resampling adds noise, which hides the order
    assert np.mean(gains) > 0.01


def test_an_interval_keeps_heads_in_their_layer():
    heads = np.arange(5.0)[:, None].repeat(3, 1)
    assert by_heads(trend, heads).interval() == (pytest.approx(1), pytest.approx(1))


def test_claims_refuse_what_they_cannot_judge():
    for values in ([1.0, 2.0], [1.0, np.nan, 2.0]):
        with pytest.raises(ValueError, match="at least 3 layers"):
            trend(np.array(values))
    row = check("hunched", "a")
    assert (row["outcome"], row["reason"]) == (UNTESTABLE, "it cannot be computed")


def test_tables_show_every_row_in_words():
    rows = pd.DataFrame([check("hunched", "a", near(0.3), near(0.1)), check("order-agrees", "b", 0.8)])
    html = claim_table(rows).to_html()
    assert claims()["hunched"].claim in html
    assert "0.30 (0.28 to 0.32)" in html
    assert "0.20 (0.20 to 0.20)" in html  # the difference, from draws in common
    line, other = found(rows).splitlines()
    assert line.endswith("0.30; with random weights: 0.10): **holds** for 1 of 1.")
    alone = found(pd.DataFrame([check("hunched", "a", near(0.3))]))
    assert alone.endswith("0.30): **holds without a control** for 1 of 1.")
    assert other.endswith("**fails** for 1 of 1.")


def test_what_was_found_counts_encoders_by_outcome():
    rows = [check("hunched", m, near(v), near(0.0)) for m, v in (("a", 0.3), ("b", 0.01))]
    told = found(pd.DataFrame([*rows, check("hunched", "c", untestable="it has two layers")]))
    assert told.endswith(
        "**holds** for 1 of 3, **fails** for 1 of 3, **untestable here** for 1 of 3 (it has two layers)."
    )


def test_a_claim_of_two_halves_needs_both():
    close = check("rd-star-close", "a", near(-0.01, 0.003), share=0.3)
    large = check("rd-star-close", "b", near(-0.01, 0.003), share=0.5)
    assert [close["outcome"], large["outcome"]] == [HOLDS, FAILS]
    assert "with 0.30 of the parameters" in claim_table(pd.DataFrame([close])).to_html()


def accuracies(generator, tasks, images, **shares):
    """Which images each method gets right, one training of each, on the same images."""
    luck = generator.random((tasks, 1, images))
    return [{method: (luck[t] < share).astype(float) for method, share in shares.items()} for t in range(tasks)]


def test_an_interval_over_tasks_holds_the_statistic_and_shrinks_with_their_number():
    widths = []
    for count in (5, 200):
        generator = np.random.default_rng(0)
        tasks = [
            {
                "RD": (generator.random((1, 50)) < 0.6).astype(float),
                "Lin": (generator.random((1, 50)) < 0.5).astype(float),
            }
            for _ in range(count)
        ]
        estimate = by_tasks(BY_TASK["rd-like-lin"], tasks)
        low, high = estimate.interval()
        assert low < estimate.value < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_images_in_common_make_a_difference_between_methods_precise():
    tasks = accuracies(np.random.default_rng(0), 6, 200, RD=0.6, Lin=0.55)
    apart = [{"RD": task["RD"], "Lin": task["Lin"][:, np.random.default_rng(1).permutation(200)]} for task in tasks]
    paired, mixed = (by_tasks(BY_TASK["rd-like-lin"], part).interval() for part in (tasks, apart))
    assert paired[1] - paired[0] < 0.7 * (mixed[1] - mixed[0])


def test_what_is_not_known_image_by_image_is_resampled_apart_and_below_three_tasks_none_is_left_out():
    share = {"RD": np.full(1, 0.5), "Lin": 0.25}
    spread = by_tasks(BY_TASK["rd-like-lin"], [share | {"B": np.zeros((1, 400))}] * 2).draws.std()
    assert spread == pytest.approx((0.25 / 400 / 2) ** 0.5, rel=0.1)  # two tasks of 400 images
    assert not len(by_tasks(BY_TASK["rd-like-lin"], [{"RD": 0.5, "Lin": 0.25}] * 2).draws)
    assert len(by_tasks(BY_TASK["rd-like-lin"], [{"RD": 0.5, "Lin": 0.25}] * 3).draws)


def test_an_interval_of_a_trend_covers_the_truth_about_as_often_as_it_says():
    generator, covered = np.random.default_rng(0), 0
    for seed in range(60):
        means = np.arange(6) + generator.normal(0, 1.5, 6)
        estimate = by_heads(trend, means[:, None] + generator.normal(size=(6, 6)), seed=seed)
        low, high = estimate.interval()
        assert low <= estimate.value <= high
        covered += low - 1e-9 <= trend(means) <= high + 1e-9
    assert covered >= 51  # 85 %


def test_trainings_are_resampled_too():
    right = np.zeros((2, 100))
    right[0] = 1  # one training gets all right, the other none
    estimate = by_tasks(lambda a: a["RD"].mean(-1), [{"RD": right}] * 2)
    assert estimate.value == 0.5
    assert estimate.draws.std() > 0.2


def test_accuracies_over_chance_lose_nothing_where_nothing_is_lost():
    tasks = [{"U": np.ones((1, 10)), "U|T": np.ones((1, 10)), "B": np.ones((1, 10)), "chance": 0.1}] * 3
    assert by_tasks(BY_TASK["chosen-keep"], tasks).value == 1
    half = [{**task, "U": np.array([[1.0, 0.1] * 5])} for task in tasks]  # mean 0.55, halfway from chance
    assert by_tasks(BY_TASK["chosen-keep"], half).value == pytest.approx(0.5)


def test_rank_correlations_are_scipys():
    a, b = np.random.default_rng(0).integers(5, size=(2, 4, 12))
    assert rank_correlation(a, b) == pytest.approx([spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])


def test_a_head_stands_out_by_being_low_too():
    column = np.array([0.5, 0.52, 0.48, 0.51, 0.49, 0.1, 0.9])[:, None]
    assert standing_out(column)[:, 0].tolist() == [False] * 5 + [True, True]


def test_hits_are_kept_as_text_that_no_reader_takes_for_a_number():
    assert hit_letters(torch.tensor([True, False, True])) == ["yny"]
    assert hit_letters(torch.tensor([[True, False], [False, False]])) == ["yn", "nn"]
