"""Texts are encoded once for all chapters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edition.texts import encode_texts
from residual import selection

TEXTS = ["a red circle", "a blue one", "a flag of somewhere far away"]


def counted(encoder):
    """The same encoder, and a list of the texts that it encodes from now on."""
    seen = []

    def text(model, texts):
        seen.extend(texts)
        return encoder.text(model, texts)

    return replace(encoder, text=text), seen


def test_kept_encodings_are_read_in_place_of_encoding_again(inside, small):
    encoder, seen = counted(small("openclip"))
    first = encode_texts(encoder, TEXTS)
    assert [text for text in seen if text in TEXTS] == TEXTS
    assert first.equal(selection.encode_texts(encoder, TEXTS))
    seen.clear()
    assert encode_texts(encoder, TEXTS).equal(first)
    assert not set(seen) & set(TEXTS)


def test_other_texts_and_other_weights_have_encodings_of_their_own(inside, small):
    encoder = small("openclip")
    first = encode_texts(encoder, TEXTS)
    assert encode_texts(encoder, TEXTS[::-1]).equal(selection.encode_texts(encoder, TEXTS[::-1]))
    encoder.model.token_embedding.weight.data[:, 0] += 1
    again = encode_texts(encoder, TEXTS)
    assert again.equal(selection.encode_texts(encoder, TEXTS))
    assert not torch.allclose(again, first)


def test_a_damaged_file_is_made_again(inside, small):
    encoder = small("openclip")
    first = encode_texts(encoder, TEXTS)
    (path,) = inside.glob("_build/texts/*.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    assert encode_texts(encoder, TEXTS).equal(first)


def test_texts_that_are_cut_are_told_each_time(inside, small, caplog):
    encoder = small("openclip")
    for _ in range(2):
        caplog.clear()
        encode_texts(encoder, ["word " * 200, "a red circle"])
        assert caplog.text.count("1 of 2 texts have more tokens than it reads, and are cut") == 1
    with pytest.raises(ValueError, match="no text tower"):
        encode_texts(small("dinov2"), TEXTS)
