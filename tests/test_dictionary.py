"""The embedded dictionary, and others read only if they are what they should be."""

from __future__ import annotations

import pytest

from residual.data.descriptions import load_dictionary

TEXT = "An image of a dog\n\nA blue sky\nAn image of a dog\n  Día de los Muertos  \n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "général descriptions.txt"
    path.write_bytes(TEXT.encode())
    return path


def test_the_embedded_dictionary_is_large_varied_and_always_the_same():
    words = load_dictionary()
    assert len(words) == len(set(words)) >= 1500
    assert words == load_dictionary()
    assert all(word == word.strip() and "_" not in word for word in words)
    expected = {
        "a red circle", "something made of wood", "a picture of a beach", "winter scenery", "tiger", "three animals",
        "the letter Q", "the number 7", "a happy face", "a line drawing", "a picture of a construction site",
    }  # fmt: skip
    assert expected <= set(words)


def test_a_file_is_read_line_by_line(file):
    expected = ("An image of a dog", "A blue sky", "Día de los Muertos")
    assert load_dictionary(file) == load_dictionary(str(file)) == expected


def test_what_is_not_what_it_should_be_is_refused(file, tmp_path):
    with pytest.raises(FileNotFoundError, match="no dictionary at"):
        load_dictionary(tmp_path / "none.txt")
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_dictionary(file)
    file.write_text("\n \n")
    with pytest.raises(ValueError, match="no description"):
        load_dictionary(file)
