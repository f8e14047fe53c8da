"""Rows of section 4.2: accuracy after training ResiDual, linear maps and whole encoders; and what was trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any

from torch import Tensor, nn

from edition.chapter import Chapter
from edition.inputs import residual_inputs
from edition.playground import Scene, all_components
from edition.selection_rows import optimised
from edition.tasks import Tasks, few_heads, text_scale
from edition.texts import encode_texts
from residual import alignment, selection
from residual.alignment import LinearAligner, ResiDual
from residual.data.dataset import Dataset, load_dataset
from residual.data.names import SPLITS, split_task
from residual.encoders.encoder import Encoder
from residual.files import file_name
from residual.selection import zero_shot_accuracy

PARITY = ("an even drawing", "an odd drawing")  # the classes of a task that no unit carries
TEXT_MEASURES = ("zero_shot", "zero_shot_se", "aligned", "aligned_se")
ALIGNMENT = ("method", "seed", "accuracy", "accuracy_se", "validation", "params", "epochs", "rate", "seconds")
RATE = ALIGNMENT.index("rate") - len(ALIGNMENT)  # from the end of a row


def reading_rows(tasks: Tasks, encoder: Encoder, task: str) -> Iterator[tuple[str, float, float]]:
    """Method, accuracy and its error, in one reading, of all that the two readings compute differently."""
    units, labels = tasks.run.task_units(encoder, task)
    for method in ("U", "U|T"):
        scores = selection.score_units(
            units["validation"], method, tasks.classes[encoder.name, task], reading=tasks.reading
        )
        heads = selection.select_top(scores, few_heads(encoder))
        yield method, *tasks.accuracy(encoder, task, selection.ablate(units["test"], heads))
    yield "O", *optimised(tasks, encoder, task, units, labels)
    yield from aligned_rows(tasks, encoder, task)


def aligned_rows(tasks: Tasks, encoder: Encoder, task: str) -> Iterator[tuple[str, float, float]]:
    """Method, accuracy and its error of the encoder, Lin and every ResiDual, trained once."""
    units, labels = tasks.run.task_units(encoder, task)
    yield "B", *tasks.base(encoder, task)
    outputs = {split: part.outputs() for split, part in units.items()}
    train = partial(training_row, tasks, encoder, tasks.classes[encoder.name, task], labels=labels, seed=tasks.seed)
    yield "Lin", *train(tasks.aligner(encoder, None, tasks.seed), outputs)[:2]
    for kind in ("RD", "RD*", "RD_Y"):
        bases = tasks.bases(encoder, kind)
        with residual_inputs(units, bases) as scores:
            yield kind, *train(tasks.aligner(encoder, bases, tasks.seed), scores)[:2]


def alignment_rows(tasks: Tasks, encoder: Encoder, task: str) -> Iterator[tuple]:
    """Rows of ALIGNMENT for one encoder and task: every method, for each seed (Table 2).

    The learning rate of a method is found with the first seed. The first trained ResiDual is saved, for `load_adapter`.
    """
    units, labels = tasks.run.task_units(encoder, task)
    seeds, nan = range(tasks.seed, tasks.seed + tasks.run.parameters["seeds"]), float("nan")
    train = partial(training_row, tasks, encoder, tasks.classes[encoder.name, task], labels=labels)
    yield "B", tasks.seed, *tasks.base(encoder, task), nan, 0, 0, nan, nan
    outputs = {split: part.outputs() for split, part in units.items()}
    for seed, _, row in _seeded(train, partial(tasks.aligner, encoder, None), outputs, seeds):
        yield "Lin", seed, *row
    bases = {kind: tasks.bases(encoder, kind) for kind in ("RD", "RD*", "RD_Y")}
    bases["RD, own bases"] = alignment.reference_bases(units["train"], "RD", tasks.reading)
    for method, basis in bases.items():
        repeats = seeds[:1] if method == "RD, own bases" else seeds
        with residual_inputs(units, basis) as scores:
            for seed, aligner, row in _seeded(train, partial(tasks.aligner, encoder, basis), scores, repeats):
                yield method, seed, *row
                if (method, seed) == ("RD", tasks.seed):
                    path = tasks.run.folder / adapter_file(encoder.name, task)
                    path.parent.mkdir(exist_ok=True)
                    aligner.save(path, **run_facts(tasks.run, task))


def _seeded(train: Callable, make: Callable, inputs: dict, seeds: Iterable[int]) -> Iterator[tuple]:
    """Seed, aligner and row of `training_row` for each seed, with the learning rate that was found for the first."""
    rate = None
    for seed in seeds:
        row = train(aligner := make(seed), inputs, seed=seed, rate=rate)
        rate = row[RATE]
        yield seed, aligner, row


def training_row(
    tasks: Tasks, encoder: Encoder, classes: Tensor, aligner: nn.Module, inputs: dict, labels: dict, **options: Any
) -> tuple:
    """Fit one aligner: the columns of ALIGNMENT from accuracy on. options: of `Tasks.fit`."""
    start = time.monotonic()
    result = tasks.fit(aligner, encoder, classes, inputs, labels, **options)
    outputs = alignment.transformed(aligner, inputs["test"], workers=tasks.workers)
    accuracy = zero_shot_accuracy(outputs, classes, labels["test"])
    seconds = time.monotonic() - start
    return *accuracy, result.accuracy, alignment.parameter_count(aligner), len(result.accuracies), result.rate, seconds


def finetuning_row(tasks: Tasks, encoder: Encoder, task: str) -> tuple:
    """A row of ALIGNMENT for full fine-tuning."""
    name, labels = split_task(task)[0], tasks.run.labels(encoder, task)
    images = {split: tasks.run.data(name, split, encoder.name).images for split in labels}
    classes = tasks.classes[encoder.name, task]
    return (
        "FT",
        tasks.seed,
        *training_row(tasks, encoder, classes, alignment.FineTuned(encoder), images, labels, seed=tasks.seed),
    )


def parity_rows(tasks: Tasks, encoder: Encoder) -> Iterator[tuple]:
    """Method, accuracy, its error and validation accuracy where no unit carries the task.

    A drawing of `shapes` is even where the indices of its shape and its colour add up to an even number.
    """
    parts = tasks.run.task("shapes-shape")
    units = {split: tasks.run.units(encoder, "shapes", split) for split in parts}
    factors = {split: data.factors for split, (data, _) in parts.items()}
    labels = {split: (part["shape"].values + part["colour"].values) % 2 for split, part in factors.items()}
    classes, bases = encode_texts(encoder, PARITY), tasks.bases(encoder, "RD")
    outputs = {split: part.outputs() for split, part in units.items()}
    scores = {split: alignment.component_scores(part, bases) for split, part in units.items()}
    for method, basis, inputs in (("Lin", None, outputs), ("RD", bases, scores)):
        aligner = tasks.aligner(encoder, basis, tasks.seed)
        yield method, *training_row(tasks, encoder, classes, aligner, inputs, labels, seed=tasks.seed)[:3]


def playground_scene(tasks: Tasks, encoder: Encoder, task: str, shown: int) -> tuple[Scene, dict[str, dict[str, Any]]]:
    """The first test images of a task with their scores, and the settings that the playground's buttons load."""
    units, labels = tasks.run.task_units(encoder, task)
    classes = tasks.classes[encoder.name, task]
    trained = {}
    for name, kind in (("ResiDual", "RD"), ("ResiDual, heads alone", "RD*")):
        trained[name] = tasks.aligner(encoder, bases := tasks.bases(encoder, kind), tasks.seed)
        with residual_inputs(units, bases) as scores:
            tasks.fit(trained[name], encoder, classes, scores, labels, tasks.seed)
    ranked = selection.score_units(units["validation"], "U", classes)
    chosen = [tuple(at) for at in selection.select_top(ranked, few_heads(encoder)).nonzero().tolist()]
    bases, named = all_components(tasks.reference(encoder)), load_dataset(task, "test", seed=tasks.seed)
    data = tasks.run.data(split_task(task)[0], "test", encoder.name)
    scene = Scene(
        encoder.name, task, data.head(min(shown, len(data))),
        labels["test"][:shown], named.classes, bases, alignment.component_scores(units["test"], bases)[:shown],
        units["test"].outputs()[:shown], classes,
    )  # fmt: skip
    return scene, scene.presets(trained, chosen)


