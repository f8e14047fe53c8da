"""The paper's data sets as they are known before anything is downloaded, from catalogue.yml."""

from __future__ import annotations

import functools
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

HELD = 0.1  # of an official training split, for validation where there is none
SHARES = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}  # of a set that is not divided


class HubSet(BaseModel):
    """What is known of a data set; the fields are told in catalogue.yml."""

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

    def counts(self) -> dict[str, int]:
        """Images of each split, as `residual.hub.read_split` divides them."""
        if not (self.train and self.test):
            whole = self.train + self.test
            return {split: int(high * whole) - int(low * whole) for split, (low, high) in SHARES.items()}
        held = int(HELD * self.train)
        train = self.train - held
        return {"train": min(train, self.limit or train), "validation": held, "test": self.test}


@functools.cache
def catalogue() -> dict[str, HubSet]:
    """The paper's data sets, by the names they have here."""
    entries = yaml.safe_load(Path(__file__).with_name("catalogue.yml").read_text())
    return {name: HubSet(**entry) for name, entry in entries.items()}
