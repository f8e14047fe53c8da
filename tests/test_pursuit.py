"""Pursuits against scikit-learn, against Algorithms 1 and 2 written out, and at the edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import OrthogonalMatchingPursuit

from residual import extract
from residual.heads import omp_heads, somp_head, textspan_heads
from residual.pursuit import filter_dictionary, omp, somp, textspan, textspan_from_moments
from residual.spectrum import Moments

CRITERIA = {"l1": lambda p: p.abs().sum(1), "l2": lambda p: p.square().sum(1), "variance": lambda p: p.var(1)}


def problem(seed, n=60, d=12, t=40, rank=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, rank or d, generator=generator, dtype=dtype) * torch.linspace(2, 0.2, rank or d).to(dtype)
    if rank:
        x = x @ torch.randn(rank, d, generator=generator, dtype=dtype)
    return x, torch.randn(t, d, generator=generator, dtype=dtype)


def algorithm_1(x, words, k):
    """TextSpan on samples, as the paper writes it."""
    residual, words, picked = x.double(), words.double(), []
    for _ in range(k):
        best = (words @ residual.T).var(1).argmax()
        atom = words[best]
        residual = residual - torch.outer(residual @ atom, atom) / (atom @ atom)
        words = words - torch.outer(words @ atom, atom) / (atom @ atom)
        picked.append(best.item())
    return picked, residual


def algorithm_2(x, words, k, criterion):
    """SOMP on samples, as the paper writes it."""
    x, words, picked = x.double(), words.double(), []
    residual = x
    for _ in range(k):
        picked.append(CRITERIA[criterion](words @ residual.T).argmax().item())
        weights = torch.linalg.lstsq(words[picked].T, x.T).solution.T
        residual = x - weights @ words[picked]
    return picked, residual


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000), rank=st.sampled_from([None, 5]), dtype=st.sampled_from([torch.float32, torch.float64])
)
def test_pursuits_are_the_algorithms_written_out(seed, rank, dtype):
    x, words = problem(seed, rank=rank, dtype=dtype)
    for criterion in CRITERIA:
        found = somp(x, words, 4, criterion)
        picked, residual = algorithm_2(x, words, 4, criterion)
        assert found.indices.tolist() == picked
        torch.testing.assert_close(x.double() - found.weights @ words[picked].double(), residual, atol=1e-6, rtol=1e-6)
        energy = residual.square().sum() / x.double().square().sum()
        assert 1 - found.explained[-1].item() == pytest.approx(energy.item(), abs=1e-9)
    found = textspan(x, words, 4)
    picked, residual = algorithm_1(x, words, 4)
    assert found.indices.tolist() == picked
    torch.testing.assert_close(x.double() - found.weights @ words[picked].double(), residual, atol=1e-6, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 8))
def test_omp_is_scikit_learns(seed, k):
    x, words = problem(seed)
    model = OrthogonalMatchingPursuit(n_nonzero_coefs=k, fit_intercept=False).fit(words.T.numpy(), x[0].numpy())
    found = omp(x[0], words, k)
    ours = torch.zeros(len(words), dtype=torch.float64)
    ours[found.indices] = found.weights
    torch.testing.assert_close(ours, torch.tensor(model.coef_), atol=1e-10, rtol=1e-8)


def test_textspan_and_somp_agree_under_one_criterion():
    x, words = problem(3, n=200, d=30, t=300)
    ours, theirs = textspan(x, words, 10), somp(x - x.mean(0), words, 10, "variance")
    assert ours.indices.tolist() == theirs.indices.tolist()
    torch.testing.assert_close(ours.explained, theirs.explained)
    assert ours.indices.tolist() != somp(x - x.mean(0), words, 10, "l1").indices.tolist()


def test_planted_atoms_are_found():
    words = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0))).Q
    codes = torch.randn(500, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([3.0, 2, 1])
    x = codes @ words[[7, 30, 11]]
    for found in (textspan(x, words, 3), *(somp(x, words, 3, c) for c in CRITERIA)):
        assert found.indices.tolist() == [7, 30, 11]
        assert found.explained[-1].item() == pytest.approx(1)
        torch.testing.assert_close(found.weights.float(), codes, atol=1e-4, rtol=1e-4)


PURSUITS = {
    "omp": lambda x, words, k: omp(x[0], words, k),
    "textspan": textspan,
    **{f"somp-{c}": (lambda x, words, k, c=c: somp(x, words, k, c)) for c in CRITERIA},
}


@pytest.mark.parametrize("pursuit", PURSUITS.values(), ids=PURSUITS)
class TestEdges:
    def test_of_atoms_that_tie_the_first_is_picked(self, pursuit):
        x, words = problem(5)
        first = pursuit(x, words, 3).indices
        doubled = torch.cat([words, words, -words])
        assert pursuit(x, doubled, 3).indices.tolist() == first.tolist()
        assert pursuit(x, doubled.flip(0), 3).indices.tolist() == [39 - i for i in first.tolist()]

    def test_zero_atoms_are_not_picked(self, pursuit):
        x, words = problem(6, t=4)
        words[[0, 2]] = 0
        assert sorted(pursuit(x, words, 4).indices.tolist()) == [1, 3]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_pursuit_ends_at_the_rank(self, pursuit, dtype):
        x, words = problem(7, rank=3, dtype=dtype)
        basis = torch.linalg.svd(x, full_matrices=False).Vh[:3]
        found = pursuit(x, filter_dictionary(words, basis), 10)
        assert len(found.indices) <= 3
        assert len(set(found.indices.tolist())) == len(found.indices)
        assert found.explained[-1].item() == pytest.approx(1, abs=1e-6)

    def test_no_more_atoms_than_there_are(self, pursuit):
        x, words = problem(8, t=3)
        assert len(pursuit(x, words, 10).indices) == 3

    def test_a_signal_of_zeros_has_no_atoms(self, pursuit):
        _, words = problem(9)
        assert pursuit(torch.zeros(5, 12, dtype=torch.float64), words, 3).indices.tolist() == []

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x, words: (x, words, 0), "k must be at least 1, not 0"),
            (lambda x, words: (x, words[:, :5], 2), r"not \[\d+, 12\] and \[40, 5\]"),
            (lambda x, words: (x.index_fill(0, torch.tensor(0), torch.nan), words, 2), "samples hold NaN"),
            (lambda x, words: (x, words.index_fill(0, torch.tensor(3), torch.inf), 2), "dictionary hold NaN"),
            (lambda x, words: (x, words[:0], 2), "0 atoms"),
        ],
    )
    def test_bad_input_is_refused(self, pursuit, change, message):
        with pytest.raises(ValueError, match=message):
            pursuit(*change(*problem(1)))


def test_an_unknown_criterion_is_refused():
    with pytest.raises(ValueError, match="'l3'"):
        somp(*problem(1), 2, "l3")


def test_small_residuals_are_still_decided_in_double_precision():
    x, words = problem(10, n=30)
    words[:3] = torch.eye(12, dtype=torch.float64)[:3]
    big = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e5
    x = torch.cat([big, x[:, 3:] * 1e-1], 1)
    for criterion in CRITERIA:
        assert somp(x, words, 5, criterion).indices.tolist() == algorithm_2(x, words, 5, criterion)[0]


def test_many_heads_from_moments_are_heads_one_by_one():
    frames = torch.randn(2, 3, 6, 12, generator=torch.Generator().manual_seed(0))
    samples = torch.randn(50, 2, 3, 6, generator=torch.Generator().manual_seed(1))
    samples[:, 1, 2, 1:] = 0  # a head of rank one
    _, words = problem(2)
    values = torch.einsum("nlhk,lhkd->lhnd", samples.double(), frames.double())
    for rank in (None, 3):
        found = textspan_from_moments(Moments.of(samples), words, 3, frames, rank=rank)
        for layer, head in ((0, 0), (0, 2), (1, 1), (1, 2)):
            x = values[layer, head]
            own = words
            if rank:
                components = torch.linalg.svd(x, full_matrices=False).Vh
                own = filter_dictionary(words, components[: 1 if (layer, head) == (1, 2) else rank])
            alone = textspan(x, own, 3)
            size = len(alone.indices)
            assert found.indices[layer, head, :size].tolist() == alone.indices.tolist()
            assert (found.indices[layer, head, size:] == -1).all() or rank
            torch.testing.assert_close(found.explained[layer, head, :size], alone.explained)


@pytest.mark.parametrize("rank", [None, 3, 80])
def test_stored_heads_are_pursued_as_samples_in_output_space(encoder, dataset, tmp_path, rank):
    units = extract(encoder, dataset, root=tmp_path, coordinates="float32", progress=False)
    _, words = problem(4, d=encoder.output_dim)
    spans, first = textspan_heads(units, words, 4, rank), omp_heads(units, words, 4, 0)
    second = omp_heads(units, words, 4, 1)
    assert spans.indices.shape == (encoder.layers, encoder.heads, 3 if rank == 3 else 4)
    assert first.indices.tolist() != second.indices.tolist()
    components = units.head_pca().components
    for layer, head in ((0, 1), (2, 3)):
        basis = torch.linalg.qr(units.frames.head_frames[layer, head].double().mT).Q
        samples = units.head_coordinates(layer, head) @ basis.mT
        samples = samples - samples.mean(0)
        whole = torch.linalg.svd(units.head_outputs(layer, head), full_matrices=False).Vh  # not centred
        own = filter_dictionary(words, whole[: min(rank, 15)]) if rank else words
        size = spans.indices.shape[-1]
        assert spans.indices[layer, head].tolist() == textspan(samples, own, size).indices.tolist()
        assert first.indices[layer, head].tolist() == omp(components[layer, head, 0], words, 4).indices.tolist()
        for criterion in CRITERIA:
            found = somp_head(units, layer, head, words, 3, criterion)
            assert found.indices.tolist() == somp(samples, words, 3, criterion).indices.tolist()
    with pytest.raises(ValueError, match="component must be from 0"):
        omp_heads(units, words, 2, component=99)


def test_atoms_that_a_filter_leaves_nothing_of_are_not_picked():
    x, words = problem(11, rank=3)
    basis = torch.linalg.svd(x, full_matrices=False).Vh
    words = torch.cat([basis[:1], words @ basis[3:].T @ basis[3:]])  # only the first touches the signal
    for pursuit in PURSUITS.values():
        assert pursuit(x, filter_dictionary(words, basis[:3]), 3).indices.tolist() == [0]
    with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
        textspan_from_moments(Moments.of(x), words, 2, rank=0)
