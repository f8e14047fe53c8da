"""Accuracy of full fine-tuning for every pair of encoder and task: `python benchmarks/finetuning.py --device cuda`.

As in the chapter on alignment with the profile `mini`, which fine-tunes none, as each takes minutes on a CPU.
Writes finetuning.csv, a row for each pair and seed as soon as it is done: model, dataset, images, seed, accuracy,
accuracy_se, validation, params, epochs, rate, seconds. Pairs that it holds already are left out, so an interrupted
run goes on.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path

import torch

from edition.inputs import task_parts
from edition.pages import chapter_defaults, chapter_path
from residual import load_dataset, load_encoder
from residual.alignment import FineTuned, fit, parameter_count, transformed
from residual.data.names import SPLITS, split_task
from residual.selection import class_encodings, zero_shot_accuracy

COLUMNS = [
    "model",
    "dataset",
    "images",
    "seed",
    "accuracy",
    "accuracy_se",
    "validation",
    "params",
    "epochs",
    "rate",
    "seconds",
]


def draw(name: str, split: str) -> None:
    load_dataset(name, split)


def tuned(model: str, task: str, seed: int, images: int, device: str) -> tuple:
    torch.set_grad_enabled(True)
    torch.set_num_threads(1)
    start = time.monotonic()
    encoder = load_encoder(model, device=device)
    parts = task_parts(task, images, 0)
    classes = class_encodings(encoder, load_dataset(task, "test"))
    (train, validation, test) = ((parts[s][0].images, parts[s][1]) for s in ("train", "validation", "test"))
    aligner = FineTuned(encoder)
    result = fit(aligner, train, validation, classes, scale=encoder.logit_scale or 100.0, seed=seed)
    accuracy = zero_shot_accuracy(transformed(aligner, test[0]), classes, test[1])
    seconds = round(time.monotonic() - start)
    digits = (round(value, 6) for value in (*accuracy, result.accuracy))
    epochs, params = len(result.accuracies), parameter_count(aligner)
    return model, task, images, seed, *digits, params, epochs, f"{result.rate:.3g}", seconds


def done(path: Path, images: int) -> set[tuple[str, str, int]]:
    if not path.is_file():
        return set()
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["images"]) == images]
    return {(row["model"], row["dataset"], int(row["seed"])) for row in rows}


def main() -> None:
    chapter = chapter_defaults(chapter_path("alignment"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("book/measured"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="pairs at the same time")
    parser.add_argument("--encoders", nargs="*", default=chapter["encoders"])
    parser.add_argument("--tasks", nargs="*", default=chapter["tasks"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--images", type=int, default=chapter["images"])
    args = parser.parse_args()
    path = args.out / "finetuning.csv"
    wanted = [(m, t, s) for s, t, m in product(range(args.seeds), args.tasks, args.encoders)]
    there = done(path, args.images)
    left = [pair for pair in wanted if pair not in there]
    sets = list(product(dict.fromkeys(split_task(task)[0] for task in args.tasks), SPLITS))
    new = not path.is_file()
    with (
        path.open("a", newline="") as file,
        ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool,
    ):
        list(pool.map(draw, *zip(*sets, strict=True)))  # before the jobs read them
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for future in as_completed([pool.submit(tuned, *pair, args.images, args.device) for pair in left]):
            writer.writerow(future.result())
            file.flush()
            print(*future.result(), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
