"""What an import costs and brings in, and what cache keys depend on."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from residual.tensors import cache_key

HEAVY = {"transformers", "open_clip", "datasets", "sklearn", "skimage", "matplotlib", "pandas"}


def loaded(statement: str) -> set[str]:
    """Top-level modules that a statement brings into a fresh process."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import residual", HEAVY | {"torch", "numpy"}),
        ("import residual.spectrum, residual.dimension, residual.pursuit", HEAVY | {"safetensors", "PIL", "pydantic"}),
        ("from residual import load_encoder, trace", HEAVY),
        ("from residual import load_dataset; load_dataset('digits', 'test')", HEAVY - {"sklearn", "pandas"}),
        ("from residual import load_encoder; load_encoder('mini-vit')", {"open_clip", "datasets"}),
        ("from residual import extract, load_units", HEAVY),
        ("import edition.pages, residual.files, residual.encoders.names, miniature", HEAVY | {"torch"}),
        ("import edition.inputs, edition.build", HEAVY | {"torch"}),
        ("import edition.run", HEAVY - {"pandas"} | {"torch"}),
        ("import edition.chapter", {"torch", "transformers", "open_clip", "datasets"}),
    ],
)
def test_an_import_brings_in_only_what_it_needs(statement, absent):
    assert not loaded(statement) & absent


def test_public_names_are_all_there():
    import residual

    assert {"extract", "load_dataset", "load_encoder", "load_units", "trace"} <= set(residual.__all__)
    assert all(getattr(residual, name) is not None for name in residual.__all__)


def test_a_cache_key_changes_with_every_fact():
    assert len({cache_key(1, "a"), cache_key(2, "a"), cache_key(1, "b"), cache_key(1, "a", None)}) == 4
    assert cache_key(1, 23) != cache_key(12, 3)
    assert cache_key(torch.zeros(2, 3)) != cache_key(torch.zeros(3, 2))


def test_an_installed_source_brings_encoders_data_sets_and_words():
    from residual.sources import drawn_sets, encoder_folders, sources

    assert "mini-clip" in encoder_folders()
    assert encoder_folders()["mini-clip"].is_dir()
    assert {"shapes", "reference"} <= set(drawn_sets())
    assert len(list(sources()[0].descriptions())) > 1000
