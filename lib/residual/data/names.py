"""The names that data sets and tasks go by. Imports no torch, so that a wrong name is refused at once."""

from __future__ import annotations

from residual.data.hub.catalogue import catalogue, local_folder, readable
from residual.data.miniature.entries import entries

SPLITS = ("train", "validation", "test")
NOISE = {
    "text": "random",
    "code": "random-brightness",
}  # random images as the paper's text and its authors' code have them


def dataset_names() -> tuple[str, ...]:
    """The embedded data sets, in the roles of the paper's fourteen; random images as the text has them."""
    return tuple(name for name in entries() if name != NOISE["code"])


def task_names() -> tuple[str, ...]:
    """All that can be classified: the data sets with more than one class, and "set-factor" for other labels."""
    names = []
    for name, entry in entries().items():
        names += [name] * (name != "random") + [f"{name}-{task}" for task in entry.get("tasks", ())]
    return tuple(names)


def is_embedded(name: str) -> bool:
    """Whether a data set or task needs no hub: an embedded one, or a local folder."""
    return name not in catalogue() and (name in (*entries(), *task_names()) or local_folder(name) is not None)


def split_task(name: str) -> tuple[str, str]:
    """The data set of a task, and the factor that it asks for; "" for the data set's classes.

    Raises ValueError for an unknown name.
    """
    if name not in entries() and readable(name):
        return name, ""
    base, _, task = (name, "", "") if name in entries() else name.rpartition("-")
    if base not in entries() or (task and task not in entries()[base].get("tasks", ())):
        known = ", ".join(dict.fromkeys((*dataset_names(), *task_names(), *catalogue())))
        raise ValueError(f"unknown data set {name!r}; choose from {known}, or give a hub id, 'org/name', or a folder")
    return base, task
