"""The encoders and tasks of a chapter on section 4, with all that its rows share, and rows that several pages show."""

from __future__ import annotations

import time
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from edition.chapter import Chapter
from edition.reproduction import check_base
from edition.results import published
from residual import alignment, readings, selection
from residual.alignment import Bases, LinearAligner, ResiDual, component_scores
from residual.data.dataset import load_dataset
from residual.data.names import split_task
from residual.encoders.encoder import Encoder
from residual.selection import zero_shot_accuracy
from residual.store import StoredUnits

SCORES = ("U", "U|T", "S")
SHARE = 0.05  # of the heads, in Table 1
SHARES = (0, 0.01, 0.1, 0.25, 0.5, 0.75)  # beside it; at least one head
DRAWS = 10  # of random heads
SELECTION = ("share", "heads", "strategy", "ablation", "accuracy", "accuracy_se")
TRAINING = ("accuracy", "accuracy_se", "validation", "params", "epochs", "rate", "seconds")


def text_scale(encoder: Encoder) -> float:
    """The encoder's logit scale; 100 where the model has none, as BLIP."""
    return encoder.logit_scale or 100.0


def few_heads(encoder: Encoder) -> int:
    """A twentieth of the heads, as many as Table 1 keeps."""
    return max(1, encoder.layers * encoder.heads // 20)


class Tasks:
    """The encoders and tasks of a chapter, in one reading of the paper.

    classes: the directions of each task's classes: of their texts, or, for an encoder that reads none, of the means of
    its training images.
    Raises ParameterError, before any extraction, for a task without training images of a class; and ValueError, before
    any training, where an encoder's own accuracy is far from the published one.
    """

    def __init__(self, run: Chapter, reading: str | None = None) -> None:
        p = run.parameters
        self.reading = reading or p.get("reading", "text")
        self.run, self.seed, self.names, self.workers = run, p["seed"], p["tasks"], p.get("workers", 0)
        self._bases: dict[tuple[str, str], Bases] = {}
        self.encoders = run.encoders()
        for task in self.names:
            run.task(task)
        self.tests = {task: load_dataset(task, "test", seed=self.seed) for task in self.names}
        self.classes = {(encoder.name, task): self._directions(encoder, task) for encoder, task in self.pairs()}
        for encoder, task in tqdm(self.pairs(), desc="bases", disable=None):
            prompts = self.tests[task].prompts()
            accuracy, _ = self.base(encoder, task)
            tolerance = p["base_tolerance"]
            check_base(encoder.name, task, accuracy, published("unit_selection"), prompts=prompts, tolerance=tolerance)

    def _directions(self, encoder: Encoder, task: str) -> Tensor:
        data = self.tests[task]
        if encoder.reads_text:
            return selection.class_encodings(encoder, data)
        units = self.run.units(encoder, split_task(task)[0], "train")
        return selection.class_means(units.outputs(), self.run.labels(encoder, task)["train"], len(data.classes))

    def pairs(self) -> list[tuple[Encoder, str]]:
        return list(product(self.encoders.values(), self.names))

    def base(self, encoder: Encoder, task: str) -> tuple[float, float]:
        """The encoder's own zero-shot accuracy on the test split, and its standard error."""
        units = self.run.units(encoder, split_task(task)[0], "test")
        return self.accuracy(encoder, task, units.outputs())

    def accuracy(self, encoder: Encoder, task: str, outputs: Tensor) -> tuple[float, float]:
        """Zero-shot accuracy of test outputs, and its standard error."""
        return zero_shot_accuracy(outputs, self.classes[encoder.name, task], self.run.labels(encoder, task)["test"])

    def bases(self, encoder: Encoder, kind: str) -> Bases:
        """`reference_bases` of the reference set, computed once."""
        if (encoder.name, kind) not in self._bases:
            self._bases[encoder.name, kind] = alignment.reference_bases(self.run.units(encoder), kind)
        return self._bases[encoder.name, kind]

    def aligner(self, encoder: Encoder, bases: Bases | None, seed: int) -> LinearAligner | ResiDual:
        """A ResiDual with these bases, or without bases Lin, as the reading starts them."""
        start = readings.start(self.reading)
        if bases is None:
            return LinearAligner(encoder.output_dim, start=start, seed=seed)
        return ResiDual(bases, start=start, seed=seed)

    def fit(
        self, aligner: nn.Module, encoder: Encoder, classes: Tensor, inputs: dict, labels: dict, seed: int,
        rate: float | None = None,
    ) -> alignment.Fit:  # fmt: skip
        """Train on the training split, as the reading does, with early stopping on the validation split.

        rate: a learning rate in place of the reading's.
        """
        options = readings.training_options(aligner, text_scale(encoder), self.reading)
        options |= {} if rate is None else {"rate": rate}
        splits = ((inputs[split], labels[split]) for split in ("train", "validation"))
        options |= {"seed": seed, "cache": self.run.root / "_build/fits", "workers": self.workers}
        progress = isinstance(aligner, alignment.FineTuned)
        return alignment.fit(aligner.to(self.run.parameters["device"]), *splits, classes, progress=progress, **options)

    def train(
        self, aligner: nn.Module, encoder: Encoder, classes: Tensor, inputs: dict, labels: dict, seed: int,
        rate: float | None = None,
    ) -> tuple:  # fmt: skip
        """Fit an aligner, and score it on the test split: the columns of TRAINING."""
        start = time.monotonic()
        result = self.fit(aligner, encoder, classes, inputs, labels, seed, rate)
        accuracy = zero_shot_accuracy(
            alignment.transformed(aligner, inputs["test"], workers=self.workers), classes, labels["test"]
        )
        size, seconds = alignment.parameter_count(aligner), time.monotonic() - start
        return *accuracy, result.accuracy, size, len(result.accuracies), result.rate, seconds


def inputs_of(units: dict[str, StoredUnits], bases: Bases | None) -> dict[str, Tensor]:
    """What an aligner takes, of every split: outputs for Lin, scores along components for ResiDual."""
    return {split: part.outputs() if bases is None else component_scores(part, bases) for split, part in units.items()}


def optimised(tasks: Tasks, encoder: Encoder, task: str) -> tuple[float, float]:
    """Accuracy, and its error, with one trained weight for each head."""
    units, labels = tasks.run.task_units(encoder, task)
    bases, classes = tasks.bases(encoder, "O"), tasks.classes[encoder.name, task]
    weights = tasks.aligner(encoder, bases, tasks.seed)
    return tasks.train(weights, encoder, classes, inputs_of(units, bases), labels, tasks.seed)[:2]


def selection_rows(tasks: Tasks, encoder: Encoder, task: str) -> tuple[list[tuple], dict[str, list[int]]]:
    """Rows of SELECTION for one encoder and task (Table 1), and the heads that each score chooses, best first."""
    units, labels = tasks.run.task_units(encoder, task)
    classes, means = tasks.classes[encoder.name, task], {"zero": None, "mean": tasks.run.units(encoder)}
    options = {"labels": labels["validation"], "reading": tasks.reading}
    scores = {m: selection.score_units(units["validation"], m, classes, **options) for m in SCORES}
    count, k = encoder.layers * encoder.heads, few_heads(encoder)

    def kept(values: Tensor, some: int, ablation: str) -> tuple[float, float]:
        heads = selection.select_top(values, some)
        return tasks.accuracy(encoder, task, selection.ablate(units["test"], heads, means[ablation]))

    rows = [(SHARE, k, m, ablation, *kept(scores[m], k, ablation)) for m in SCORES for ablation in means]
    for ablation in means:
        drawn = (selection.score_units(units["test"], "R", seed=seed) for seed in range(DRAWS))
        accuracies = [kept(values, k, ablation)[0] for values in drawn]
        rows.append((SHARE, k, "R", ablation, np.mean(accuracies), np.std(accuracies, ddof=1) / DRAWS**0.5))
        rows.append((1.0, count, "H", ablation, *kept(torch.ones(units["test"].head_grid), count, ablation)))
    rows.append((1.0, count, "B", "none", *tasks.base(encoder, task)))
    rows.append((1.0, count, "O", "zero", *optimised(tasks, encoder, task)))
    for some, method in product(sorted({max(1, round(share * count)) for share in SHARES} - {k}), SCORES):
        rows.append((some / count, some, method, "zero", *kept(scores[method], some, "zero")))
    order = {m: values.flatten().argsort(descending=True, stable=True) for m, values in scores.items()}
    return rows, {m: values[:k].tolist() for m, values in order.items()}
