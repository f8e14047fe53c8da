"""Encodings of texts, computed by whichever chapter comes first and kept for the others."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from edition.pages import project_root
from residual import selection
from residual.encoders.encoder import Encoder
from residual.files import file_name, locked
from residual.tensors import DamagedFileError, cache_key, code_key, read_tensors, write_tensors

PROBES = ["sky", "A photo of 2 grey-blue birds."]  # of two lengths, the shorter of which is padded


def encode_texts(encoder: Encoder, texts: Sequence[str]) -> Float[Tensor, "t d"]:
    """`residual.selection.encode_texts`, with a copy in _build/texts that is read instead of encoding them again.

    The copy's name changes with the texts, the code that encodes, and the encodings of two other texts, which show
    weights, tokenizer and library.
    """
    code = code_key(sys.modules[encoder.text.__module__], selection.encode_texts) if encoder.reads_text else ""
    key = cache_key(code, encoder.encode_text(PROBES), *texts)
    path = project_root() / "_build/texts" / f"{file_name(Path(encoder.name).name, key)}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock"), str(path)):
        try:
            kept = read_tensors(path)[0]["encodings"]
        except (FileNotFoundError, DamagedFileError):
            encodings = selection.encode_texts(encoder, texts)
            write_tensors(path, {"encodings": encodings}, {})
            return encodings
    encoder.check_texts(texts)  # which tells those that were cut
    return kept
