"""Known dimensions, invariances, and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import make_swiss_roll
from sklearn.linear_model import LinearRegression
from sklearn.neighbors import NearestNeighbors

from conftest import interrupt_at
from residual import extract, heads
from residual.data.dataset import Dataset
from residual.dimension import pca_dimension, subsampling_error, two_nn
from residual.heads import head_dimensions


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ball(n, d, seed=0):
    x = torch.randn(n, d, generator=generator(seed))
    return x / x.norm(dim=1, keepdim=True) * torch.rand(n, 1, generator=generator(seed + 1)) ** (1 / d)


def embedded(x, d, seed=3):
    basis, _ = torch.linalg.qr(torch.randn(d, x.shape[1], generator=generator(seed), dtype=torch.float64))
    return x.double() @ basis.T


def reference_two_nn(x, keep):
    """The estimator as its paper words it, by scikit-learn's tree of neighbours and regression in double precision."""
    x = np.unique(np.asarray(x, dtype=np.float64), axis=0)
    distances, _ = NearestNeighbors(n_neighbors=3, algorithm="kd_tree").fit(x).kneighbors(x)
    ratios = np.sort(distances[:, 2] / distances[:, 1])[: int(len(x) * keep)]
    share = np.arange(1, len(ratios) + 1) / len(x)
    fit = LinearRegression(fit_intercept=False).fit(np.log(ratios)[:, None], -np.log1p(-share))
    return float(fit.coef_[0])


# The estimator is known to fall short in many dimensions, where a sample is never dense: the tolerance grows.
@pytest.mark.parametrize("n", [500, 2000, 6000])
@pytest.mark.parametrize(("d", "tolerance"), [(1, 0.08), (2, 0.08), (5, 0.12), (10, 0.22)])
def test_balls_in_ten_dimensions(n, d, tolerance):
    slack = tolerance * (1 + 20 / math.sqrt(n) / 2)
    assert two_nn(embedded(ball(n, d), 20)) == pytest.approx(d, rel=slack)


@pytest.mark.parametrize("n", [1000, 4000])
def test_known_manifolds(n):
    sphere = torch.nn.functional.normalize(torch.randn(n, 4, generator=generator()), dim=1)
    assert two_nn(sphere) == pytest.approx(3, rel=0.1)
    roll = torch.tensor(make_swiss_roll(n, random_state=0)[0])
    assert two_nn(roll) == pytest.approx(2, rel=0.1)
    time = torch.rand(n, generator=generator(), dtype=torch.float64) * 6
    curve = torch.stack([(k * time).sin() / k for k in range(1, 60)], 1)
    assert two_nn(curve) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [0.5, 0.9])
@pytest.mark.parametrize(("n", "d"), [(301, 1), (700, 3), (900, 24)])
def test_equals_an_independent_implementation(n, d, keep, seed):
    x = embedded(ball(n, d, seed), 30, seed)
    assert two_nn(x, keep=keep) == pytest.approx(reference_two_nn(x, keep), rel=2e-3)


