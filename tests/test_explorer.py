"""The page of an encoder holds every head, its words and its pictures."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

from edition.interactive.explorer import explore, head_map, heated, measured_heads, write_explorer
from residual import extract, load_dataset
from residual.extraction import pixels_for
from residual.units import head_tokens
from test_hub import write_webdataset

pytestmark = pytest.mark.usefixtures("own_cache")


def test_every_head_is_on_the_page_with_pictures_and_words(encoder, dataset, tmp_path):
    units = extract(encoder, dataset, root=tmp_path / "units", coordinates="float32", progress=False)
    texts = [f"</script><word {i}>" for i in range(30)]
    encodings = torch.randn(30, encoder.output_dim, generator=torch.Generator().manual_seed(0))
    grid = encoder.layers, encoder.heads
    depth = torch.arange(encoder.layers)[:, None].expand(grid) + 0.5
    found = explore(tmp_path, units, dataset, encoder, texts=texts, encodings=encodings, measures={"depth": depth})
    write_explorer(tmp_path, [found, found | {"name": "other", "place": "other"}])
    listed = json.loads((tmp_path / "encoders.js").read_text().partition(" = ")[2].rstrip(";\n"))
    assert [*listed] == [units.manifest.encoder, "other"]
    script = (tmp_path / listed[units.manifest.encoder]).read_text()
    assert script.startswith(f"explored[{json.dumps(units.manifest.encoder)}] = ")
    shown = json.loads(script.partition(" = ")[2].rstrip(";\n"))
    assert [head["label"] for head in shown["heads"]] == [f"L{i}.H{j}" for i in range(grid[0]) for j in range(grid[1])]
    assert all(len(head["descriptions"]) == 5 and head["descriptions"][0] in texts for head in shown["heads"])
    assert shown["measures"]["depth"] == depth.flatten().tolist()
    first = units.head_pca().explained_variance_ratio[..., 0].flatten().tolist()
    assert shown["measures"]["EVR1: share of the first component"] == pytest.approx(first, abs=1e-4)
    images = [component["image"] for head in shown["heads"] for component in head["components"]]
    assert len(set(images)) == 3 * len(shown["heads"])
    maps = [head["components"][0]["map"] for head in shown["heads"]]
    assert all((tmp_path / name).stat().st_size > 500 for name in [*images, *maps])


def test_a_map_and_the_class_token_add_up_to_the_score(encoder, dataset, tmp_path):
    units = extract(encoder, dataset, root=tmp_path / "units", coordinates="float32", progress=False)
    spectra, images = units.head_pca(), dataset.images[:5]
    scores = -(units.head_outputs(1, 2) - spectra.mean[1, 2]) @ spectra.components[1, 2, 0]  # of the other sign
    tokens = head_tokens(encoder, pixels_for(encoder, images), 1, 2).double()
    first = -(tokens[:, 0] - spectra.mean[1, 2] / tokens.shape[1]) @ spectra.components[1, 2, 0]
    found = head_map(encoder, spectra, (1, 2), images, scores[:5])
    assert found.shape == (5, 4, 4)
    torch.testing.assert_close(found.sum((1, 2)) + first, scores[:5], atol=1e-5, rtol=1e-4)


def test_a_heated_picture_is_orange_where_its_map_is_positive_and_grey_where_it_is_zero():
    images = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    shown = heated(images, torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]))[0]
    assert shown[:, 0, 0].tolist() == [230, 97, 1]
    assert shown[:, 7, 0].tolist() == [94, 60, 153]
    assert shown[:, 0, 7].tolist() == [100, 100, 100]


def test_an_encoder_without_words_has_pictures_only(encoder, dataset, tmp_path):
    units = extract(encoder, dataset, root=tmp_path / "units", coordinates="float32", progress=False)
    heads = explore(tmp_path, units, dataset, encoder)["heads"]
    assert not any(head["descriptions"] for head in heads)
    assert len(heads) == encoder.layers * encoder.heads
    with pytest.raises(ValueError, match="60 images, but units of 70"):
        explore(tmp_path, units, dataset.head(60), encoder)


def test_a_table_of_some_heads_of_some_encoders_is_a_grid_with_gaps():
    table = pd.DataFrame({"model": ["a", "a", "b"], "layer": [0, 1, 0], "head": [1, 0, 0], "z": [0.5, -0.25, 9.0]})
    values = measured_heads(table, "z", "a", (2, 2))
    assert values.nan_to_num(7).tolist() == [[7, 0.5], [-0.25, 7]]


def test_images_of_files_are_shown_as_small_squares(encoder, tmp_path):
    data = load_dataset(write_webdataset(tmp_path / "set"), "test")
    units = extract(encoder, data, root=tmp_path / "units", coordinates="float32", progress=False)
    component = explore(tmp_path / "page", units, data, encoder)["heads"][0]["components"][0]
    assert component["width"] == 590  # six of 96 pixels, and what is between them
    assert "red thing" in component["low"] + component["high"]
