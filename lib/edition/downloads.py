"""What lies in the caches of the hub's clients."""

from __future__ import annotations

from pathlib import Path

from residual.data.hub.catalogue import catalogue
from residual.encoders.names import weights_repo


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