def adapter_file(encoder: str, task: str) -> str:
    """Where a run keeps the ResiDual of an encoder and a task, in its folder of results."""
    return f"adapters/{file_name(encoder, task)}.safetensors"


def run_facts(run: Chapter, task: str) -> dict[str, str]:
    """What an adapter was trained on."""
    return {"task": task} | {
        name: str(run.parameters[name]) for name in ("images", "reference_images", "seed", "reading")
    }


def load_adapters(run: Chapter) -> dict[tuple[str, str], ResiDual]:
    """The ResiDual that the chapter on alignment trained for every encoder and task.

    Raises FileNotFoundError where there is none, and ValueError where one was trained with other parameters.
    """
    adapters, shared = {}, {}
    for encoder, task in product(run.parameters["encoders"], run.parameters["tasks"]):
        path = run.find(adapter_file(encoder, task), "alignment")
        loaded = ResiDual.load(path)
        wanted = run_facts(run, task)
        if wrong := {
            k: loaded.bases.provenance.get(k) for k, v in wanted.items() if loaded.bases.provenance.get(k) != v
        }:
            raise ValueError(f"{path} was trained with {wrong}, not {wanted}; run the chapter alignment again")
        bases = shared.setdefault((encoder, loaded.bases.provenance["dataset_hash"]), loaded.bases)
        adapters[encoder, task] = ResiDual(bases)  # one copy of the bases for all tasks of an encoder
        adapters[encoder, task].load_state_dict(loaded.state_dict())
    return adapters