@given(
    scale=st.floats(1e-6, 1e6), shift=st.floats(-1e3, 1e3), block=st.integers(1, 700), seed=st.integers(0, 5)
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_scale_shift_rotation_embedding_and_blocks_do_not_matter(scale, shift, block, seed):
    x = ball(600, 3, seed).double()
    moved = embedded(x, 12, seed) * scale + shift * scale
    assert two_nn(moved, block=block) == pytest.approx(two_nn(x), rel=5e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_precisions(dtype):
    assert two_nn(ball(800, 8).to(dtype)) == pytest.approx(two_nn(ball(800, 8)), rel=0.05)


def test_close_neighbours_far_from_the_origin_are_told_apart():
    """Squared distances of 1e-8 among norms of 1 are beneath single precision's |b|^2 - 2ab."""
    clusters = torch.randn(20, 10, generator=generator(), dtype=torch.float64).repeat_interleave(60, 0)
    x = clusters + 1e-4 * ball(1200, 2).double() @ torch.randn(2, 10, generator=generator(1), dtype=torch.float64)
    assert two_nn(x) == pytest.approx(reference_two_nn(x, 0.9), rel=2e-3)


@pytest.mark.parametrize("spread", [1e-5, 1e-7, 1e-9])
def test_blobs_far_apart_and_outliers_do_not_hide_neighbours(spread):
    blobs = torch.randn(600, 3, generator=generator(), dtype=torch.float64) * spread
    blobs[:300, 0] += 1
    assert two_nn(blobs) == pytest.approx(reference_two_nn(blobs, 0.9), rel=1e-2)
    cloud = torch.randn(500, 4, generator=generator(), dtype=torch.float64)
    cloud[0] = 1 / spread
    assert two_nn(cloud) == pytest.approx(reference_two_nn(cloud, 0.9), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-250, 1e-30, 1e30, 1e250])
def test_extreme_scales(scale):
    x = ball(500, 3).double()
    assert two_nn(x * scale) == pytest.approx(two_nn(x), rel=1e-6)


@pytest.mark.parametrize("n", [50, 75, 600, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_duplicates_that_a_product_rounded_differently_are_dropped(n, dtype):
    generator = torch.Generator().manual_seed(n)
    x, matrix = torch.randn(n, 6, generator=generator), torch.randn(6, 40, generator=generator)
    x, matrix = x.to(dtype), matrix.to(dtype)
    once = x @ matrix
    again = torch.cat([row[None] @ matrix for row in x])  # the same, row by row
    noisy = once * (1 + torch.finfo(dtype).eps * (torch.rand(once.shape, generator=generator) - 0.5)).to(dtype)
    expected = two_nn(once)
    for copies in (again, noisy):
        twice = torch.cat([once, copies])[torch.randperm(2 * n, generator=generator)]
        assert two_nn(twice) == pytest.approx(expected, rel=1e-3)
        assert two_nn(twice.double(), precision=dtype) == pytest.approx(expected, rel=1e-3)
        assert two_nn(1e-6 * twice) == pytest.approx(expected, rel=1e-3)


def test_many_copies_that_differ_by_rounding_are_one():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=generator)
    copies = torch.cat([x * (1 + 1e-7 * (torch.rand(x.shape, generator=generator) - 0.5)) for _ in range(9)])
    assert two_nn(copies) == pytest.approx(two_nn(x), rel=1e-3)
    with pytest.raises(ValueError, match="at least 20 distinct rows, not"):
        two_nn(copies[torch.arange(len(copies)) % 40 < 15])


def test_quantised_values_are_not_duplicates_for_being_near():
    generator = torch.Generator().manual_seed(0)
    fine = torch.rand(3000, 4, generator=generator)
    quantised = (fine * 255).round()  # steps of a 255th of the largest, far above any rounding
    distinct = torch.unique(quantised, dim=0)
    assert two_nn(torch.cat([quantised, quantised])) == pytest.approx(two_nn(distinct), rel=1e-9)
    assert two_nn(quantised) == pytest.approx(two_nn(fine), rel=0.1)


def test_duplicates_are_dropped():
    x = ball(500, 3)
    assert two_nn(torch.cat([x, x[:200], x[:50]])) == pytest.approx(two_nn(x), rel=1e-6)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.rand(19, 3), {}, "20 distinct rows, not 19"),
        (torch.zeros(50, 3), {}, "20 distinct rows, not 1"),
        (torch.zeros(0, 3), {}, "20 distinct rows, not 0"),
        (torch.full((50, 3), torch.nan), {}, "NaN"),
        (torch.rand(50, 3), {"keep": 0.0}, r"keep must lie in \(0, 1\]"),
        (torch.rand(50, 3), {"keep": 1.5}, r"keep must lie in \(0, 1\]"),
        (torch.cartesian_prod(*[torch.arange(6.0)] * 2), {}, "grid"),
    ],
)
def test_what_has_no_dimension_is_refused(x, options, message):
    with pytest.raises(ValueError, match=message):
        two_nn(x, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_not_finite_is_enough(bad, dtype):
    x = torch.rand(900, 7).to(dtype)
    x[450, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        two_nn(x)


def test_the_standard_error_is_that_of_repeated_samples():
    estimates = torch.tensor([two_nn(ball(800, 4, seed)) for seed in range(0, 40, 2)])
    errors = [subsampling_error(two_nn, ball(800, 4, seed), repeats=20, seed=seed) for seed in range(0, 6, 2)]
    assert sum(errors) / len(errors) == pytest.approx(float(estimates.std()), rel=0.5)


@pytest.mark.parametrize(
    ("eigenvalues", "threshold", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0], 1.0, 4),
        ([1.0, 1.0, 1.0, 1.0], 0.75, 3),
        ([1.0, 1.0, 1.0, 1.0], 0.76, 4),
        ([99.0, 1.0], 0.99, 1),
        ([98.0, 2.0], 0.99, 2),
        ([0.0, 3.0, -1e-18], 0.99, 1),
        ([0.0, 0.0], 0.99, 0),
    ],
)
def test_pca_dimension(eigenvalues, threshold, expected):
    assert pca_dimension(torch.tensor(eigenvalues, dtype=torch.float64), threshold) == expected


@pytest.mark.parametrize("threshold", [0.0, 1.1, -1.0])
def test_pca_dimension_refuses_other_thresholds(threshold):
    with pytest.raises(ValueError, match="threshold"):
        pca_dimension(torch.ones(3), threshold)


def test_pca_dimension_refuses_nan():
    with pytest.raises(ValueError, match="finite"):
        pca_dimension(torch.tensor([1.0, torch.nan]))


def test_heads_that_are_done_are_kept_and_damage_is_noticed(encoder, tmp_path, monkeypatch):
    images = torch.randint(0, 256, (120, 3, 32, 32), generator=generator(), dtype=torch.uint8)
    data = Dataset("noise", "train", images, torch.zeros(120, dtype=torch.int64), ("a",), ("{}",))
    units = extract(encoder, data, root=tmp_path, coordinates="float32", progress=False)
    per_layer = encoder.heads * 9  # TwoNN of a head, and of eight quarters of its samples
    with monkeypatch.context() as patch:
        patch.setattr(heads, "two_nn", interrupt_at(two_nn, per_layer + 5))
        with pytest.raises(KeyboardInterrupt):
            head_dimensions(units, progress=False)
    (kept,) = units.folder.glob("dimensions-*.json")
    left, calls = (encoder.layers - 1) * per_layer, []
    monkeypatch.setattr(heads, "two_nn", lambda x, **options: calls.append(None) or two_nn(x, **options))
    resumed = head_dimensions(units, progress=False)
    assert len(calls) == left
    assert head_dimensions(units, progress=False).equals(resumed)
    assert len(calls) == left
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    assert head_dimensions(units, progress=False).equals(resumed)
    assert len(calls) == left + encoder.layers * per_layer


def test_too_few_images_for_quarters_are_told(encoder, dataset, tmp_path):
    units = extract(encoder, dataset, root=tmp_path, coordinates="float32")
    with pytest.raises(
        ValueError, match=r"70 images of noise/train are used, and the dimensions need at least 80: .* quarters"
    ):
        heads.head_dimensions(units)
