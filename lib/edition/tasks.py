"""The encoders and tasks of a chapter on section 4, with all that its rows share."""

from __future__ import annotations

from itertools import product

from torch import Tensor, nn
from tqdm import tqdm

from edition.chapter import Chapter
from edition.reproduction import check_base
from edition.results import published
from edition.texts import encode_texts
from residual import alignment, readings, selection
from residual.alignment import LinearAligner, ResiDual
from residual.data.dataset import load_dataset
from residual.data.names import split_task
from residual.encoders.encoder import Encoder
from residual.selection import zero_shot_accuracy
from residual.store import StoredUnits


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
    Raises ValueError, before any extraction, for a task without training images of a class; and before any training,
    where an encoder's own accuracy is far from the published one.
    """

    def __init__(self, run: Chapter, reading: str | None = None) -> None:
        p = run.parameters
        self.reading = reading or p.get("reading", "text")
        self.run, self.seed, self.names, self.workers = run, p["seed"], p["tasks"], p.get("workers", 0)
        self._references: dict[str, StoredUnits] = {}
        self._bases: dict[tuple[str, str], alignment.Bases] = {}
        self.encoders = run.encoders()
        for task in self.names:
            run.task(task)
        self.classes = {(encoder.name, task): self._directions(encoder, task) for encoder, task in self.pairs()}
        theirs = published("unit_selection")
        for encoder, task in tqdm(self.pairs(), desc="bases", disable=None):
            accuracy, _ = self.base(encoder, task)
            prompts = load_dataset(task, "test", seed=self.seed).prompts()
            check_base(encoder.name, task, accuracy, theirs, prompts=prompts, tolerance=p["base_tolerance"])

    def _directions(self, encoder: Encoder, task: str) -> Tensor:
        data = load_dataset(task, "test", seed=self.seed)
        if encoder.reads_text:
            return selection.class_encodings(encoder, data, encode=encode_texts)
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

    def reference(self, encoder: Encoder) -> StoredUnits:
        """Its units on the reference set, read once."""
        if encoder.name not in self._references:
            self._references[encoder.name] = self.run.units(encoder)
        return self._references[encoder.name]

    def bases(self, encoder: Encoder, kind: str) -> alignment.Bases:
        """`reference_bases` of the reference set, computed once."""
        if (encoder.name, kind) not in self._bases:
            bases = alignment.reference_bases(self.reference(encoder), kind, self.reading)
            self._bases[encoder.name, kind] = bases
        return self._bases[encoder.name, kind]

    def aligner(self, encoder: Encoder, bases: alignment.Bases | None, seed: int) -> LinearAligner | ResiDual:
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
        return alignment.fit(
            aligner.to(self.run.parameters["device"]),
            (inputs["train"], labels["train"]),
            (inputs["validation"], labels["validation"]),
            classes,
            **options,
            seed=seed,
            checkpoint=self.run.root / "_build/fits",
            workers=self.workers,
            progress=isinstance(aligner, alignment.FineTuned),
        )
