"""On a GPU: `pytest -m cuda`. Skipped where there is none; `benchmarks/gpu.py` measures speed there."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from conftest import FAMILIES, pixels_of, relative_error
from miniature.emoji import load_artwork
from miniature.scenes import render_scenes, sample_scenes
from residual import extract, load_dataset, load_encoder, trace
from residual.alignment import FineTuned, LinearAligner, ResiDual, component_scores, fit, reference_bases
from residual.data.dataset import Dataset
from residual.dimension import two_nn
from residual.encoders.names import PAPER, SHIPPED, has_shipped_weights
from residual.heads import head_dimensions, omp_heads, somp_head, textspan_heads
from residual.pursuit import omp, somp, textspan
from residual.selection import class_encodings, encode_images
from residual.units import head_tokens

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"
ROOM = 5e8  # bytes on the card, in which a batch of 96 images does not fit
PRECISIONS = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}  # largest relative error, of each format's rounding


def check_identity(encoder, precision):
    """Units sum to the output, which is the model's own."""
    side = min(224, encoder.tower.image_size[0]) if encoder.tower.smallest else encoder.tower.image_size[0]
    pixels = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    units = trace(encoder, pixels)
    assert units.output.device.type == DEVICE
    assert relative_error(units.total(), units.output) < PRECISIONS[precision]
    assert relative_error(units.output, encoder.encode_image(pixels).to(units.output)) < PRECISIONS[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [name for name in PAPER if name != "DINOv2-S"])
def test_units_of_the_papers_encoders_sum_to_their_output(name, precision):
    with torch.device(DEVICE):  # drawing the weights of a large encoder on the CPU takes seconds
        encoder = load_encoder(name, pretrained=False, device=DEVICE, dtype=getattr(torch, precision))
    for parameter in encoder.model.parameters():
        if parameter.ndim == 1:
            parameter += 0.3 * torch.randn_like(parameter)
    check_identity(encoder, precision)


@pytest.mark.skipif(not has_shipped_weights(), reason="the package with the weights is not installed")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_units_of_real_weights_sum_to_their_output(precision):
    check_identity(load_encoder(SHIPPED, device=DEVICE, dtype=getattr(torch, precision)), precision)


def _moved(encoder):
    return encoder.with_model(encoder.model.to(DEVICE))


@pytest.mark.parametrize("kind", FAMILIES)
def test_units_are_those_of_the_cpu(small, kind):
    on_cpu, on_gpu = small(kind), _moved(small(kind))
    pixels = pixels_of(on_cpu, 5)
    a, b = trace(on_cpu, pixels), trace(on_gpu, pixels)
    for name in ("head_coordinates", "blocks", "output"):
        assert relative_error(getattr(b, name).cpu(), getattr(a, name)) < 1e-4
    assert relative_error(head_tokens(on_gpu, pixels, 1, 2).cpu(), head_tokens(on_cpu, pixels, 1, 2)) < 1e-4


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """An embedded encoder's units of 600 images, extracted on the CPU and on the GPU."""
    root = tmp_path_factory.mktemp("units")
    data = load_dataset("emoji-food", "validation").head(600)
    options = {"coordinates": "float32", "progress": False}
    devices = {"cpu": "cpu", "gpu": DEVICE}
    encoders = {where: load_encoder("mini-openclip", device=device) for where, device in devices.items()}
    return data, {where: extract(encoders[where], data, root=root / where, **options) for where in devices}


def test_an_extraction_is_that_of_the_cpu_to_rounding(stored):
    _, units = stored
    assert relative_error(units["gpu"].outputs(), units["cpu"].outputs()) < 1e-5
    for name in ("mean", "scatter"):
        moments = [getattr(units[where].head_moments, name) for where in units]
        assert relative_error(moments[1], moments[0]) < 1e-5
    eigenvalues = [units[where].head_pca().eigenvalues for where in units]
    assert relative_error(eigenvalues[1], eigenvalues[0]) < 1e-5


