"""One GPU to a run, where a machine has several."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def one_gpu(device: str) -> Iterator[None]:
    """Wait for a GPU that no other run of the user holds, and make it the only one, "cuda", for processes started here.

    Does nothing for other devices ("cpu", "cuda:1"), and where only one GPU is visible, as in a cluster job. Call it
    before this process uses CUDA.
    """
    count = _count() if device == "cuda" else 0
    if count < 2:
        yield
        return
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = before.split(",") if before else [str(i) for i in range(count)]
    locks = {name: FileLock(Path(tempfile.gettempdir()) / f"residual-{os.getuid()}-gpu-{name}.lock") for name in names}
    while (free := next((name for name in names if _acquired(locks[name])), None)) is None:
        time.sleep(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = free
    try:
        yield
    finally:
        locks[free].release()
        if before is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _count() -> int:
    import torch  # takes seconds

    return torch.cuda.device_count()


def _acquired(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True
