"""What installed packages add to the names of encoders, data sets and dictionaries.

A package names a `Source` in its entry points, group `residual.sources`; this one's own is `miniature`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Source:
    """Encoders, data sets and descriptions of one package. Named without importing torch.

    encoders: name -> a folder that open_clip or transformers wrote. tasks: data set -> the factors that can be asked
    for in place of its classes. load: (data set, factor or "", split, seed=..., size=..., count=...) -> a Dataset.
    descriptions: of images, for `load_dictionary`.
    """

    encoders: Mapping[str, Path]
    tasks: Mapping[str, tuple[str, ...]]
    load: Callable[..., Any]
    descriptions: Callable[[], Iterable[str]]


@functools.cache
def sources() -> tuple[Source, ...]:
    """All sources, in the order of their names."""
    return tuple(point.load() for point in sorted(entry_points(group="residual.sources"), key=lambda point: point.name))


@functools.cache
def encoder_folders() -> dict[str, Path]:
    """The folders of all sources' encoders, by name."""
    return {name: folder for source in sources() for name, folder in source.encoders.items()}


@functools.cache
def drawn_sets() -> dict[str, Source]:
    """The source of each data set that needs no hub."""
    return {name: source for source in sources() for name in source.tasks}
