"""A small world that needs no network: drawn data sets, encoders trained on them, and the words to describe both."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from residual.sources import Source

NOISE = {"text": "random", "code": "random-brightness"}  # random images as the paper and its authors' code have them
ENCODERS = ("mini-openclip", "mini-clip", "mini-blip", "mini-dinov2", "mini-vit")
JOINED = ("dinov2-minilm",)  # from a tower and a reader of packages, by maps of this project
WEIGHTS = Path(__file__).parent / "encoders"


@functools.cache
def captioned() -> frozenset[str]:
    """The data sets whose training splits have captions for the maps of JOINED encoders."""
    return frozenset(yaml.safe_load((Path(__file__).parent / "training/joining.yml").read_text())["worlds"])


@functools.cache
def entries() -> dict[str, dict[str, Any]]:
    """The drawn data sets by name, from sets.yml: the fields of `miniature.sets.Entry` but for how they are built."""
    return yaml.safe_load(Path(__file__).with_name("sets.yml").read_text())["sets"]


def counts(name: str) -> dict[str, int] | None:
    """Images of each split of a drawn set, at most; None for others."""
    if name not in entries():
        return None
    return {"train": entries()[name].get("train", 4_000), "validation": 1_000, "test": 2_000}


def fourteen() -> tuple[str, ...]:
    """The data sets in the roles of the paper's fourteen, random images as its text has them."""
    return tuple(name for name in entries() if name != NOISE["code"])


def _load(*arguments: object, **options: object) -> object:
    return import_module("miniature.sets").load(*arguments, **options)


def _descriptions() -> Iterator[str]:
    return import_module("miniature.descriptions").compose()


SOURCE = Source(
    encoders={name: WEIGHTS / name for name in (*ENCODERS, *JOINED)},
    tasks={name: tuple(entry.get("tasks", ())) for name, entry in entries().items()},
    load=_load,
    descriptions=_descriptions,
)
