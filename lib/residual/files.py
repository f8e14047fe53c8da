"""Files: written whole or not at all, checked, and locked while in use. For tensors in them, see `residual.tensors`."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

UNWRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
POINTER = b"version https://git-lfs"
SILENCE = 60.0  # seconds in which a run waits for another without a word
log = logging.getLogger(__name__)


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
