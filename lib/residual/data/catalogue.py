"""The paper's data sets as far as they are known before a download, from catalogue.yml, and names of others."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

HELD_OUT = 0.1  # of an official training split, for validation where there is none
SHARES = (0.6, 0.8)  # of a set that is not divided: where training images end, and validation images


class HubSet(BaseModel):
    """What is known about a data set; catalogue.yml explains the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    repo: str
    published: str
    classes: int
    train: int
    test: int
    gigabytes: float
    licence: str
    cite: str
    limit: int | None = None
    gated: bool = False
    held_out: float = HELD_OUT
    shares: tuple[float, float] = SHARES
    names: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None

    def prompts(self) -> tuple[str, ...] | None:
        """The templates with all alternatives written out; None where the set's own are the paper's."""
        return self.templates and tuple(prompt for template in self.templates for prompt in _alternatives(template))

    def counts(self) -> dict[str, int]:
        """Images of each split, as `read_split` divides them."""
        if not (self.train and self.test):
            whole = self.train + self.test
            return {split: int(high * whole) - int(low * whole) for split, (low, high) in bounds(self.shares).items()}
        held = int(self.held_out * self.train)
        train = self.train - held
        return {"train": min(train, self.limit or train), "validation": held, "test": self.test}


def bounds(shares: tuple[float, float] = SHARES) -> dict[str, tuple[float, float]]:
    """From where to where each split takes the images of a set that is not divided."""
    return dict(zip(("train", "validation", "test"), itertools.pairwise((0.0, *shares, 1.0)), strict=True))


def _alternatives(template: str) -> Iterator[str]:
    """ "a [red|blue] {}" -> "a red {}", "a blue {}"."""
    parts = re.split(r"\[(.*?)\]", template)
    choices = [part.split("|") if at % 2 else [part] for at, part in enumerate(parts)]
    return map("".join, itertools.product(*choices))


@functools.cache
def catalogue() -> dict[str, HubSet]:
    """The paper's data sets, by the names they have here."""
    entries = yaml.safe_load(Path(__file__).with_name("catalogue.yml").read_text())
    return {name: HubSet(**entry) for name, entry in entries.items()}


def readable(name: str) -> bool:
    """Whether a name is one of the catalogue, a folder, or looks like a hub id ("org/name"), "@revision" aside."""
    base = name.partition("@")[0]
    is_id = base.count("/") == 1 and all(base.split("/")) and base[0] not in ".~"
    return base in catalogue() or local_folder(name) is not None or is_id


def local_folder(name: str) -> Path | None:
    """The folder that a name stands for; None where there is none."""
    with contextlib.suppress(RuntimeError, OSError):  # "~nobody"
        folder = Path(name).expanduser().resolve()
        return folder if folder.is_dir() else None
    return None
