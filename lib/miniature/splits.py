"""What splits share: how images and artworks are divided, from seeds that depend on names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

SHARES = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}  # of artworks, where they are divided


def balanced(count: int, classes: int, generator: torch.Generator) -> Int64[Tensor, "n"]:
    """Labels in random order, each class equally often, to within one. Few images come from all classes."""
    if count < classes:
        return torch.randperm(classes, generator=generator)[:count]
    return (torch.arange(count) % classes)[torch.randperm(count, generator=generator)]


def divide(items: Sequence[int], split: str, key: str) -> list[int]:
    """The items of a split, which the key decides; no item is in two splits."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed_of(key))).tolist()
    low, high = (round(share * len(items)) for share in SHARES[split])
    return [items[i] for i in order[low:high]]


def seed_of(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")
