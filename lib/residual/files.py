"""Files: written whole or not at all, checked when read, locked while in use, and named after what they depend on."""

from __future__ import annotations

import errno
import functools
import hashlib
import inspect
import io
import logging
import os
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from residual.code import without_docstrings

UNWRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
POINTER = b"version https://git-lfs"
SILENCE = 60.0  # seconds in which a run waits for another without a word
log = logging.getLogger(__name__)


class DamagedFileError(ValueError):
    """A file cannot be read, or does not have the checksum that it was written with."""


def cache_folder() -> Path:
    """Where data sets and weights are kept: $RESIDUAL_CACHE, or `residual` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "residual"
    return Path(os.environ.get("RESIDUAL_CACHE") or default).expanduser()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which is renamed to `path` if the block succeeds.

    Raises OSError, with the old file in place, when the disk is full.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            reason = f"no room for {path.name}; earlier results are kept: free some space and run again"
            raise OSError(error.errno, reason, str(path)) from error
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; errors as `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(data)


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


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write nested dictionaries of tensors and numbers, behind their checksum."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path, hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())


def read_state(path: Path) -> dict[str, Any] | None:
    """What `write_state` wrote; None, with a warning, where the file is damaged, and None where there is none."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        log.warning("%s is damaged; starting over", path)
        return None
    return torch.load(io.BytesIO(data[32:]), map_location="cpu", weights_only=True)


def is_pointer(path: Path) -> bool:
    """Whether a file is what git-LFS leaves in the place of one that it has not fetched."""
    if not path.is_file() or path.stat().st_size >= 1024:  # by its specification, it is smaller
        return False
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def pointer_fault(path: Path) -> str:
    """What is wrong with a file that git-LFS has not fetched, and what to do."""
    return f"{path} is a pointer of git-LFS, not the file; run `git lfs pull` in {path.parent}, or download it"


def checksum(path: Path) -> str | None:
    """SHA-256 of a file; None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


@functools.cache
def code_key(*code: ModuleType | Callable[..., Any]) -> str:
    """A cache key of modules, classes and functions that changes with what they do, not with docstrings or comments."""
    return cache_key(*(without_docstrings(textwrap.dedent(inspect.getsource(part))) for part in code))


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Allow one run at a time on `what`. The lock is released when its process ends, however it ends.

    A wait is told after a minute: chapters that run side by side often wait for each other's seconds.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=SILENCE)
    except Timeout:
        log.warning("another run is using %s; waiting for it", what)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def file_name(*parts: str) -> str:
    """One name out of several, without characters that stand for folders or drives."""
    return "--".join(part.replace(":", "_").replace("/", "_") for part in parts)
