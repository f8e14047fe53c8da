"""Writes the model card of a trained encoder: what it is, how it was trained, what it can and cannot do."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from miniature.training.recipes import PATCH, SIZE, TEXT, Recipe
from residual.data.dataset import load_dataset
from residual.encoders.encoder import Encoder, load_encoder
from residual.selection import class_encodings, encode_images, knn_accuracy, zero_shot_accuracy

TASKS = ("emoji-animals", "emoji-food", "emoji-flags", "emoji-faces", "emoji-groups", "digits")
OBJECTIVES = {
    "contrastive": "contrastive, images with captions; every true pair of a batch is a positive",
    "distillation": "DINO's self-distillation on pairs of scenes of one drawing, without names or classes",
    "classification": "cross-entropy over the 1,897 emoji, by a linear layer that is not kept",
}
NAMING = "; and cross-entropy over the 1,897 emoji, by a linear layer that is not kept"
ARTWORK = {
    "twemoji": "Twemoji (CC-BY 4.0)",
    "noto": "Noto Emoji (Apache-2.0)",
    "openmoji": "OpenMoji in colour (CC BY-SA 4.0)",
    "openmoji-line": "OpenMoji in line (CC BY-SA 4.0)",
}


@torch.no_grad()
def write_card(name: str, recipe: Recipe, folder: Path, machine: str) -> None:
    """Measure the encoder in a folder on validation splits and write its README.md. machine: that it was trained on."""
    encoder = load_encoder(str(folder))
    with (folder / "training.csv").open(newline="") as file:
        seconds = [int(row["seconds"]) for row in csv.DictReader(file)][-1]
    objective = OBJECTIVES[recipe.objective] + (NAMING if recipe.identity else "")
    tower, sizes = encoder.tower.root, ("num_hidden_layers", "hidden_size", "num_attention_heads")
    layers, width, heads = (TEXT[size] for size in sizes)
    facts = {
        "name": name, "kind": type(encoder.model).__name__, "size": SIZE, "patch": PATCH, "width": encoder.width,
        "library": "transformers'" if type(encoder.model).__module__.startswith("transformers") else "open_clip's",
        "layers": encoder.layers, "heads": encoder.heads, "head_width": encoder.head_width,
        "output": encoder.output_dim, "image_parameters": sum(p.numel() for p in tower.parameters()) / 1e6,
        "text": f"| text tower | {layers} layers of width {width}, {heads} heads |\n" if encoder.reads_text else "",
        "styles": ", ".join(f"{ARTWORK[style]} {share:.0%}" for style, share in recipe.styles.items()),
        "objective": objective, "steps": recipe.steps, "rate": recipe.rate, "seed": recipe.seed,
        "images": recipe.batch * (2 if recipe.objective == "distillation" else 1),
        "seconds": seconds, "machine": machine,
        "measure": "zero-shot accuracy" if encoder.reads_text else "accuracy by ten nearest neighbours",
        "accuracies": "\n".join(_accuracy(encoder, task) for task in TASKS),
        "words": ", and English as far as emoji have names and keywords" if encoder.reads_text else "",
    }  # fmt: skip
    (folder / "README.md").write_text(Path(__file__).with_suffix(".md").read_text().format(**facts))


def _accuracy(encoder: Encoder, task: str) -> str:
    """A row of the card."""
    data = load_dataset(task, "validation")
    outputs = encode_images(encoder, data)
    if encoder.reads_text:
        share, error = zero_shot_accuracy(outputs, class_encodings(encoder, data), data.labels)
    else:
        known = load_dataset(task, "train")
        share, error = knn_accuracy((encode_images(encoder, known), known.labels), (outputs, data.labels))
    return f"| {task}, {len(data.classes)} classes | {share:.2f}, standard error {error:.2f} |"
