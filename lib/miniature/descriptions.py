"""The embedded dictionary of image descriptions: all combinations of the words of descriptions.yml."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path

import yaml

from miniature.emoji import vocabulary
from miniature.scenes import COLOURS


def compose() -> Iterator[str]:
    """Descriptions, of which some may repeat."""
    parts = yaml.safe_load(Path(__file__).with_suffix(".yml").read_text())
    words = parts["words"] | {"colour": list(COLOURS)}
    words["colour_pair"] = [f"{first} and {second}" for first, second in combinations(COLOURS, 2)]
    words["emoji"] = [item.name for item in vocabulary() if item.group in parts["emoji"]]
    for pattern in parts["patterns"]:
        slots = re.findall(r"\{(?:a:)?(\w+)\}", pattern)
        articles = ["a:" + slot in pattern for slot in slots]
        text = re.sub(r"\{[^}]*\}", "{}", pattern)
        for combination in product(*(words[slot] for slot in slots)):
            yield text.format(*(_a(word) if a else word for word, a in zip(combination, articles, strict=True)))


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
