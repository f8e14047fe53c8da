"""A chapter as its cells see it: parameters, encoders, units, tables."""

from __future__ import annotations

import ast
import os
import time
from collections.abc import Iterable
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import matplotlib
import pandas as pd
from IPython.display import Markdown
from myst_nb import glue
from pandas.io.formats.style import Styler
from torch import Tensor

from edition import results
from edition.claims import claim_table, found
from edition.inputs import SHIPPED_SIDE, Extraction, encoder_for, extractions, task_parts
from edition.pages import (
    DOING,
    READS,
    ParameterError,
    chapter_defaults,
    chapter_path,
    profile_of_run,
    project_root,
    run_name,
)
from edition.parameters import check_parameters, without_missing
from edition.tables import styled
from residual.data.dataset import Dataset
from residual.data.names import SPLITS, split_task
from residual.encoders.encoder import ENCODED, Encoder
from residual.store import StoredUnits, load_units


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
        self.run = run_name(chapter_path(name), given)  # which its results are stored under
        self.parameters, self.left_out = without_missing(given)
        namespace.update(self.parameters)
        if self.left_out:
            print(f"Left out, as its package is not installed: {self.left_out}.")
        self.profile, self.root = self.parameters["profile"], project_root()
        self._checked: dict[Extraction, Path] = {}  # -> the folder of its units
        self._weights: WeakKeyDictionary[Encoder, str] = WeakKeyDictionary()  # -> their hash; no chapter changes them
        # Imported in the kernel: at its first import it hooks itself into the running IPython.
        from matplotlib_inline.backend_inline import set_matplotlib_formats

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
        return extractions(self.name, self.parameters, profile_of_run(self.profile))

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
        if folder := self._checked.get(extraction):
            return load_units(folder, verify=False)
        if encoder not in self._weights:
            self._weights[encoder] = encoder.weights_hash()
        weights_hash = self._weights[encoder]
        with Path(os.environ[DOING]).open("w") if DOING in os.environ else nullcontext(False) as progress:
            units = extraction.units(encoder, extraction.data(), progress=progress, weights_hash=weights_hash)
        self._checked[extraction] = units.folder
        return units

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

    @property
    def folder(self) -> Path:
        """Where tables and other results of the run are."""
        return results.results_folder(self.run)

    def save(self, table: pd.DataFrame, name: str) -> None:
        """Write a tidy table of this run to _build/results/<run>/<name>.csv."""
        results.save_results(table, self.run, name, chapter=self.name)

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
        """A file that another chapter saved, with the same parameters or with the profile's."""
        return results.find_result(self.run, self.profile, file, chapter=chapter)

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
        if self.left_out:
            facts["left_out"] = self.left_out
        facts["images encoded"] = "; ".join(f"{name}: {n:,}" for name, n in ENCODED.items()) or "none"
        if (self.root / "_build/results" / self.run).is_dir():
            facts["results"] = f"_build/results/{self.run}"
        return styled(results.run_card(time.monotonic() - self.started, self.parameters | facts), wrap=True)


def _injected(sources: Iterable[str]) -> set[str]:
    """The names that papermill's own cell of parameters assigned, among the cells that were run."""
    cells = (source for source in sources if source.startswith("# Parameters"))
    assigned = (statement for source in cells for statement in ast.parse(source).body)
    return {target.id for statement in assigned for target in getattr(statement, "targets", ())}