def test_dimensions_are_those_of_the_cpu(stored):
    _, units = stored
    samples = units["cpu"].head_coordinates(5, 2)
    assert two_nn(samples.to(DEVICE)) == pytest.approx(two_nn(samples), rel=1e-9)
    on_gpu = head_dimensions(units["cpu"], device=DEVICE, progress=False)
    tables = on_gpu, head_dimensions(units["gpu"], progress=False)
    assert (tables[0]["linear_id"] == tables[1]["linear_id"]).mean() > 0.95
    assert (tables[0]["twonn_id"] / tables[1]["twonn_id"] - 1).abs().max() < 0.02


def test_pursuits_choose_the_same_texts(stored):
    data, units = stored
    encoder = load_encoder("mini-openclip", device=DEVICE)
    words = class_encodings(encoder, data)
    samples = units["cpu"].head_outputs(5, 2)
    samples = samples - samples.mean(0)
    for pursue, x in ((textspan, samples), (somp, samples), (omp, samples[0])):
        on_cpu, on_gpu = pursue(x, words.to(x), 5), pursue(x.to(DEVICE), words.to(x).to(DEVICE), 5)
        assert on_gpu.indices.device.type == DEVICE
        assert on_gpu.indices.cpu().equal(on_cpu.indices)
    for sweep in (textspan_heads, omp_heads):
        assert sweep(units["cpu"], words, 3).indices.equal(sweep(units["gpu"], words, 3).indices)
    assert somp_head(units["cpu"], 5, 2, words, 3).indices.equal(somp_head(units["gpu"], 5, 2, words, 3).indices)


def test_aligners_train_on_the_device_as_on_the_cpu(stored):
    data, units = stored
    classes = class_encodings(load_encoder("mini-openclip"), data)
    inputs, labels = units["cpu"].outputs(), data.labels
    bases = reference_bases(units["cpu"], "RD")
    scores = component_scores(units["cpu"], bases)
    for build, values in ((lambda: LinearAligner(inputs.shape[1]), inputs), (lambda: ResiDual(bases), scores)):
        train, validation = (values[:500], labels[:500]), (values[500:], labels[500:])
        results = [fit(build().to(device), train, validation, classes, rate=1e-2) for device in ("cpu", DEVICE)]
        assert results[1].accuracy == pytest.approx(results[0].accuracy, abs=0.05)


def test_fine_tuning_runs_on_the_device(stored):
    data, _ = stored
    encoder = load_encoder("mini-openclip", device=DEVICE)
    classes, aligner = class_encodings(encoder, data), FineTuned(encoder)
    train, validation = (data.images[:500], data.labels[:500]), (data.images[500:], data.labels[500:])
    before = fit_accuracy(encoder, data, classes)
    fit(aligner, train, validation, classes, rate=1e-4)
    assert next(aligner.parameters()).device.type == DEVICE
    assert fit_accuracy(aligner.encoder, data, classes) > before


def fit_accuracy(encoder, data, classes):
    outputs = encode_images(encoder, dataclasses.replace(data, images=data.images[:500], labels=data.labels[:500]))
    return ((outputs @ classes.T).argmax(1) == data.labels[:500]).float().mean().item()


def test_batches_are_halved_when_the_card_is_full(tmp_path, caplog):
    encoder = load_encoder("OpenCLIP-B", pretrained=False, device=DEVICE)
    images = torch.randint(256, (96, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Dataset("noise", "train", images, torch.arange(96) % 2, ("a", "b"), ("{}",))
    whole = extract(encoder, data, root=tmp_path / "whole", coordinates="float32", batch=24, progress=False)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + ROOM) / total)
    try:
        with caplog.at_level(logging.WARNING):
            halved = extract(encoder, data, root=tmp_path / "few", coordinates="float32", batch=96, progress=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory; continuing with batches of 48" in caplog.text
    assert relative_error(halved.outputs(), whole.outputs()) < 1e-5


def test_scenes_are_those_of_the_cpu():
    sprites = load_artwork().sprites[:200]
    draws = sample_scenes(200, torch.Generator().manual_seed(0))
    on_cpu, on_gpu = (render_scenes(draws.to(device), sprites.to(device)).images for device in ("cpu", DEVICE))
    gap = (on_gpu.cpu().int() - on_cpu.int()).abs()
    assert (gap <= 1).float().mean() > 0.999