def accuracy_rows(run: Chapter, encoder: Encoder) -> Iterator[dict[str, Any]]:
    """What an encoder knows of every task of a chapter: accuracies zero-shot, after Lin, and by neighbours.

    Tasks of one data set share their images.
    """
    reads = encoder.reads_text and not encoder.weights.startswith("random")
    for task in run.parameters["tasks"]:
        run.task(task)  # refuses, before anything is encoded
    for task in run.parameters["tasks"]:
        labels, needed = run.labels(encoder, task), SPLITS if reads else ("train", "test")
        splits = {part: (run.units(encoder, split_task(task)[0], part).outputs(), labels[part]) for part in needed}
        named = load_dataset(task, "test", seed=run.parameters["seed"])
        row = {"model": encoder.name, "task": task, "classes": len(named.classes), "images": len(labels["test"])}
        row |= {"chance": 1 / len(named.classes)} | dict.fromkeys(TEXT_MEASURES, float("nan"))
        row["knn"], row["knn_se"] = selection.knn_accuracy(splits["train"], splits["test"])
        yield row | (_text_accuracies(encoder, named, splits, run.parameters["seed"]) if reads else {})


def _text_accuracies(encoder: Encoder, named: Dataset, splits: dict, seed: int) -> dict[str, float]:
    classes = selection.class_encodings(encoder, named, encode=encode_texts)
    outputs, labels = splits["test"]
    aligner, scale = LinearAligner(encoder.output_dim), text_scale(encoder)
    alignment.fit(aligner, splits["train"], splits["validation"], classes, scale=scale, seed=seed)
    aligned = zero_shot_accuracy(alignment.transformed(aligner, outputs), classes, labels)
    return dict(zip(TEXT_MEASURES, (*zero_shot_accuracy(outputs, classes, labels), *aligned), strict=True))
