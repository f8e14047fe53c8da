"""The methods as chapters write them, on other data, against implementations that have nothing in common with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr
from sklearn.linear_model import orthogonal_mp

from conftest import page_functions, relative_error
from residual import extract, trace
from residual.alignment import reference_bases
from residual.spectrum import PCA


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_linear_and_nonlinear_dimension_of_a_curved_sheet():
    page = page_functions("dimension", "plain_pca_dimension", "plain_two_nn")
    u, v = torch.rand(2, 2000, generator=torch.Generator().manual_seed(0)).double() * 6
    sheet = torch.stack([u.cos(), u.sin(), v.cos(), v.sin(), u], 1)  # two-dimensional, in five
    assert page["plain_two_nn"](torch.cat([sheet, sheet[:50]]))[0] == pytest.approx(2, abs=0.15)
    linear, explained = page["plain_pca_dimension"](sheet)
    shares = np.linalg.eigvalsh(np.cov(sheet.numpy().T))[::-1]
    np.testing.assert_allclose(explained, shares.cumsum() / shares.sum())
    assert linear == 1 + np.flatnonzero(shares.cumsum() / shares.sum() >= 0.99)[0]
    assert page["plain_two_nn"](sheet, keep=0.5)[0] != page["plain_two_nn"](sheet)[0]


def test_three_scores_of_a_head():
    page = page_functions("selection", "plain_u")
    head, output, labels = drawn(30, 12), drawn(30, 12, seed=1), torch.arange(30) % 4
    classes = F.normalize(drawn(4, 12, seed=2), dim=1)
    rows = zip(head.numpy(), output.numpy(), strict=True)
    assert page["plain_u"](head, output).item() == pytest.approx(np.mean([pearsonr(a, b)[0] for a, b in rows]))
    span = np.linalg.qr(classes.numpy().T)[0]
    onto = [(values.numpy() @ span) @ span.T for values in (head, output)]
    expected = np.mean([pearsonr(a, b)[0] for a, b in zip(*onto, strict=True)])
    assert page["plain_ut"](head, output, classes).item() == pytest.approx(expected)
    nearest = [np.argmax([row @ direction for direction in classes.numpy()]) for row in head.numpy()]
    assert page["plain_s"](head, classes, labels).item() == pytest.approx(np.mean(np.equal(nearest, labels.numpy())))


def test_heads_alone_and_scaled_units_are_sums_of_traced_ones(encoder, dataset, tmp_path):
    stored, units = extract(encoder, dataset, root=tmp_path, coordinates="float32"), trace(encoder, dataset.images)
    alone = page_functions("selection", "plain_ablation")["plain_ablation"](stored, [(0, 1), (2, 3)])
    assert relative_error(alone, (units["L0.H1"] + units["L2.H3"]).double()) < 1e-5
    bases, page = reference_bases(stored, "RD"), page_functions("alignment", "plain_residual", "plain_output")
    lambdas, expected = drawn(len(bases.components)).float(), units["X0"].numpy()
    for index, unit in enumerate(bases.units):
        own = (bases.unit_index == index).numpy()
        phi = bases.components.numpy()[own]
        operator = phi.T @ np.diag(lambdas.numpy()[own]) @ phi
        expected = expected + (units[str(unit)].numpy() - bases.means[index].numpy()) @ operator
    assert relative_error(page["plain_residual"](units, bases, lambdas), torch.from_numpy(expected)) < 1e-5


def test_a_training_finds_the_components_that_carry_a_task():
    page = page_functions("alignment", "plain_output", "plain_loss", "plain_epoch", "plain_fit", seed=0)
    labels = torch.arange(200) % 2
    scores = torch.cat([0.2 * (labels[:, None] * 2.0 - 1), drawn(200, 5).float(), torch.zeros(200, 6)], 1)
    words, components = torch.eye(6)[:2], torch.eye(6)
    components[0, :2] = torch.tensor([-0.7, 0.7])
    train, validation = (scores[:150], labels[:150]), (scores[150:], labels[150:])
    lambdas = page["plain_fit"](components, train, validation, words, 10.0, 0.1)
    assert lambdas[0] > 1.5
    outputs = page["plain_output"](scores, lambdas, components)
    before = page["plain_output"](scores, torch.ones(6), components)
    hits = [((each @ words.T).argmax(1) == labels).double().mean() for each in (before, outputs)]
    assert hits[0] < 0.7 < 0.9 < hits[1]
    cosines = F.cosine_similarity(outputs[:, None], words[None], dim=2)
    loss = -torch.log_softmax(10 * cosines, 1)[torch.arange(200), labels].mean()
    assert page["plain_loss"](outputs, words, labels, 10.0).item() == pytest.approx(loss.item(), rel=1e-5)


def test_sentences_of_a_component_and_their_agreement():
    page = page_functions("semantics", "plain_omp", "signed_z")
    words, component = F.normalize(drawn(60, 16), dim=1), drawn(16, seed=1)
    found = orthogonal_mp(words.numpy().T, component.numpy(), n_nonzero_coefs=4)
    assert sorted(page["plain_omp"](component, words, 4)) == np.flatnonzero(found).tolist()
    table = np.corrcoef(np.hstack([words.numpy(), -words.numpy()]))  # without means, so of cosines
    np.testing.assert_allclose(table, words @ words.T, atol=1e-12)
    mean, spread = table[[3, 4]].mean(), table[[3, 4]].std(ddof=1)
    expected = (table[np.ix_([3, 4], [7, 9])].mean() - mean) / spread
    found = page["signed_z"]([3, 4], [[7, 9], [3, 4]], 5 * words)
    assert found[0].item() == pytest.approx(expected)
    assert found[1] > found[0]


def test_descriptions_that_span_a_head_explain_all_of_it(encoder, dataset, tmp_path):
    units = extract(encoder, dataset, root=tmp_path, coordinates="float32", progress=False)
    described = page_functions("semantics", "unexplained", "described_outputs")["described_outputs"]
    words = drawn(60, encoder.output_dim).float()
    every = torch.arange(60).expand(*units.head_grid, 60)
    torch.testing.assert_close(described(units, every, words, 2), units.outputs(), atol=1e-4, rtol=1e-4)
    none, expected = torch.full((*units.head_grid, 1), -1), units.outputs().double()
    for at in ((layer, head) for layer in (1, 2) for head in range(encoder.heads)):
        samples = units.head_outputs(*at)
        expected -= samples - samples.mean(0)
    torch.testing.assert_close(described(units, none, words, 2), expected.float(), atol=1e-5, rtol=1e-4)


def test_similarity_takes_the_largest_weighted_cosines_first():
    page = page_functions("similarity", "plain_similarity", "leading")
    turn = 0.4
    a = torch.eye(3, dtype=torch.float64)
    b = torch.tensor([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, -1]]).double()
    weights = torch.tensor([4.0, 2.0, 1.0]).double()
    expected = ((16 * np.cos(turn)) ** 2 + (4 * np.cos(turn)) ** 2 + 1) / (16**2 + 4**2 + 1)
    found, pairs = page["plain_similarity"](a, b, weights, weights)
    assert (found, pairs) == (pytest.approx(expected**0.5), [(0, 0), (1, 1), (2, 2)])
    spectrum = PCA(torch.zeros(3), a, torch.tensor([8.0, 1.5, 0.5]))
    assert [len(part) for part in page["leading"](spectrum, ())] == [2, 2]
