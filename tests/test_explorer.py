"""The page of an encoder holds every head, its words and its pictures."""

from __future__ import annotations

import re

import pytest
import torch

from edition.explorer import write_explorer
from residual import extract, load_dataset
from test_hub import write_webdataset

pytestmark = pytest.mark.usefixtures("own_cache")


def test_every_head_is_on_the_page_with_pictures_and_words(encoder, dataset, tmp_path):
    units = extract(encoder, dataset, root=tmp_path / "units", coordinates="float32", progress=False)
    texts = [f"<word {i}>" for i in range(30)]
    encodings = torch.randn(30, encoder.output_dim, generator=torch.Generator().manual_seed(0))
    page = write_explorer(tmp_path / "page", units, dataset, texts=texts, encodings=encodings).read_text()
    heads = re.findall(r'<article id="(L\d\.H\d)" data-words=" (l\d\.h\d word \d+ [^"]* a[^"]*)"', page)
    assert len(heads) == encoder.layers * encoder.heads
    assert "&lt;word" in page
    assert "<word" not in page
    images = re.findall(r'<img[^>]*src="([^"]+)"', page)
    assert len(images) == 3 * len(heads)
    assert all((tmp_path / "page" / name).stat().st_size > 500 for name in images)


def test_an_encoder_without_words_has_pictures_only(encoder, dataset, tmp_path):
    units = extract(encoder, dataset, root=tmp_path / "units", coordinates="float32", progress=False)
    page = write_explorer(tmp_path / "page", units, dataset).read_text()
    assert "<ol>" not in page
    assert page.count("<article") == encoder.layers * encoder.heads
    with pytest.raises(ValueError, match="60 images, but units of 70"):
        write_explorer(tmp_path / "page", units, dataset.head(60))


def test_images_of_files_are_shown_as_small_squares(encoder, tmp_path):
    data = load_dataset(write_webdataset(tmp_path / "set"), "test")
    units = extract(encoder, data, root=tmp_path / "units", coordinates="float32", progress=False)
    page = write_explorer(tmp_path / "page", units, data).read_text()
    assert 'width="590"' in page  # six of 96 pixels, and what is between them
    assert "red thing" in page
