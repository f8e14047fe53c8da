"""What makes heads specialise: short trainings that differ in one thing, and what their heads look like.

`python -m zoo study NAME` trains one and measures it; `python -m zoo measure FOLDER` measures any encoder.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import pandas as pd
import torch

from residual.data.dataset import load_dataset
from residual.encoders.encoder import Encoder, load_encoder
from residual.extraction import extract
from residual.heads import factor_levels, head_dimensions, variance_shares
from residual.selection import class_encodings, encode_images, knn_accuracy, zero_shot_accuracy
from zoo.recipes import RECIPES, Recipe

# What all studies share. Where they differ from the recipes, the recipes follow what they showed.
SHARED = {"steps": 600, "batch": 1024, "rate": 1.5e-3, "tokens": 0.5, "identity": 0.0}
STUDIES = {  # what each changes
    "nothing changed": {},
    "emoji named too": {"identity": 1.0},
    "captions with three times the detail": {"detail": 3.0},
    "captions without detail": {"detail": 0.0},
    "seven of ten backdrops plain": {"plain": 0.64},
    "six layers": {"layers": 6},
    "three heads of 64": {"heads": 3},
    "all patches": {"tokens": 1.0},
}
TASKS = ("emoji-animals", "emoji-food", "emoji-flags", "digits")
FACTORS = {"backdrop": ("backdrop",), "colour": ("colour",), "size": ("size",), "position": ("x", "y")}
SCENES = "emoji-food"  # whose scenes tell which factor owns a component


def study_recipe(name: str) -> Recipe:
    return dataclasses.replace(RECIPES["mini-openclip"], **SHARED | STUDIES[name])


def measure(folder: Path, device: str = "cpu") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Of an encoder in a folder: a row for each head, and a row for each task, on validation splits.

    Heads have L, N, their ratio and EVR1 on the reference set, and the share of their first component's variance that
    each factor of drawn scenes explains, and that the class does.
    """
    encoder = load_encoder(str(folder), device=device)
    return _heads(encoder, device), pd.DataFrame(_accuracy(encoder, task) for task in TASKS)


def _heads(encoder: Encoder, device: str) -> pd.DataFrame:
    with tempfile.TemporaryDirectory() as root:
        options = {"root": root, "coordinates": "float32", "progress": False}
        reference = extract(encoder, "reference", split="validation", **options)
        heads = head_dimensions(reference, device=device, progress=False)
        data = load_dataset(SCENES, "validation")
        units = extract(encoder, data, **options)
        levels = factor_levels(data.factors, FACTORS) | {"class": data.labels}
        places = zip(heads["layer"], heads["head"], strict=True)
        first = torch.stack([units.head_scores(layer, head)[:, 0] for layer, head in places], 1)
        for factor, level in levels.items():
            heads[factor] = variance_shares(first, level)[0].tolist()
    return heads


def _accuracy(encoder: Encoder, task: str) -> dict[str, object]:
    data, known = (load_dataset(task, split) for split in ("validation", "train"))
    data, known = data.head(min(1000, len(data))), known.head(min(1000, len(known)))
    outputs = encode_images(encoder, data)
    row = {"task": task, "knn": knn_accuracy((encode_images(encoder, known), known.labels), (outputs, data.labels))[0]}
    if encoder.reads_text:
        row["zero_shot"] = zero_shot_accuracy(outputs, class_encodings(encoder, data), data.labels)[0]
    return row
