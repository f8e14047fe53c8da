"""A chapter as its cells see it: parameters, encoders, units, tables."""

from __future__ import annotations

import ast
import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import matplotlib
import pandas as pd
from IPython.display import Markdown
from matplotlib_inline.backend_inline import set_matplotlib_formats
from myst_nb import glue
from pandas.io.formats.style import Styler

from edition import results
from edition.claims import claim_table, found
from edition.inputs import SHIPPED_SIDE, Extraction, encoder_for, extractions, task_parts
from edition.pages import READS, ParameterError, chapter_defaults, chapter_path, project_root
from edition.parameters import check_parameters, without_missing
from edition.tables import styled
from residual.data.names import SPLITS, split_task
from residual.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from residual.data.dataset import Dataset
    from residual.encoders.encoder import Encoder
    from residual.store import StoredUnits


class Chapter:
    """One run of a chapter.

    name: of its file in book/. namespace: `globals()`, in which the cell tagged `parameters` has assigned them.
    Raises ParameterError, before any work, for bad or missing parameters.
    """

    def __init__(self, name: str, namespace: dict[str, Any]) -> None:
        self.started = time.monotonic()
        self.name, names = name, chapter_defaults(chapter_path(name))
        if missing := sorted(set(names) - set(namespace)):
            raise ParameterError(f"no parameters {missing}; the first cell of book/{name}.md assigns them")
        if strange := sorted(_injected(namespace.get("In", ())) - set(names)):
            raise ParameterError(f"{name} has no parameters {strange}; it has {sorted(names)}")
        given = {key: namespace[key] for key in names}
        check_parameters(**given)
        self.parameters, self.left_out = without_missing(given)
        namespace.update(self.parameters)
        if self.left_out:
            print(f"Left out, as its package is not installed: {self.left_out}.")
        self.profile, self.root = self.parameters["profile"], project_root()
        self.folder = self.root / self.parameters["results"]  # of tables and other results
        self._units: dict[Extraction, StoredUnits] = {}
        self._weights: WeakKeyDictionary[Encoder, str] = WeakKeyDictionary()  # -> their hash; no chapter changes them
        set_matplotlib_formats("svg", metadata={"Date": None})  # the same figure from every run
        # Text of figures stays text, which can be read and searched; each names the fonts it may have.
        fonts = {"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Verdana"]}
        matplotlib.rcParams |= {"svg.hashsalt": "residual"} | fonts

    def encoder(self, name: str) -> Encoder:
        p = self.parameters
        return encoder_for(name, p.get("shipped_side", SHIPPED_SIDE), seed=p["seed"], device=p["device"])

    def encoders(self) -> dict[str, Encoder]:
        """All encoders and controls, by name."""
        names = (*self.parameters["encoders"], *self.parameters.get("controls", ()))
        return {name: self.encoder(name) for name in names}

    @cached_property
    def extractions(self) -> list[Extraction]:
        """All that the chapter may extract: of each encoder first the set it is about, or the reference set."""
        return extractions(self.name, self.parameters)

    def _extraction(self, dataset: str | None, split: str | None, encoder: str | None = None) -> Extraction:
        ours = [e for e in self.extractions if encoder in (None, e.encoder)]
        if dataset is not None:
            key = dataset, split or self.parameters["split"]
            ours = [e for e in reversed(ours) if (e.dataset, e.split) == key]
        if not ours:
            raise ParameterError(f"{self.name} extracts no such units; add them to _EXTRACTIONS in edition/inputs.py")
        return ours[0]

    def data(self, dataset: str | None = None, split: str | None = None, encoder: str | None = None) -> Dataset:
        """The images that the chapter reads of a data set; by default of its own, or of the reference set.

        encoder: that reads them, by default the first; the shipped encoder has larger ones.
        """
        return self._extraction(dataset, split, encoder or self.parameters["encoders"][0]).data()

    def units(self, encoder: Encoder, dataset: str | None = None, split: str | None = None) -> StoredUnits:
        """The units of these images, extracted by whichever chapter comes first, and checked once by each."""
        extraction = self._extraction(dataset, split, encoder.name)
        if extraction not in self._units:
            if encoder not in self._weights:
                self._weights[encoder] = encoder.weights_hash()
            options = {"progress": False, "weights_hash": self._weights[encoder]}
            self._units[extraction] = extraction.units(encoder, extraction.data(), **options)
        return self._units[extraction]

    def task(self, task: str) -> dict[str, tuple[Dataset, Tensor]]:
        """Every split of a task with its labels; see `task_parts`."""
        return task_parts(task, self.parameters["images"], self.parameters["seed"])

    def task_units(self, encoder: Encoder, task: str) -> tuple[dict[str, StoredUnits], dict[str, Tensor]]:
        """Units and labels of every split of a task."""
        units = {split: self.units(encoder, split_task(task)[0], split) for split in SPLITS}
        return units, self.labels(encoder, task)

    def labels(self, encoder: Encoder, task: str) -> dict[str, Tensor]:
        """The labels of every split of a task, of the images that an encoder reads."""
        name, factor = split_task(task)
        splits = {split: self._extraction(name, split, encoder.name).data() for split in SPLITS}
        return {split: data.factors[factor].values if factor else data.labels for split, data in splits.items()}

    def save(self, table: pd.DataFrame, name: str) -> None:
        """Write a tidy table to <name>.csv in the folder of results. Raises KeyError for one not in results.yml."""
        if name not in results.outputs(self.name).tables:
            raise KeyError(f"results.yml does not list {name} among the tables of {self.name}")
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / f"{name}.csv") as partial:
            table.to_csv(partial, index=False, float_format="%.6g")

    def load(self, name: str, chapter: str) -> pd.DataFrame:
        """A table that another chapter saved. Raises FileNotFoundError that names the chapter to run."""
        return results.read_table(self.find(f"{name}.csv", chapter), chapter=chapter)

    def load_if_there(self, name: str, chapter: str) -> pd.DataFrame | None:
        """The same, and None, with a note, where that chapter was not run."""
        try:
            return self.load(name, chapter)
        except FileNotFoundError as error:
            print(f"left out: {error}")
            return None

    def find(self, file: str, chapter: str) -> Path:
        """A file that another chapter saved, among these results or the book's.

        Raises FileNotFoundError that names the chapter to run.
        """
        folders = self.folder, self.root / "_build/results" / self.profile
        path = next((folder / file for folder in folders if (folder / file).is_file()), None)
        if path is None:
            there = self.folder / file
            raise FileNotFoundError(f"no {there}; run the chapter {chapter} with the same profile first, or make book")
        return path

    def load_all(self, prefix: str) -> pd.DataFrame:
        """The tables <prefix>_<chapter> of every chapter that this one reads, one below the other."""
        tables = {name: self.load(f"{prefix}_{name}", name).assign(chapter=name) for name in READS[self.name]}
        return pd.concat(tables.values(), ignore_index=True)

    def claims(self, rows: Iterable[pd.DataFrame]) -> Styler:
        """Save the chapter's verdicts, rows of `edition.claims.check`, and show them; glues what was `found`."""
        table = pd.concat(list(rows))
        self.save(table, f"claims_{self.name}")
        self.glue(found=Markdown(found(table)))
        return claim_table(table)

    @staticmethod
    def glue(**values: Any) -> None:
        """Values that the text of the page shows, by name."""
        for name, value in values.items():
            glue(name, value, display=False)

    def card(self, **facts: Any) -> Styler:
        """What a reader needs to repeat the run: its parameters, other facts, versions, machine, seconds."""
        facts |= {"left_out": self.left_out} if self.left_out else {}
        facts["again"] = f"make chapter CHAPTER={self.name} PROFILE={self.profile}"
        return styled(results.run_card(time.monotonic() - self.started, self.parameters | facts), wrap=True)


def _injected(sources: Iterable[str]) -> set[str]:
    """The names that papermill's own cell of parameters assigned, among the cells that were run."""
    cells = (source for source in sources if source.startswith("# Parameters"))
    assigned = (statement for source in cells for statement in ast.parse(source).body)
    return {target.id for statement in assigned for target in getattr(statement, "targets", ())}
