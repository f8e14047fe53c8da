"""Moments merge exactly, and PCA from them is PCA of the samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA as ReferencePCA

from conftest import FAMILIES, pixels_of
from residual import trace
from residual.spectrum import Moments, isometry, pca, pca_from_moments


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
    moments = Moments.of(units.coordinates)
    fast = pca_from_moments(moments, units.frames.heads, units.frames.heads_constant)
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
