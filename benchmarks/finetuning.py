"""Accuracy of full fine-tuning for every pair of encoder and task: `python benchmarks/finetuning.py --device cuda`.

As in the chapter on alignment with the profile `mini`, which fine-tunes none, as each takes minutes on a CPU. Writes
finetuning.csv, a row for each pair and seed as soon as it is done. `weights` and `data` are checksums of the encoder's
weights and of the task's images and labels: the chapter takes no row with other checksums. `hits` has a letter for
each test image, y where it is right. Pairs that the file holds already are left out, so an interrupted run goes on.
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

from edition.claims import hit_letters
from edition.inputs import task_checksum, task_parts
from edition.pages import chapter_defaults, chapter_path
from residual import load_dataset, load_encoder
from residual.alignment import FineTuned, align, parameter_count
from residual.data.names import SPLITS, split_task
from residual.selection import class_encodings, share_right

COLUMNS = [
    *("model", "weights", "dataset", "data", "images", "schedule", "seed"),
    *("accuracy", "accuracy_se", "validation", "params", "epochs", "rate", "seconds", "hits"),
]
SCHEDULE = "cosine"  # "search" in rows from before: one rate, found by a range test, by AdamW-ScheduleFree


def draw(name: str, split: str, seed: int) -> None:
    load_dataset(name, split, seed=seed)


def tuned(model: str, task: str, seed: int, data_seed: int, images: int, device: str) -> tuple:
    torch.set_grad_enabled(True)
    torch.set_num_threads(1)
    start = time.monotonic()
    encoder = load_encoder(model, device=device)
    parts = task_parts(task, images, data_seed)
    pictures, labels = ({split: part[at] for split, part in parts.items()} for at in (0, 1))
    pictures = {split: data.images for split, data in pictures.items()}
    classes = class_encodings(encoder, load_dataset(task, "test", seed=data_seed))
    aligner = FineTuned(encoder)
    result, hits = align(aligner, encoder, pictures, labels, classes, seed=seed)
    found = *share_right(hits), result.accuracy
    went = parameter_count(aligner), len(result.accuracies), f"{result.rate:.3g}", round(time.monotonic() - start)
    which = model, encoder.weights_hash()[:12], task, task_checksum(parts), images, SCHEDULE, seed
    return *which, *(round(value, 6) for value in found), *went, *hit_letters(hits)


def done(path: Path, images: int) -> set[tuple[str, str, int]]:
    if not path.is_file():
        return set()
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (int(row["images"]), row["schedule"]) == (images, SCHEDULE)]
    return {(row["model"], row["dataset"], int(row["seed"])) for row in rows}


def main() -> None:
    chapter = chapter_defaults(chapter_path("alignment"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("book/measured"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="pairs at the same time")
    parser.add_argument("--pairs", nargs="*", help='such as "mini-blip on textures"; by default all that read text')
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each pair")
    parser.add_argument("--data-seed", type=int, default=0, help="of the images that are drawn")
    parser.add_argument("--images", type=int, default=chapter["images"])
    args = parser.parse_args()
    path = args.out / "finetuning.csv"
    own = [name for name in chapter["encoders"] if name.startswith("mini-") and "@" not in name]
    pairs = [pair.split(" on ") for pair in args.pairs or ()] or [(m, t) for t, m in product(chapter["tasks"], own)]
    wanted = [(*pair, seed) for seed, pair in product(range(args.seeds), pairs)]
    there = done(path, args.images)
    left = [pair for pair in wanted if pair not in there]
    sets = list(product(dict.fromkeys(split_task(task)[0] for _, task in pairs), SPLITS, [args.data_seed]))
    new = not path.is_file()
    with (
        path.open("a", newline="") as file,
        ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool,
    ):
        list(pool.map(draw, *zip(*sets, strict=True)))  # before the jobs read them
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        more = args.data_seed, args.images, args.device
        for future in as_completed([pool.submit(tuned, *pair, *more) for pair in left]):
            writer.writerow(future.result())
            file.flush()
            print(*future.result(), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
