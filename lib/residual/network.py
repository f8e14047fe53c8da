"""Hubs: asked once and briefly whether they answer, before their clients' own retries, which take half a minute."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from threading import Thread
from unittest.mock import patch

from huggingface_hub import constants, get_session, is_offline_mode

PATIENCE = 3.0  # seconds for an answer
AGAIN = 60.0  # seconds after which it is asked anew


def no_network() -> str:
    """Why a hub is not asked; "" where it answers."""
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set, so that only the cache is read"
    if _answers(constants.ENDPOINT, int(time.monotonic() / AGAIN)):
        return ""
    return f"{constants.ENDPOINT} does not answer (HF_HUB_OFFLINE=1 reads the cache without asking it)"


@contextlib.contextmanager
def hub_or_cache() -> Iterator[None]:
    """Within, clients of the hub read their caches at once where it does not answer."""
    if not no_network():
        yield
        return
    from datasets import config

    with patch.object(constants, "HF_HUB_OFFLINE", True), patch.object(config, "HF_HUB_OFFLINE", True):
        yield


@functools.lru_cache(maxsize=1)
def _answers(endpoint: str, minute: int) -> bool:
    """Whether anything answers, be it an error. In a thread, as looking up a host's address has no time limit."""
    answers = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            answers.append(get_session().head(endpoint, timeout=PATIENCE))

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(answers)
