"""Captions for drawn scenes, and which images each caption is true of.

A caption names a concept (an emoji, a keyword, a group) and sometimes the style,
the backdrop or the size. It counts as a match for every image in the batch that it
correctly describes, not only for the one it was written for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from miniature.emoji import GROUP_WORDS, Artwork, load_tags, vocabulary
from miniature.scenes import BACKDROPS, COLOURS, Draws

STYLE_WORDS = ("flat drawing", "glossy drawing", "outlined drawing", "line drawing")
OPENINGS = ("", "", "a picture of ", "a photo of ", "an emoji of ", "an image of ", "an icon of ")
ANY = -1  # a factor that the caption does not mention


@dataclass(frozen=True)
class Concepts:
    """All that a caption can name: `words[i]` is true of the emoji in row `i` of `members`."""

    words: tuple[str, ...]
    members: Bool[Tensor, "concepts emoji"]
    by_emoji: tuple[tuple[int, ...], ...]  # the keywords of each emoji


def load_concepts(npm: Path) -> Concepts:
    """Names of all emoji first (concept i is emoji i), then groups, then keywords."""
    items, tags = vocabulary(), load_tags(npm)
    keywords = sorted(set().union(*tags))
    words = [item.name for item in items] + list(GROUP_WORDS.values()) + keywords
    position = {word: len(items) + len(GROUP_WORDS) + i for i, word in enumerate(keywords)}
    members = torch.zeros(len(words), len(items), dtype=torch.bool)
    members[range(len(items)), range(len(items))] = True
    for index, (item, words_of) in enumerate(zip(items, tags, strict=True)):
        members[len(items) + list(GROUP_WORDS).index(item.group), index] = True
        members[[position[tag] for tag in words_of], index] = True
    return Concepts(tuple(words), members, tuple(tuple(sorted(position[t] for t in words_of)) for words_of in tags))


@dataclass(frozen=True)
class Captions:
    texts: list[str]
    positives: Bool[Tensor, "n n"]  # [image, caption]


def write_captions(
    concepts: Concepts, artwork: Artwork, drawn: Int[Tensor, "n"], draws: Draws, generator: torch.Generator
) -> Captions:
    """One caption for each image. drawn: rows of `artwork`."""
    owner, style = artwork.emoji[drawn], artwork.style[drawn]
    size = torch.where(draws.size < 0.65, 0, torch.where(draws.size > 0.9, 1, 2))
    backdrop = draws.kind
    plain = backdrop == 0
    colour = torch.where(plain, draws.colour, len(COLOURS))
    rolls = torch.rand(len(drawn), 6, generator=generator).tolist()
    rows, texts = [], []
    for i, roll in enumerate(rolls):
        concept = _concept(concepts, int(owner[i]), roll[0], roll[1])
        said = {
            "style": int(style[i]) if roll[2] < 0.15 else ANY,
            "backdrop": int(backdrop[i]) if roll[3] < 0.12 or concept == ANY else ANY,
            "size": int(size[i]) if roll[4] < 0.08 and size[i] < 2 else ANY,
        }
        said["colour"] = int(colour[i]) if said["backdrop"] == 0 else ANY
        rows.append([concept, *said.values()])
        opening = OPENINGS[int(roll[5] * len(OPENINGS))]
        texts.append(_phrase(concepts.words[concept] if concept != ANY else "something", opening, **said))
    concept, *rest = torch.tensor(rows).T
    positives = concepts.members[concept][:, owner].T | (concept == ANY)
    for factor, value in zip((style, backdrop, size, colour), rest, strict=True):
        positives = positives & ((value == ANY) | (factor[:, None] == value))
    return Captions(texts, positives)


def _concept(concepts: Concepts, owner: int, kind: float, pick: float) -> int:
    keywords = concepts.by_emoji[owner]
    if kind < 0.72:
        return owner
    if kind < 0.84 and keywords:
        return keywords[int(pick * len(keywords))]
    if kind < 0.94:
        return len(vocabulary()) + list(GROUP_WORDS).index(vocabulary()[owner].group)
    return ANY


def _phrase(word: str, opening: str, style: int, backdrop: int, size: int, colour: int) -> str:
    text = f"a {STYLE_WORDS[style]} of {word}" if style != ANY else f"{opening}{word}"
    if size != ANY:
        text = f"{('small', 'big')[size]}, {text}"
    if backdrop != ANY:
        kind = BACKDROPS[backdrop] if colour == ANY else list(COLOURS)[colour]
        text += f" on a {kind} background" if kind != "photograph" else " on a photograph"
    return text
