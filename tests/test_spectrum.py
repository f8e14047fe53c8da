"""Moments merge exactly, and PCA from them is PCA of the samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA as ReferencePCA

from conftest import FAMILIES, pixels_of
from residual import trace
from residual.spectrum import Moments, isometry, pca, pca_from_moments, pca_similarity, spectral_cosine


def samples(n=200, k=6, seed=0, offset=100.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator, dtype=torch.float64)
    return torch.randn(n, k, generator=generator, dtype=torch.float64) @ mix + offset


def distances(x):
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


@given(cuts=st.lists(st.integers(1, 199), max_size=12), order=st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_moments_do_not_depend_on_the_split(cuts, order):
    x = samples()
    parts = [part for part in x.tensor_split(sorted(cuts)) if len(part)]
    order.shuffle(parts)
    merged = Moments.of(parts[0])
    for part in parts[1:]:
        merged = merged.merge(Moments.of(part))
    assert merged.count == len(x)
    torch.testing.assert_close(merged.mean, x.mean(0), rtol=1e-10, atol=0)
    torch.testing.assert_close(merged.covariance, x.T.cov(), rtol=1e-10, atol=1e-10)


def test_moments_keep_units_apart():
    x = torch.stack([samples(seed=0), samples(seed=1)], 1)
    both = Moments.of(x)
    torch.testing.assert_close(both.covariance[1], Moments.of(x[:, 1]).covariance)


def test_moments_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="at least one"):
        Moments.of(samples()[:0])
    with pytest.raises(ValueError, match="do not merge"):
        Moments.of(samples(k=6)).merge(Moments.of(samples(k=5)))
    with pytest.raises(ValueError, match="at least 2"):
        _ = Moments.of(samples(n=1)).covariance


@pytest.mark.parametrize(("n", "d"), [(300, 8), (12, 40)])
def test_pca_equals_scikit_learn(n, d):
    x = samples(n, d)
    ours, theirs = pca(x), ReferencePCA().fit(x.numpy())
    k = min(n - 1, d)
    torch.testing.assert_close(ours.eigenvalues[:k], torch.tensor(theirs.explained_variance_[:k]))
    ratio = torch.tensor(theirs.explained_variance_ratio_[:k])
    torch.testing.assert_close(ours.explained_variance_ratio[:k], ratio)
    cosines = (ours.components[:k] * torch.tensor(theirs.components_[:k])).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines))


@pytest.mark.parametrize("bad", [torch.zeros(1, 3), torch.full((5, 3), torch.nan)])
def test_pca_refuses_what_has_no_spectrum(bad):
    with pytest.raises(ValueError, match="pca"):
        pca(bad)


def test_what_rounding_makes_is_no_variance_and_what_little_there_is_stays():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator)
    thin = torch.randn(6, 3, generator=generator) @ torch.randn(3, 20, generator=generator)  # of rank 3
    assert (pca_from_moments(Moments.of(x), thin).eigenvalues > 0).sum() == 3
    units = torch.finfo(torch.float32).eps * torch.randint(-2, 3, (500, 6), generator=generator)
    frame = torch.randn(6, 20, generator=generator)
    assert not pca_from_moments(Moments.of((1 + units) * torch.arange(1, 7)), frame).eigenvalues.any()
    for of_little in (pca_from_moments(Moments.of(1 + 1e-5 * x), frame), pca_from_moments(Moments.of(1 + 1e-6 * x))):
        assert of_little.eigenvalues.gt(0).all()


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e20])
def test_a_unit_that_does_not_vary_has_no_explained_variance(value):
    assert pca(torch.full((50, 3), value)).explained_variance_ratio.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pca_of_half_precision(dtype):
    x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(pca(x).eigenvalues, pca(x.float()).eigenvalues)


@pytest.mark.parametrize("kind", FAMILIES)
def test_pca_of_every_head_from_moments_is_that_of_the_unit(small, kind):
    encoder = small(kind)
    units = trace(encoder, pixels_of(encoder, 60))
    moments = Moments.of(units.head_coordinates)
    fast = pca_from_moments(moments, units.frames.head_frames, units.frames.head_constant)
    for layer in range(encoder.layers):
        for head in range(encoder.heads):
            unit = pca(units[f"L{layer}.H{head}"].double())
            k = fast.eigenvalues.shape[-1]
            scale = unit.eigenvalues[0]
            torch.testing.assert_close(
                fast.eigenvalues[layer, head] / scale, unit.eigenvalues[:k] / scale, rtol=0, atol=1e-6
            )
            torch.testing.assert_close(fast.mean[layer, head], unit.mean, rtol=1e-5, atol=1e-6)
            cosines = (fast.components[layer, head, :4] * unit.components[:4]).sum(1)
            torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-4)


def test_isometric_coordinates_keep_distances():
    coordinates, frame = samples(30, 5, offset=0.0), samples(5, 40, seed=1)[:, :40]
    _, factor = isometry(frame)
    torch.testing.assert_close(distances(coordinates @ factor.mT), distances(coordinates @ frame))


def spectral_cosine_by_hand(a, b, wa, wb, weighted):
    """Eq. 3 and 4, pair by pair."""
    cosines = (a @ b.T).abs()
    rows, columns, total = list(range(len(a))), list(range(len(b))), 0.0
    for _ in range(min(len(a), len(b))):
        value = lambda p: cosines[p] * (wa[p[0]] * wb[p[1]] if weighted else 1)  # noqa: E731
        i, j = max(((i, j) for i in rows for j in columns), key=value)
        total += (cosines[i, j] * wa[i] * wb[j]) ** 2
        rows.remove(i), columns.remove(j)
    bound = sum((x * y) ** 2 for x, y in zip(sorted(wa, reverse=True), sorted(wb, reverse=True), strict=False))
    return float((total / bound) ** 0.5)


@st.composite
def bases(draw):
    seed, k, m, d = draw(st.tuples(st.integers(0, 9999), st.integers(1, 5), st.integers(1, 5), st.integers(5, 8)))
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    rows = [torch.linalg.qr(random(d, size)).Q.T for size in (k, m)]
    return rows, [random(size).abs().sort(descending=True).values + 1e-3 for size in (k, m)], random(d, d)


@settings(max_examples=60, deadline=None)
@given(bases(), st.sampled_from(["weighted", "cosine"]))
def test_spectral_cosine_has_the_properties_of_a_similarity(case, choose):
    (a, b), (wa, wb), other = case
    value = spectral_cosine(a, b, wa, wb, choose=choose)
    assert 0 <= value <= 1
    assert value == pytest.approx(spectral_cosine_by_hand(a, b, wa, wb, choose == "weighted"), abs=1e-9)
    assert value == pytest.approx(spectral_cosine(b, a, wb, wa, choose=choose), abs=1e-9)
    assert spectral_cosine(a, a, wa, wa, choose=choose) == pytest.approx(1)
    rotation = torch.linalg.qr(other).Q
    assert value == pytest.approx(spectral_cosine(-a @ rotation, 3 * b @ rotation, 2 * wa, wb, choose=choose), abs=1e-9)


def test_spectral_cosine_knows_same_and_orthogonal_sets():
    eye = torch.eye(6)
    assert spectral_cosine(eye[:3], eye[3:]) == 0
    assert spectral_cosine(eye[:3], eye[[2, 0, 1]]) == 1
    assert spectral_cosine(eye[:2], eye[[1, 0]], torch.tensor([3.0, 1]), torch.tensor([3.0, 1])) == pytest.approx(
        (2 * 9 / (81 + 1)) ** 0.5
    )


def test_the_two_readings_of_eq_3_differ():
    a, b = torch.eye(2), torch.tensor([[0.6, 0.8], [0.8, -0.6]])
    weights = torch.tensor([10.0, 1.0])
    by_weight, by_cosine = (spectral_cosine(a, b, weights, weights, choose=c) for c in ("weighted", "cosine"))
    assert by_weight == pytest.approx(0.6)
    assert by_cosine == pytest.approx((2 * 64 / 10001) ** 0.5)


def test_of_pairs_that_tie_the_smallest_indices_are_chosen_whichever_set_is_first():
    a, b = torch.eye(3), torch.tensor([[1.0, 1, 0], [1, -1, 0], [0, 1, 1]])
    weights = torch.tensor([1.0, 1, 1]), torch.tensor([1.0, 1, 1])
    first = spectral_cosine(a, b, *weights)
    assert first == pytest.approx(spectral_cosine(b, a, *weights))
    assert first == pytest.approx(((0.5 + 0.5 + 0.5) / 3) ** 0.5)  # (0, 0), (1, 1), (2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(2, 3)}, "only zeros"),
        ({"b": torch.full((2, 3), torch.nan)}, "rows of b hold NaN"),
        ({"b": torch.eye(4)}, r"R\^3 and in R\^4"),
        ({"weights_a": torch.tensor([1.0, -1])}, "weights of a must be"),
        ({"weights_b": torch.tensor([0.0, 0])}, "weights of b must be"),
        ({"weights_a": torch.ones(3)}, r"\[3\]"),
        ({"choose": "best"}, "'best'"),
    ],
)
def test_spectral_cosine_refuses_bad_input(change, message):
    given = {"a": torch.eye(3)[:2], "b": torch.eye(3)[:2]} | change
    with pytest.raises(ValueError, match=message):
        spectral_cosine(**given)


def test_all_heads_at_once_are_heads_one_by_one():
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(2, 0.1, 6)
    first, second = (
        pca_from_moments(Moments.of(torch.randn(99, 2, 3, 6, generator=generator) * spread)) for _ in range(2)
    )
    found = pca_similarity(first, second)
    assert found.shape == (2, 3)
    for index in ((0, 1), (1, 2)):
        kept = []
        for own in (first, second):
            shares = own.explained_variance_ratio[index].tolist()
            size = next(k for k in range(1, 7) if sum(shares[:k]) >= 0.9)
            kept.append((own.components[index][:size], own.eigenvalues[index][:size]))
        (a, wa), (b, wb) = kept
        assert found[index].item() == pytest.approx(spectral_cosine(a, b, wa, wb))
    torch.testing.assert_close(pca_similarity(first, first), torch.ones(2, 3).double())
    still = pca_from_moments(Moments.of(torch.zeros(9, 2, 3, 6)))
    assert pca_similarity(first, still).eq(0).all()
    with pytest.raises(ValueError, match="evr must be in"):
        pca_similarity(first, second, evr=1.5)
