"""What the authors' code computes otherwise than the paper's text says, against plain implementations of each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import page_functions, relative_error
from edition.chapter import Chapter
from edition.inputs import extractions, other_sets
from edition.pages import chapter_defaults, chapter_path
from residual import extract, load_dataset, trace
from residual.alignment import (
    RATES,
    FineTuned,
    LinearAligner,
    ResiDual,
    component_scores,
    reference_bases,
    training_options,
)
from residual.dimension import pca_dimension, two_nn
from residual.heads import head_dimensions
from residual.selection import class_means, score_units
from residual.training import Schedule, _Task


@pytest.fixture
def stored(encoder, dataset, tmp_path):
    return extract(encoder, dataset, root=tmp_path, coordinates="float32", batch=32, progress=False)


def directions(encoder):
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(3, encoder.output_dim, generator=generator), dim=1)


@pytest.mark.parametrize("method", ["U", "U|T"])
def test_the_codes_scores_correlate_over_images_along_the_axes_of_a_basis(encoder, dataset, stored, method):
    units, classes = trace(encoder, dataset.images), directions(encoder)
    names = [f"L{layer}.H{head}" for layer in range(encoder.layers) for head in range(encoder.heads)]
    samples = [units[name].double().numpy() for name in names]
    spanning = stored.outputs() if method == "U" else classes
    axes = np.linalg.qr(spanning.double().numpy().T)[0]
    total, expected = sum(samples) @ axes, []
    for own in samples:
        columns = zip((own @ axes).T, total.T, strict=True)
        expected.append(np.mean([np.corrcoef(a, b)[0, 1] for a, b in columns]))
    scores = score_units(stored, method, classes, reading="code")
    np.testing.assert_allclose(scores.flatten().numpy(), expected, atol=1e-4)
    assert not torch.allclose(scores, score_units(stored, method, classes))
    with pytest.raises(ValueError, match="reading must be one of"):
        score_units(stored, method, classes, reading="prose")


def test_scores_that_the_code_has_as_the_text_are_the_same(encoder, stored):
    classes = directions(encoder)
    for method in ("S", "R"):
        assert score_units(stored, method, classes, reading="code").equal(score_units(stored, method, classes))


def test_the_codes_rd_multiplies_with_the_components_where_a_basis_is_square(encoder, dataset, stored):
    text = reference_bases(stored, "RD")
    module = ResiDual(text, reading="code", seed=3)
    with torch.no_grad():
        plain = module(component_scores(stored, text))
    module.components = page_functions("text_and_code", "transposed")["transposed"](text)
    assert module.lambdas.mean().item() == pytest.approx(1, abs=0.2)
    assert module.lambdas.std().item() == pytest.approx(1, abs=0.2)
    units, total = trace(encoder, dataset.images), 0
    for index, unit in enumerate(text.units):
        rows = text.unit_index == index
        phi, deviations = text.components[rows], (units[str(unit)] - text.means[index]).T
        square = len(phi) == phi.shape[1]
        inverse = phi if square else phi.T
        assert square == (unit.kind == "MLP")
        total = total + (inverse @ torch.diag(module.lambdas[rows]) @ phi @ deviations).T
    expected = (total + units["X0"]).detach()
    with torch.no_grad():
        assert relative_error(module(component_scores(stored, text)), expected) < 2e-5
    assert relative_error(plain, expected) > 0.01


def test_the_codes_rd_y_scales_each_dimension_of_the_output(stored):
    page = page_functions("text_and_code", "without_components")
    bases = page["without_components"](reference_bases(stored, "RD_Y"), stored.output_moments)
    module = ResiDual(bases, reading="code")
    with torch.no_grad():
        found = module(component_scores(stored, bases))
        torch.testing.assert_close(found, stored.outputs() * module.lambdas)


def test_heads_alone_are_the_same_in_both_readings(stored):
    page = page_functions("text_and_code", "transposed")
    for kind in ("RD*", "O"):
        bases = reference_bases(stored, kind)
        assert page["transposed"](bases).equal(bases.components)


def test_the_codes_training_is_on_inner_products_at_fixed_rates_from_a_random_start(encoder, stored):
    linear, residual = LinearAligner(8, reading="code"), ResiDual(reference_bases(stored, "RD"))
    assert training_options(linear, encoder) == {"scale": encoder.logit_scale or 100.0}
    assert training_options(linear, encoder, "code") == {"scale": None, "rate": 1e-3, "schedule": Schedule(warmup=0)}
    assert training_options(residual, encoder, "code")["rate"] == RATES["RD"] == 0.8
    tuning = training_options(FineTuned(encoder), encoder, "code")
    assert (tuning["rate"], tuning["schedule"]) == (1e-5, Schedule(batch=128, warmup=0, clip=1.0))
    assert linear.weight.equal(LinearAligner(8, reading="code").weight)
    assert not linear.weight.equal(LinearAligner(8, reading="code", seed=1).weight)
    assert LinearAligner(8).weight.equal(torch.eye(8))
    assert ResiDual(residual.bases).lambdas.eq(1).all()


def test_inner_products_are_not_normalised_and_gradients_are_clipped():
    outputs, labels, classes = torch.tensor([[3.0, 0.0], [0.0, 0.1]]), torch.tensor([1, 0]), torch.eye(2)
    for scale, signals in ((None, outputs), (2.0, 2 * F.normalize(outputs, dim=1))):
        task = _Task.of(LinearAligner(2), (outputs, labels), classes, scale)
        expected = F.cross_entropy(signals @ classes.T, labels).item()
        assert task.loss(outputs, torch.arange(2)).item() == pytest.approx(expected)
    weight = torch.nn.Parameter(torch.ones(4))
    task = _Task.of(LinearAligner(2), (outputs, labels), classes, None, 0, Schedule(clip=1.0))
    task.step(torch.optim.SGD([weight], lr=1.0), (10 * weight).sum())
    torch.testing.assert_close((1 - weight).norm().detach(), torch.tensor(1.0))


def test_dimensions_from_a_share_of_the_images(encoder, tmp_path):
    data = load_dataset("digits", "train").head(200)
    images = F.interpolate(data.images.float(), 32).byte()
    data = type(data)("digits", "train", images, data.labels, data.classes, data.templates)
    units = extract(encoder, data, root=tmp_path, coordinates="float32", progress=False)
    table = head_dimensions(units, share=0.75, progress=False).set_index(["layer", "head"])
    rows = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:150].sort().values
    samples = units.head_coordinates(1, 2)[rows]
    assert table.loc[(1, 2), "twonn_id"] == pytest.approx(two_nn(samples, precision=torch.float32))
    variances = torch.linalg.eigvalsh(samples.T.cov()).flip(0)
    assert table.loc[(1, 2), "linear_id"] == pca_dimension(variances)
    assert not table.equals(head_dimensions(units, progress=False).set_index(["layer", "head"]))
    with pytest.raises(ValueError, match="share must be in"):
        head_dimensions(units, share=0.0)


def test_class_means_are_directions_of_mean_directions():
    outputs, labels = torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, 1.0]]), torch.tensor([0, 0, 1])
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]])
    torch.testing.assert_close(class_means(outputs, labels), expected)
    with pytest.raises(ValueError, match=r"no image of classes \[2\]"):
        class_means(outputs, labels, 3)


def test_random_images_are_drawn_at_the_size_that_an_encoder_reads():
    values = chapter_defaults(chapter_path("similarity")) | {"others": ["random", "digits"]}
    for reading, name in (("text", "random"), ("code", "random-brightness")):
        given = values | {"reading": reading, "encoders": ["mini-vit", "DINOv2-L", "BLIP-L"]}
        assert other_sets(given) == [name, "digits"]
        noise = {e.encoder: e.size for e in extractions("similarity", given) if e.dataset == name}
        assert (noise["mini-vit"], noise["DINOv2-L"]) == (None, 224)
        assert noise["BLIP-L"] == 384
        assert other_sets(given | {"others": []}).count(name) == 1
    levels = load_dataset("random-brightness", "test").head(100)
    means = torch.stack([levels.images[levels.labels == level].float().mean() for level in range(10)])
    assert means.diff().min() > 20


def test_an_encoder_without_text_is_classified_by_means_of_training_images():
    values = chapter_defaults(chapter_path("selection")) | {"encoders": ["mini-vit"], "tasks": ["shapes-colour"]}
    values["without_text"] = []
    run = Chapter("selection", values | {"images": 100, "reference_images": 130, "dataset": "digits"})
    ((encoder, task),) = run.pairs()
    units, labels = run.task_units(encoder, task)
    outputs = F.normalize(units["train"].outputs(), dim=1)
    means = torch.stack([outputs[labels["train"] == c].mean(0) for c in range(8)])
    torch.testing.assert_close(run.classes(encoder, task), F.normalize(means, dim=1))
