"""Tensors in files, written whole and checked when read; and keys that change with all that a result depends on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from residual.files import write_bytes


class DamagedFileError(ValueError):
    """A file cannot be read, or does not have the checksum that it was written with."""


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write a safetensors file whole or not at all; returns its SHA-256. Metadata, if any, also gets the tensors'."""
    data = save(tensors, None if metadata is None else metadata | {"sha256": tensors_checksum(tensors)})
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata that `write_tensors` wrote. Raises DamagedFileError."""
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        if metadata["sha256"] != tensors_checksum(tensors):
            raise DamagedFileError(f"{path} has the wrong checksum")
    except (SafetensorError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{path} cannot be read: {error}") from error
    return tensors, metadata


def tensors_checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors and their names, in any order."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def tensor_bytes(value: Tensor) -> memoryview:
    """The bytes of a tensor of any type and device."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def cache_key(*facts: object) -> str:
    """Twelve hex digits that change with any of the facts: tensors, strings, numbers and tuples of them."""
    digest = hashlib.sha256()
    for fact in facts:
        is_tensor = isinstance(fact, Tensor)
        data = tensor_bytes(fact) if is_tensor else repr(fact).encode()
        digest.update(f"{(fact.dtype, fact.shape) if is_tensor else ''} {len(data)};".encode())
        digest.update(data)
    return digest.hexdigest()[:12]
