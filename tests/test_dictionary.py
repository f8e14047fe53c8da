"""The embedded dictionary, and others read by path or address only if they are what they should be."""

from __future__ import annotations

import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from residual.data.descriptions import load_dictionary

TEXT = "An image of a dog\n\nA blue sky\nAn image of a dog\n  Día de los Muertos  \n"
SUM = hashlib.sha256(TEXT.encode()).hexdigest()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "général descriptions.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture
def address(tmp_path, monkeypatch):
    monkeypatch.setenv("RESIDUAL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "www").mkdir()
    (tmp_path / "www/texts.txt").write_bytes(TEXT.encode())

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "www")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/texts.txt"
        server.shutdown()


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
    assert load_dictionary(file) == load_dictionary(str(file), sha256=SUM.upper()) == expected


def test_an_address_is_fetched_once_and_checked(address, tmp_path):
    assert load_dictionary(address, sha256=SUM)[1] == "A blue sky"
    (tmp_path / "www/texts.txt").unlink()
    assert load_dictionary(address, sha256=SUM)[1] == "A blue sky"  # what was fetched is kept


def test_what_is_not_what_it_should_be_is_refused(file, address, tmp_path):
    with pytest.raises(ValueError, match="has SHA-256"):
        load_dictionary(file, sha256="0" * 64)
    with pytest.raises(ValueError, match="does not match"):
        load_dictionary(address, sha256="0" * 64)
    with pytest.raises(ValueError, match="give the sha256"):
        load_dictionary(address)
    with pytest.raises(FileNotFoundError, match="no dictionary at"):
        load_dictionary(tmp_path / "none.txt")
    with pytest.raises(ConnectionError, match="local copy"):
        load_dictionary("http://127.0.0.1:9/none.txt", sha256=SUM)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_dictionary(file)
    file.write_text("\n \n")
    with pytest.raises(ValueError, match="no description"):
        load_dictionary(file)
