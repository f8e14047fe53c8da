"""Adapters are what Eq. 6 and 7 say, and can be used."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from conftest import page_functions, relative_error, shake
from edition.inputs import task_checksum
from residual import extract, load_encoder, trace
from residual.alignment import (
    KINDS,
    FineTuned,
    LinearAligner,
    ResiDual,
    component_scores,
    parameter_count,
    reference_bases,
)
from residual.data.dataset import Dataset
from residual.data.names import SPLITS
from residual.heads import omp_heads
from residual.units import Unit


@pytest.fixture
def stored(encoder, dataset, tmp_path):
    return extract(encoder, dataset, root=tmp_path, coordinates="float32", batch=32, progress=False)


def test_lin_starts_as_the_identity_and_has_the_published_number_of_parameters():
    outputs, aligner = torch.randn(5, 16), LinearAligner(16)
    assert aligner(outputs).equal(outputs)
    for dimension, count in ((256, 65_792), (512, 262_656), (768, 590_592)):
        assert parameter_count(LinearAligner(dimension)) == count


class Naive(torch.nn.Module):
    """Eq. 6 and 7 as they stand: every unit is centred, rotated, scaled and rotated back."""

    def __init__(self, bases):
        super().__init__()
        self.bases, self.lambdas = bases, torch.nn.Parameter(torch.ones(bases.lambda_count))

    def forward(self, units):
        bases, total = self.bases, 0
        for index, unit in enumerate(bases.units):
            rows = (bases.unit_index == index).nonzero()[:, 0]
            phi, mean = bases.components[rows], bases.means[index]
            unit = units.output if unit == Unit("Y") else units[str(unit)]
            if bases.kind == "O":
                total = total + self.lambdas[index] * unit
            else:
                total = total + (phi.T @ torch.diag(self.lambdas[rows]) @ phi @ (unit - mean).T).T
        return total + units["X0"] if bases.kind == "RD" else total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["openclip", "openclip-scaled", "blip", "clip", "dinov2"])
def test_outputs_and_gradients_are_those_of_the_naive_module(small, dataset, tmp_path, kind, family):
    encoder = small(family)
    stored = extract(encoder, dataset, root=tmp_path, coordinates="float32", batch=32, progress=False)
    bases = reference_bases(stored, kind)
    fast, naive = ResiDual(bases), Naive(bases)
    lambdas = torch.rand(bases.lambda_count, generator=torch.Generator().manual_seed(1)) * 2
    labels = torch.arange(70) % 3
    results = []
    for module, inputs in ((fast, component_scores(stored, bases)), (naive, trace(encoder, dataset.images))):
        module.lambdas.data = lambdas.clone()
        output = module(inputs)
        torch.nn.functional.cross_entropy(output[:, :3], labels).backward()
        results.append((output.detach(), module.lambdas.grad))
    assert relative_error(results[0][0], results[1][0]) < 2e-5
    assert relative_error(results[0][1], results[1][1]) < 2e-4


def test_what_is_trained_is_what_the_paper_counts(stored, encoder):
    layers, heads, own, d = encoder.layers, encoder.heads, encoder.head_width, encoder.output_dim
    counts = {kind: parameter_count(ResiDual(reference_bases(stored, kind))) for kind in KINDS}
    assert counts["RD"] == layers * heads * min(own, d) + layers * d
    assert counts["RD_Y"] == d
    assert counts["O"] == layers * heads
    assert layers * heads <= counts["RD*"] < layers * heads * own
    spectra, bases = stored.head_pca(), reference_bases(stored, "RD*")
    for index, unit in enumerate(bases.units):
        kept = int((bases.unit_index == index).sum())
        shares = spectra.explained_variance_ratio[unit.layer, unit.head].cumsum(0)
        assert shares[kept - 1] >= 0.9 - 1e-9
        assert kept == 1 or shares[kept - 2] < 0.9


def test_a_head_that_does_not_vary_has_no_components_and_no_sentences(encoder, dataset, tmp_path):
    constant = replace(dataset, images=torch.full_like(dataset.images, 100))
    constant.images[:20] = dataset.images[:20]
    for name, data, varies in (("some", constant, True), ("none", constant._take(torch.arange(20, 70)), False)):
        stored = extract(encoder, data, root=tmp_path / name, coordinates="float32", batch=32, progress=False)
        said = omp_heads(stored, torch.randn(9, encoder.output_dim), 3).indices
        assert (said >= 0).any().item() == varies
        if varies:
            assert len(reference_bases(stored, "RD*").components)
        else:
            with pytest.raises(ValueError, match=r"no unit of .* varies on noise"):
                reference_bases(stored, "RD*")


def test_a_head_wider_than_the_output_keeps_all_its_components(folders, dataset, tmp_path):
    config = json.loads((folders / "openclip/open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 8
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide/open_clip_config.json").write_text(json.dumps(config))
    encoder = shake(load_encoder(str(tmp_path / "wide"), pretrained=False))
    stored = extract(encoder, dataset, root=tmp_path, coordinates="float32", progress=False)
    bases = reference_bases(stored, "RD")
    assert encoder.head_width == 12
    assert parameter_count(ResiDual(bases)) == encoder.layers * encoder.heads * 8 + encoder.layers * 8
    stored_units = ResiDual(bases)(component_scores(stored, bases)) + bases.means.sum(0)
    assert relative_error(stored_units.detach(), stored.outputs()) < 1e-5  # nothing is left out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "linear"),
    [
        ("OpenCLIP-B", 15_360, 262_656), ("CLIP-B", 15_360, 262_656), ("BLIP-L", 30_720, 65_792),
        ("CLIP-L", 43_008, 590_592), ("OpenCLIP-L", 43_008, 590_592),
    ],
)  # fmt: skip
def test_published_parameter_counts(tmp_path, name, count, linear):
    encoder = load_encoder(name, pretrained=False)
    side = encoder.tower.image_size
    images = torch.randint(0, 256, (4, 3, *side), dtype=torch.uint8)
    data = Dataset("noise", "train", images, torch.arange(4) % 2, ("a", "b"), ("{}",))
    stored = extract(encoder, data, root=tmp_path, batch=4, progress=False)
    assert parameter_count(ResiDual(reference_bases(stored, "RD"))) == count
    assert parameter_count(ResiDual(reference_bases(stored, "RD_Y"))) == encoder.output_dim
    assert parameter_count(LinearAligner(encoder.output_dim)) == linear


@pytest.mark.parametrize("kind", KINDS)
def test_an_attached_adapter_predicts_as_in_training_before_and_after_a_file(stored, encoder, dataset, tmp_path, kind):
    adapter = ResiDual(reference_bases(stored, kind))
    adapter.lambdas.data = torch.rand(adapter.lambdas.shape, generator=torch.Generator().manual_seed(2)) * 2
    expected = adapter(component_scores(stored, adapter.bases)).detach()
    adapter.save(tmp_path / "adapter.safetensors", task="noise")
    loaded = ResiDual.load(tmp_path / "adapter.safetensors")
    assert loaded.bases.provenance["task"] == "noise"
    assert loaded.bases.provenance["encoder"] == encoder.name
    for own in (adapter, loaded):
        aligned = own.attach(encoder)
        assert relative_error(aligned.encode_image(dataset.images), expected) < 1e-5
    assert trace(aligned, dataset.images).total().allclose(encoder.encode_image(dataset.images), atol=1e-4)
    with pytest.raises(TypeError, match="take the encoder it was attached to"):
        FineTuned(aligned)


def test_an_adapter_is_refused_by_another_encoder_and_a_damaged_file(stored, encoder, small, dataset, tmp_path):
    adapter = ResiDual(bases := reference_bases(stored))
    other = small("openclip", seed=1)
    with pytest.raises(ValueError, match="other weights"):
        adapter.attach(other)
    theirs = extract(other, dataset, root=tmp_path / "other", coordinates="float32", progress=False)
    with pytest.raises(ValueError, match="their weights differ"):
        component_scores(theirs, bases)
    with pytest.raises(ValueError, match="kind must be one of"):
        reference_bases(stored, "RDY")
    path = tmp_path / "a.safetensors"
    adapter.save(path)
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            ResiDual.load(path)


def test_the_rate_that_the_first_seed_found_trains_the_others():
    given = []

    def trained(aligner, encoder, inputs, labels, words, turn, rate):
        given.append((turn, rate))
        return None, 0.5, 10, 3, 0.25, 1.0  # hits, validation, parameters, epochs, rate, seconds

    values = {
        "run": SimpleNamespace(task_units=lambda *_: ({}, {})), "seed": 0, "seeds": 3, "trained": trained,
        "classes": {("a", "task"): None}, "bases_of": lambda *_: None, "untrained": lambda encoder, bases, turn: turn,
    }  # fmt: skip
    encoder, page = SimpleNamespace(name="a"), page_functions("alignment", "trainings", **values)
    assert [aligner for aligner, *_ in page["trainings"](encoder, "task", "RD")] == [0, 1, 2]
    assert given == [(0, None), (1, 0.25), (2, 0.25)]


def test_measured_fine_tuning_counts_only_for_the_same_weights_and_images(dataset):
    run = SimpleNamespace(data=lambda *_: dataset, task_units=lambda *_: ({}, dict.fromkeys(SPLITS, dataset.labels)))
    data = task_checksum(dict.fromkeys(SPLITS, (dataset, dataset.labels)))
    columns = ["model", "dataset", "weights", "data", "schedule", "validation"]
    rows = [
        ("a", "digits", "w", data, "search", 0.5), ("a", "digits", "w", data, "cosine", 0.7),
        ("a", "digits", "other", data, "search", 0.9), ("a", "digits", "w", "other", "search", 0.9),
        ("b", "digits", "w", data, "search", 0.9),
    ]  # fmt: skip
    values = {"run": run, "stored": pd.DataFrame(rows, columns=columns), "weights": {"a": "w"}, "asked": []}
    encoder, page = SimpleNamespace(name="a"), page_functions("alignment", "same", "pictures", reading="text", **values)
    assert page["same"](encoder, "digits")["validation"].tolist() == [0.7]  # the better of two schedules
    page["reading"] = "code"
    assert page["same"](encoder, "digits").empty
