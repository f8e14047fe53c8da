"""Rows of section 4.1: accuracy with few heads, with groups of units, and with a trained weight for each head."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import torch
from torch import Tensor

from edition.inputs import residual_inputs
from edition.tasks import Tasks, few_heads
from residual import alignment, selection
from residual.data.names import split_task
from residual.encoders.encoder import Encoder

SCORES = ("U", "U|T", "S")
SHARE = 0.05  # of the heads, in Table 1
SHARES = (0, 0.01, 0.1, 0.25, 0.5, 0.75)  # beside it; at least one head
DRAWS = 10  # of random heads
SELECTION = ("share", "heads", "strategy", "ablation", "accuracy", "accuracy_se")


def selection_rows(tasks: Tasks, encoder: Encoder, task: str) -> tuple[list[tuple], dict[str, list[int]]]:
    """Rows of SELECTION for one encoder and task (Table 1), and the heads that each score chooses, best first."""
    units, labels = tasks.run.task_units(encoder, task)
    classes, means = tasks.classes[encoder.name, task], {"zero": None, "mean": tasks.reference(encoder)}
    options = {"labels": labels["validation"], "reading": tasks.reading}
    scores = {m: selection.score_units(units["validation"], m, classes, **options) for m in SCORES}
    count, k = encoder.layers * encoder.heads, few_heads(encoder)

    def ablated(heads: Tensor, ablation: str) -> tuple[float, float]:
        return tasks.accuracy(encoder, task, selection.ablate(units["test"], heads, means[ablation]))

    rows = [
        (SHARE, k, m, ablation, *ablated(selection.select_top(scores[m], k), ablation))
        for m in SCORES
        for ablation in means
    ]
    for ablation in means:
        drawn = (selection.score_units(units["test"], "R", seed=seed) for seed in range(DRAWS))
        accuracies = [ablated(selection.select_top(values, k), ablation)[0] for values in drawn]
        rows.append((SHARE, k, "R", ablation, np.mean(accuracies), np.std(accuracies, ddof=1) / DRAWS**0.5))
        every = torch.ones(encoder.layers, encoder.heads, dtype=torch.bool)
        rows.append((1.0, count, "H", ablation, *ablated(every, ablation)))
    rows.append((1.0, count, "B", "none", *tasks.base(encoder, task)))
    rows.append((1.0, count, "O", "zero", *optimised(tasks, encoder, task, units, labels)))
    for some, method in product(sorted({max(1, round(share * count)) for share in SHARES} - {k}), SCORES):
        heads = selection.select_top(scores[method], some)
        rows.append((some / count, some, method, "zero", *ablated(heads, "zero")))
    order = {m: values.flatten().argsort(descending=True, stable=True) for m, values in scores.items()}
    return rows, {m: values[:k].tolist() for m, values in order.items()}


def group_rows(tasks: Tasks, encoder: Encoder, task: str) -> Iterator[tuple[str, int, float, float]]:
    """Group, layer, accuracy and its error of groups of units alone, all else at zero.

    Groups are X0, the heads, the MLPs; each layer; and all units up to a layer.
    """
    units, heads = tasks.run.units(encoder, split_task(task)[0], "test"), torch.arange(encoder.layers)
    sums = dict.fromkeys(("heads", "MLPs"), 0) | {"X0": units.block_coordinates(0).double()}
    total = sums["X0"]
    for layer in range(encoder.layers):
        chosen = (heads == layer)[:, None].expand(-1, encoder.heads)
        parts = {"heads": selection.ablate(units, chosen), "MLPs": units.block_coordinates(layer + 1).double()}
        sums |= {name: sums[name] + part for name, part in parts.items()}
        of_layer = parts["heads"] + parts["MLPs"]
        total = total + of_layer
        yield "one layer", layer, *tasks.accuracy(encoder, task, of_layer.float())
        yield "up to a layer", layer, *tasks.accuracy(encoder, task, total.float())
    for name, part in sums.items():
        yield name, -1, *tasks.accuracy(encoder, task, part.float())


def optimised(tasks: Tasks, encoder: Encoder, task: str, units: dict, labels: dict) -> tuple[float, float]:
    """Accuracy with one trained weight for each head."""
    bases = tasks.bases(encoder, "O")
    weights = tasks.aligner(encoder, bases, tasks.seed)
    with residual_inputs(units, bases) as scores:
        tasks.fit(weights, encoder, tasks.classes[encoder.name, task], scores, labels, tasks.seed)
        return tasks.accuracy(encoder, task, alignment.transformed(weights, scores["test"]))
