"""What a profile needs from hubs, and whether it is there: refused before any work where it cannot be had."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

from tqdm.auto import tqdm

from edition.inputs import Extraction
from edition.pages import ParameterError
from residual.data.catalogue import catalogue
from residual.data.names import is_at_hand
from residual.encoders.names import needs_no_hub, weights_repo

PATIENCE = 3.0  # seconds for a hub to answer: its clients' own retries take half a minute


def needed(parameters: dict) -> Iterator[tuple[str, str]]:
    """Kind and name of every encoder and data set of a chapter that only a hub has."""
    kinds = dict.fromkeys(("encoders", "controls", "without_text"), "encoder") | dict.fromkeys(
        ("tasks", "others"), "data set"
    )
    for key, kind in kinds.items():
        there = needs_no_hub if kind == "encoder" else is_at_hand
        yield from ((kind, name) for name in parameters.get(key, ()) if not there(name))
    if not is_at_hand(name := parameters.get("dataset", "reference")):
        yield "data set", name


def check_within_reach(profile: str, wanted: Iterable[tuple[str, str]]) -> None:
    """Raises ParameterError, with a list, where something is neither cached nor can be fetched."""
    wanted = dict.fromkeys(wanted)
    if not wanted or not (why := no_network()):
        return
    if missing := [(kind, name) for kind, name in wanted if not is_cached(kind, name)]:
        raise ParameterError(
            f"the profile {profile} needs {len(missing)} downloads, and {why}:\n"
            + "".join(f"  {kind} {name}\n" for kind, name in missing)
            + f"Connect, or run `python -m edition.plan {profile} --download` where there is a network, and set "
            "HF_HOME to the cache that it fills."
        )


def no_network() -> str:
    """Why a hub is not asked; "" where it answers, be it with an error."""
    from huggingface_hub import constants, get_session, is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE is set, so that only the cache is read"
    answers = []

    def ask() -> None:  # in a thread, as looking up a host's address has no time limit
        with contextlib.suppress(Exception):
            answers.append(get_session().head(constants.ENDPOINT, timeout=PATIENCE))

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return "" if answers else f"{constants.ENDPOINT} does not answer"


def is_cached(kind: str, name: str) -> bool:
    """Whether an "encoder" or a "data set" of a hub was downloaded before, whole."""
    return weights_cached(name) if kind == "encoder" else data_cached(name.partition("@")[0])


def data_cached(name: str) -> bool:
    """Whether a set is there as the tables that `datasets` reads from, or as tars."""
    import datasets
    from huggingface_hub import constants

    repo = catalogue()[name].repo if name in catalogue() else name
    tables = Path(datasets.config.HF_DATASETS_CACHE) / repo.replace("/", "___")
    fetched = Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}"
    here = any(tables.glob("**/dataset_info.json")) or any(fetched.glob("snapshots/**/*.tar*"))
    return here and not any((*tables.glob("**/*.incomplete"), *fetched.glob("blobs/*.incomplete")))


def weights_cached(name: str) -> bool:
    from huggingface_hub import constants

    repo = weights_repo(name)
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    return bool(repo) and any(folder.glob("snapshots/*/*"))


def downloads(wanted: Iterable[Extraction], weights: Mapping[str, int | None]) -> dict[str, dict[str, Any]]:
    """What jobs need from a hub: bytes where known, bytes that stay on disk, whether gated, whether cached.

    weights: bytes of encoders. `datasets` keeps a set twice: as it was downloaded, and as the tables that it reads.
    """
    found = {}
    for name in sorted({job.dataset.partition("@")[0] for job in wanted if not is_at_hand(job.dataset)}):
        entry = catalogue().get(name)
        size = int(entry.gigabytes * 1e9) if entry else None
        about = {"bytes": size, "kept": size and 2 * size, "gated": bool(entry and entry.gated)}
        found[name] = about | {"there": data_cached(name)}
    for name in sorted({job.encoder for job in wanted if not needs_no_hub(job.encoder)}):
        found[name] = {"bytes": weights[name], "kept": weights[name], "gated": False, "there": weights_cached(name)}
    return found


def fetch(wanted: list[Extraction]) -> None:
    """Fetch all that jobs need into the caches. Raises RuntimeError with a line for each that could not be fetched."""
    from residual import load_dataset, load_encoder

    items, failed = dict.fromkeys([(j.encoder, "") for j in wanted] + [(j.dataset, j.split) for j in wanted]), {}
    for name, split in tqdm(items, unit="item"):
        try:
            load_dataset(name, split, seed=wanted[0].seed) if split else load_encoder(name)
        except (OSError, ValueError, RuntimeError) as error:
            failed[f"{name}: {error}"] = None
    if failed:
        raise RuntimeError("\n".join(["these could not be fetched; the others are there", *failed]))
