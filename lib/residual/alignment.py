"""Aligning image encodings with class encodings by training a little on top of a frozen encoder."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn

EPOCHS, PATIENCE, BATCH, RATE = 30, 5, 64, 1e-2


class LinearAligner(nn.Linear):
    """The paper's Lin: a map of the output onto itself, the identity before training. d^2 + d parameters."""

    def __init__(self, dimension: int) -> None:
        super().__init__(dimension, dimension)
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)


def fit(
    aligner: nn.Module,
    train: tuple[Float[Tensor, "n d"], Int64[Tensor, "n"]],
    validation: tuple[Float[Tensor, "m d"], Int64[Tensor, "m"]],
    classes: Float[Tensor, "c d"],
    *,
    scale: float = 100.0,
    seed: int = 0,
) -> float:
    """Train an aligner by the cross-entropy of scaled cosines with frozen class encodings (section 4.2).

    train, validation: encodings and labels. AdamW-ScheduleFree, at most 30 epochs; ends after 5
    without a better accuracy on the validation split, and restores the best.
    Returns the best validation accuracy.
    """
    optimizer = AdamWScheduleFree(aligner.parameters(), lr=RATE, warmup_steps=20)
    generator = torch.Generator().manual_seed(seed)
    best, kept, since = -1.0, {}, 0
    inputs, labels = train
    for _ in range(EPOCHS):
        optimizer.train()
        for rows in torch.randperm(len(inputs), generator=generator).split(BATCH):
            loss = F.cross_entropy(scale * F.normalize(aligner(inputs[rows]), dim=1) @ classes.T, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        optimizer.eval()
        with torch.no_grad():
            hits = (aligner(validation[0]) @ classes.T).argmax(1) == validation[1]
        accuracy, since = hits.double().mean().item(), since + 1
        if accuracy > best:
            best, kept, since = accuracy, copy.deepcopy(aligner.state_dict()), 0
        if since == PATIENCE:
            break
    aligner.load_state_dict(kept)
    return best
