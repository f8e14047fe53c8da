"""A chapter as its cells see it: parameters, encoders, units, tables."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from IPython.display import Markdown
from myst_nb import glue

from edition import claims, figures, results
from edition.inputs import (
    SHIPPED_SIDE,
    Extraction,
    check_classes,
    encoder_for,
    extractions,
    find_extraction,
    task_labels,
)
from edition.pages import ParameterError, project_root
from edition.parameters import namespace_parameters
from edition.reproduction import task_classes
from residual.data.names import SPLITS, split_task
from residual.files import replacing

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler
    from torch import Tensor

    from residual.data.dataset import Dataset
    from residual.encoders.encoder import Encoder
    from residual.store import StoredUnits


class Chapter:
    """One run of a chapter.

    name: of its file in book/. namespace: `globals()`, in which the cell tagged `parameters` has assigned them; it is
    only read. Raises ParameterError, before any work, for bad or missing parameters.
    """

    def __init__(self, name: str, namespace: dict[str, Any]) -> None:
        self.started, self.name, self.root = time.monotonic(), name, project_root()
        self.parameters, self.left_out = namespace_parameters(name, namespace)
        if self.left_out:
            print(f"Left out, as its package is not installed: {self.left_out}.")
        self.folder = self.root / self.parameters["results"]  # of tables and other results
        self.extractions = extractions(name, self.parameters)  # all that the chapter may extract
        self._units: dict[Extraction, StoredUnits] = {}
        self._weights: dict[str, str] = {}  # encoder -> hash; no chapter changes them
        figures.set_style()

    def encoder(self, name: str) -> Encoder:
        p = self.parameters
        return encoder_for(name, p.get("shipped_side", SHIPPED_SIDE), seed=p["seed"], device=p["device"])

    def encoders(self) -> dict[str, Encoder]:
        """All encoders and controls, by name."""
        names = (*self.parameters["encoders"], *self.parameters.get("controls", ()))
        return {name: self.encoder(name) for name in names}

    def _extraction(self, dataset: str | None, split: str | None, encoder: str) -> Extraction:
        own = find_extraction(self.extractions, encoder, dataset, split or self.parameters.get("split"))
        if own is None:
            raise ParameterError(f"{self.name} extracts no such units; add them to _EXTRACTIONS in edition/inputs.py")
        return own

    def data(self, dataset: str | None = None, split: str | None = None, encoder: str | None = None) -> Dataset:
        """The images that an encoder, by default the first, reads of a set, by default the chapter's own."""
        return self._extraction(dataset, split, encoder or self.parameters["encoders"][0]).data()

    def units(self, encoder: Encoder, dataset: str | None = None, split: str | None = None) -> StoredUnits:
        """The units of these images, extracted by whichever chapter comes first, and checked once by each."""
        extraction = self._extraction(dataset, split, encoder.name)
        if extraction not in self._units:
            sha256 = self._weights[encoder.name] = self._weights.get(encoder.name) or encoder.weights_hash()
            options = {"progress": False, "weights_hash": sha256}
            self._units[extraction] = extraction.units(encoder, extraction.data(), **options)
        return self._units[extraction]

    def pairs(
        self, names: Sequence[str] | None = None, tasks: Sequence[str] | None = None
    ) -> list[tuple[Encoder, str]]:
        """Every encoder with every task, or those named. Raises ParameterError where a class has no training image."""
        loaded = self.encoders().values() if names is None else [self.encoder(name) for name in names]
        pairs = list(product(loaded, self.parameters["tasks"] if tasks is None else tasks))
        for encoder, task in pairs:
            name, factor = split_task(task)
            check_classes(self.data(name, "train", encoder.name), factor, task, self.parameters["images"])
        return pairs

    def task_units(self, encoder: Encoder, task: str) -> tuple[dict[str, StoredUnits], dict[str, Tensor]]:
        """Units and labels of every split of a task."""
        name, factor = split_task(task)
        data = {split: self.data(name, split, encoder.name) for split in SPLITS}
        labels = {split: task_labels(part, factor)[0] for split, part in data.items()}
        return {split: self.units(encoder, name, split) for split in SPLITS}, labels

    def classes(self, encoder: Encoder, task: str) -> Tensor:
        """A direction for each class of a task; see `edition.reproduction.task_classes`."""
        return task_classes(encoder, task, *self.task_units(encoder, task), self.parameters)

    def save(self, table: pd.DataFrame, name: str) -> None:
        """Write a tidy table to <name>.csv in the folder of results. Raises KeyError for one not in results.yml."""
        if name not in results.outputs(self.name).tables:
            raise KeyError(f"results.yml does not list {name} among the tables of {self.name}")
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / f"{name}.csv") as partial:
            table.to_csv(partial, index=False, float_format="%.6g")

    def load(self, name: str, chapter: str) -> pd.DataFrame:
        """A table that another chapter saved; errors as `find`."""
        return results.read_table(self.find(f"{name}.csv", chapter), chapter=chapter)

    def find(self, file: str, chapter: str) -> Path:
        """A file that another chapter saved, among these results or the book's; errors as `edition.results.find`."""
        return results.find(file, chapter, (self.folder, self.root / "_build/results" / self.parameters["profile"]))

    def claims(self, table: pd.DataFrame) -> Styler:
        """Save the chapter's outcomes, rows of `edition.claims.check`, and show them; glues what was `found`."""
        self.save(table, f"claims_{self.name}")
        self.glue(found=Markdown(claims.found(table)))
        return claims.claim_table(table)

    @staticmethod
    def glue(**values: Any) -> None:
        """Values that the text of the page shows, by name."""
        for name, value in values.items():
            glue(name, value, display=False)

    def card(self, images: Iterable[int] = ()) -> Markdown:
        """A line with what a reader needs, beside the parameters, to repeat the run. images: how many encoders read."""
        counts = sorted({*images})
        read = f" {' or '.join(f'{count:,}' for count in counts)} images;" if counts else ""
        again = f"`make chapter CHAPTER={self.name} PROFILE={self.parameters['profile']}`"
        return Markdown(f"*This run:{read} {results.run_line(time.monotonic() - self.started)}.* Again: {again}")
