"""Writes the model card of a trained encoder: what it is, how it was made, what it can and cannot do."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from residual.data import load_dataset
from residual.encoders import load_encoder
from residual.selection import class_encodings, encode_images, knn_accuracy, zero_shot_accuracy
from residual.zoo.recipes import PATCH, SIZE, TEXT, Recipe

TASKS = ("emoji-animals", "emoji-food", "emoji-flags", "emoji-faces", "emoji-groups", "digits")
OBJECTIVES = {
    "contrastive": "contrastive, images with captions; every true pair of a batch is a positive",
    "distillation": "DINO's self-distillation on pairs of scenes of one drawing, without names or classes",
    "classification": "cross-entropy over the 1,897 emoji, by a linear layer that is not kept",
}
ARTWORK = {
    "twemoji": "Twemoji (CC-BY 4.0)",
    "noto": "Noto Emoji (Apache-2.0)",
    "openmoji": "OpenMoji in colour (CC BY-SA 4.0)",
    "openmoji-line": "OpenMoji in line (CC BY-SA 4.0)",
}
CARD = """# {name}

{library} `{kind}` at a small size, trained by this project. Not one of the paper's encoders.

| | |
|---|---|
| image tower | {size} px, patch {patch}, width {width}, {layers} layers of {heads} heads of {head_width}, \
output {output}; {image_parameters:.1f} M parameters |
{text}| data | scenes drawn anew at each step, of {styles} |
| objective | {objective} |
| training | {steps:,} steps of {images} scenes, AdamW {rate:g} with cosine, bfloat16 autocast, seed {seed}; \
{tokens:.0%} of the patches until the last tenth of the steps |
| time | {seconds:,} seconds |
| weights | half precision, safetensors |

| validation split | {measure} |
|---|---|
{accuracies}

Accuracy on test splits is in the book's chapter *The zoo*. Loss by step: `training.csv`.

**Limits.** It knows emoji{words}, in scenes like those it was trained on. It has seen no photographs but crops of
two, as backdrops. What is far from emoji it tells apart poorly.
"""


@torch.no_grad()
def write_card(name: str, recipe: Recipe, folder: Path) -> None:
    """Measure the encoder in a folder on validation splits and write its README.md."""
    encoder = load_encoder(str(folder))
    by_words = encoder.tokenize is not None
    with (folder / "training.csv").open(newline="") as file:
        seconds = [int(row["seconds"]) for row in csv.DictReader(file)][-1]
    rows = []
    for task in TASKS:
        data = load_dataset(task, "validation")
        outputs = encode_images(encoder, data)
        if by_words:
            share, error = zero_shot_accuracy(outputs, class_encodings(encoder, data), data.labels)
        else:
            known = load_dataset(task, "train")
            share, error = knn_accuracy((encode_images(encoder, known), known.labels), (outputs, data.labels))
        rows.append(f"| {task}, {len(data.classes)} classes | {share:.2f}, standard error {error:.2f} |")
    tower = encoder.tower.root
    text = (
        f"| text tower | {TEXT['num_hidden_layers']} layers of width {TEXT['hidden_size']}, "
        f"{TEXT['num_attention_heads']} heads |\n"
    )
    (folder / "README.md").write_text(
        CARD.format(
            name=name,
            library="transformers'" if type(encoder.model).__module__.startswith("transformers") else "open_clip's",
            kind=type(encoder.model).__name__,
            size=SIZE,
            patch=PATCH,
            width=encoder.width,
            layers=encoder.layers,
            heads=encoder.heads,
            head_width=encoder.head_width,
            output=encoder.output_dim,
            image_parameters=sum(p.numel() for p in tower.parameters()) / 1e6,
            text=text if by_words else "",
            styles=", ".join(f"{ARTWORK[style]} {share:.0%}" for style, share in recipe.styles.items()),
            objective=OBJECTIVES[recipe.objective],
            steps=recipe.steps,
            images=recipe.batch * (2 if recipe.objective == "distillation" else 1),
            rate=recipe.rate,
            seed=recipe.seed,
            tokens=recipe.tokens,
            seconds=seconds,
            measure="zero-shot accuracy" if by_words else "accuracy by ten nearest neighbours",
            accuracies="\n".join(rows),
            words=", and English as far as emoji have names and keywords" if by_words else "",
        )
    )
