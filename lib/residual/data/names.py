"""The names that data sets and tasks go by. Imports no torch, so that a wrong name is refused at once."""

from __future__ import annotations

from residual.data.catalogue import catalogue, local_folder, readable
from residual.sources import drawn_sets

SPLITS = ("train", "validation", "test")


def dataset_names() -> tuple[str, ...]:
    """The data sets of installed sources."""
    return tuple(drawn_sets())


def task_names() -> tuple[str, ...]:
    """All that can be classified: those data sets, and "set-factor" for other labels of the same images."""
    tasks = {name: source.tasks[name] for name, source in drawn_sets().items()}
    return tuple(full for name, factors in tasks.items() for full in (name, *(f"{name}-{f}" for f in factors)))


def is_at_hand(name: str) -> bool:
    """Whether a data set or task needs no hub: one of an installed source, or a local folder."""
    return name not in catalogue() and (name in task_names() or local_folder(name) is not None)


def split_task(name: str) -> tuple[str, str]:
    """The data set of a task, and the factor that it asks for; "" for the data set's classes.

    Raises ValueError for an unknown name.
    """
    if name in drawn_sets() or readable(name):
        return name, ""
    if name in task_names():
        base, _, factor = name.rpartition("-")
        return base, factor
    if name.startswith(("/", ".", "~")):
        raise ValueError(f"unknown data set {name!r}: there is no such folder")
    known = ", ".join((*task_names(), *catalogue()))
    raise ValueError(f"unknown data set {name!r}; choose from {known}, or give a hub id, 'org/name', or a folder")
