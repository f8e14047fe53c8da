"""The fourteen embedded data sets: drawn from Twemoji, from formulas and fonts, or shipped with a package.

They take the roles of the paper's fourteen. Every builder gets the split it draws, how many
images, and a generator of its own. Where the label is not the identity of an artwork (a drawing, a font, a place in a
photograph), artworks are divided among the splits, so that none can be learnt by heart.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import matplotlib
import skimage.data
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from residual.artwork import GROUP_WORDS, SPRITE, Emoji, load_artwork, vocabulary
from residual.render import BACKDROPS, COLOURS, RESTYLES, Scene, backdrops, draw_scenes, restyle, to_bytes
from residual.shapes import BACKGROUNDS, HUES, PATTERNS, SHAPES, ShapeScene, combination_names, draw_shapes
from residual.textures import TEXTURES, draw_textures

SIZE = 48  # pixels a side
COUNTS = {"train": 4_000, "validation": 1_000, "test": 2_000}
MANY = COUNTS | {"train": 10_000}
SHARES = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}  # of artworks, where they are divided
CHUNK = 500  # images drawn at once

TEMPLATES = ("{}", "a picture of {}", "a photo of {}", "an emoji of {}", "an image of {}", "an icon of {}")
SHAPE_TEMPLATES = ("a {}", "a picture of a {}", "an image of a {}")
PROPERTY_TEMPLATES = ("{}", "something {}", "a {} shape", "a {} symbol", "a picture of something {}")
STYLE_NAMES = ("a colour drawing", "a grey drawing", "a line drawing", "a silhouette", "blocky pixels", "a negative")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBER_NAMES = tuple(f"the number {i}, {word}" for i, word in enumerate(NUMBERS))
PHOTOGRAPHS = {  # functions of skimage.data, of which all ship with the package
    "astronaut": "an astronaut",
    "brick": "a brick wall",
    "camera": "a man with a camera",
    "chelsea": "a cat",
    "coffee": "a cup of coffee",
    "coins": "ancient coins",
    "grass": "grass",
    "gravel": "gravel",
    "hubble_deep_field": "galaxies in the night sky",
    "immunohistochemistry": "stained tissue under a microscope",
    "moon": "the surface of the moon",
    "page": "a printed page",
    "retina": "the retina of an eye",
    "rocket": "a rocket on its launch pad",
    "stereo_motorcycle": "a motorcycle",
}
CELLS = 6  # a photograph is cut into CELLS x CELLS pieces, which are divided among the splits
FONTS = (  # shipped with matplotlib; each has a shape of its own for the numerals
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmr10", "cmb10", "cmss10", "cmtt10",
)  # fmt: skip


@dataclass(frozen=True)
class Factor:
    """One thing that images were drawn from: an index into `names`, or, where there are none, a measure."""

    values: Tensor
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Content:
    images: UInt8[Tensor, "n 3 s s"]
    labels: Int64[Tensor, "n"]
    classes: tuple[str, ...]
    factors: dict[str, Factor] = field(default_factory=dict)


Build = Callable[[str, int, torch.Generator, int], Content]  # split, count, generator, seed


@dataclass(frozen=True)
class Entry:
    """A data set. tasks: factors that can be asked for in place of the class, with their prompt templates."""

    build: Build
    role: str
    about: str
    templates: tuple[str, ...] = TEMPLATES
    tasks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: COUNTS)


@functools.cache
def _twemoji() -> UInt8[Tensor, "a 4 72 72"]:
    return load_artwork().sprites  # in the order of the vocabulary


@functools.cache
def _distinct() -> tuple[int, ...]:
    """The emoji less those whose drawing another has: France's flag is Clipperton's too. The shortest name stays."""
    names: dict[bytes, int] = {}
    for index in sorted(range(len(vocabulary())), key=lambda i: len(vocabulary()[i].name)):
        names.setdefault(_twemoji()[index].numpy().tobytes(), index)
    return tuple(sorted(names.values()))


def _members(keep: Callable[[Emoji], bool]) -> list[int]:
    return [i for i in _distinct() if keep(vocabulary()[i])]


def _emoji(keep: Callable[[Emoji], bool]) -> Build:
    """Scenes of the emoji that `keep` keeps; the class is which one."""

    def build(split: str, count: int, generator: torch.Generator, seed: int) -> Content:
        members = _members(keep)
        labels = _balanced(count, len(members), generator)
        scene = _scenes(_twemoji()[torch.tensor(members)[labels]], generator)
        return Content(scene.images, labels, tuple(vocabulary()[i].name for i in members), _scene_factors(scene))

    return build


def _emoji_groups(split: str, count: int, generator: torch.Generator, seed: int) -> Content:
    labels, artwork = _draw_groups(split, count, generator, seed)
    scene = _scenes(_twemoji()[artwork], generator)
    return Content(
        scene.images, labels, tuple(GROUP_WORDS.values()), _scene_factors(scene) | {"artwork": Factor(artwork)}
    )


def _styles(split: str, count: int, generator: torch.Generator, seed: int) -> Content:
    labels, artwork = _draw_groups(split, count, generator, seed)
    style = _balanced(count, len(RESTYLES), generator)
    scene = _scenes(_restyled(_twemoji()[artwork], style), generator)
    factors = {"style": Factor(style, STYLE_NAMES), "artwork": Factor(artwork)} | _scene_factors(scene)
    return Content(scene.images, labels, tuple(GROUP_WORDS.values()), factors)


def _sketch(split: str, count: int, generator: torch.Generator, seed: int) -> Content:
    members = _members(lambda e: e.group == "Animals & Nature")
    labels = _balanced(count, len(members), generator)
    paper = (0.93 + 0.03 * torch.randn(count, 3, 1, 1, generator=generator)).expand(-1, -1, SIZE, SIZE)
    artwork = torch.tensor(members)[labels]
    drawings = torch.cat([restyle(_twemoji()[part], "line") for part in artwork.split(CHUNK)])
    scene = draw_scenes(drawings, generator=generator, onto=paper.clamp(0, 1), size=SIZE)
    factors = {name: factor for name, factor in _scene_factors(scene).items() if name not in ("backdrop", "colour")}
    return Content(scene.images, labels, tuple(vocabulary()[i].name for i in members), factors)


def _shapes(split: str, count: int, generator: torch.Generator, seed: int) -> Content:
    names = combination_names()
    labels = _balanced(count, len(names), generator)
    scene = _joined([draw_shapes(part, generator=generator, size=SIZE) for part in labels.split(CHUNK)])
    named = {"shape": SHAPES, "colour": HUES, "pattern": PATTERNS, "background": BACKGROUNDS}
    factors = {name: Factor(getattr(scene, name), values) for name, values in named.items()} | _geometry(scene)
    return Content(scene.images, labels, names, factors)


def _textures(split: str, count: int, generator: torch.Generator, seed: int) -> Content:
    labels = _balanced(count, len(TEXTURES), generator)
    images = [draw_textures(part, generator=generator, size=SIZE) for part in labels.split(CHUNK)]
    return Content(torch.cat(images), labels, TEXTURES)


def _numerals(split: str, count: int, generator: torch.Generator, seed: int) -> Content:
    """Like house numbers: a numeral, half of them with neighbours, in a font of this split, on clutter."""
    labels = _balanced(count, len(NUMBERS), generator)
    fonts = torch.tensor(_divide(range(len(FONTS)), split, f"numerals/{seed}"))
    font = fonts[torch.randint(len(fonts), (count,), generator=generator)]
    neighbours = torch.randint(10, (count, 2), generator=generator).tolist()
    alone = (torch.rand(count, generator=generator) < 0.5).tolist()
    ink = torch.randint(256, (count, 3), generator=generator).tolist()
    sprites = torch.stack(
        [
            _numeral(FONTS[own], str(digit), ("", "") if single else tuple(map(str, beside)), tuple(colour))
            for own, digit, beside, single, colour in zip(
                font.tolist(), labels.tolist(), neighbours, alone, ink, strict=True
            )
        ]
    )
    scene = _scenes(sprites, generator)
    return Content(scene.images, labels, NUMBER_NAMES, {"artwork": Factor(font, FONTS)} | _scene_factors(scene))


def _digits(split: str, count: int, generator: torch.Generator, seed: int) -> Content:
    source = load_digits()
    rows = range(len(source.target))
    train, rest = train_test_split(rows, test_size=0.4, stratify=source.target, random_state=seed)
    validation, test = train_test_split(rest, test_size=0.5, stratify=source.target[rest], random_state=seed)
    chosen: Sequence[int] = {"train": train, "validation": validation, "test": test}[split]
    grey = torch.tensor(source.images[chosen], dtype=torch.float32)[:, None] / 16
    images = to_bytes(F.interpolate(grey, SIZE, mode="bicubic").expand(-1, 3, -1, -1))
    return Content(images, torch.tensor(source.target[chosen]), NUMBER_NAMES)


def _photographs(split: str, count: int, generator: torch.Generator, seed: int) -> Content:
    labels = _balanced(count, len(PHOTOGRAPHS), generator)
    images, cells = _photo_crops(labels, split, generator, seed)
    return Content(images, labels, tuple(PHOTOGRAPHS.values()), {"artwork": Factor(cells)})


def _noise(split: str, count: int, generator: torch.Generator, seed: int) -> Content:
    images = torch.randint(256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return Content(images, torch.zeros(count, dtype=torch.int64), ("random pixels",))


KINDS = (*GROUP_WORDS.values(), "photograph", "texture", "shape", "number")


def _reference(split: str, count: int, generator: torch.Generator, seed: int) -> Content:
    """Of everything: three quarters emoji in all styles, alone and in company, the rest of the other kinds."""
    other = count // 16
    emoji = count - 4 * other
    labels, artwork = _draw_groups(split, emoji, generator, seed)
    style = torch.where(torch.rand(emoji, generator=generator) < 0.5, 0, _balanced(emoji, len(RESTYLES), generator))
    sprites = _restyled(_twemoji()[artwork], style)
    images = []
    for part in sprites.split(CHUNK):
        ground = _grounds(len(part), split, generator, seed)
        for low in (0.2, 0.3):  # company, one behind the other, before half of the grounds
            more = draw_scenes(
                part[torch.randperm(len(part), generator=generator)],
                generator=generator, onto=ground, sizes=(low, low + 0.25), size=SIZE,
            ).images / 255  # fmt: skip
            with_company = torch.rand(len(part), 1, 1, 1, generator=generator) < 0.5
            ground = torch.where(with_company, more, ground)
        images.append(draw_scenes(part, generator=generator, onto=ground, sizes=(0.4, 1.0), size=SIZE).images)
    photographs = _photo_crops(torch.randint(len(PHOTOGRAPHS), (other,), generator=generator), split, generator, seed)
    rest = [
        photographs[0],
        _textures(split, other, generator, seed).images,
        _shapes(split, other, generator, seed).images,
        _numerals(split, other, generator, seed).images,
    ]
    labels = torch.cat([labels, torch.arange(len(GROUP_WORDS), len(KINDS)).repeat_interleave(other)])
    artwork = torch.cat([artwork, torch.full((4 * other,), -1)])
    order = torch.randperm(count, generator=generator)
    return Content(torch.cat([*images, *rest])[order], labels[order], KINDS, {"artwork": Factor(artwork[order])})


def _grounds(n: int, split: str, generator: torch.Generator, seed: int) -> Float[Tensor, "n 3 s s"]:
    """What the emoji of the reference set stand on: photographs, textures, drawn backdrops and plain white."""
    which = torch.randint(len(PHOTOGRAPHS), (n,), generator=generator)
    colour = torch.randint(len(COLOURS), (n,), generator=generator)
    texture = torch.randint(len(TEXTURES), (n,), generator=generator)
    choices = torch.stack(
        [
            _photo_crops(which, split, generator, seed)[0] / 255,
            draw_textures(texture, generator=generator, size=SIZE) / 255,
            backdrops(torch.randint(len(BACKDROPS), (n,), generator=generator), colour, SIZE, generator),
            torch.ones(n, 3, SIZE, SIZE),
        ]
    )
    chosen = torch.multinomial(torch.tensor([0.4, 0.15, 0.25, 0.2]), n, replacement=True, generator=generator)
    return choices[chosen, torch.arange(n)]


def _balanced(count: int, classes: int, generator: torch.Generator) -> Int64[Tensor, "n"]:
    """Labels in random order, each class as often as the others, give or take one."""
    return (torch.arange(count) % classes)[torch.randperm(count, generator=generator)]


def _divide(items: Sequence[int], split: str, key: str) -> list[int]:
    """The items that belong to a split: the same for everyone who asks with this key, and in no other split."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed_of(key))).tolist()
    low, high = (round(share * len(items)) for share in SHARES[split])
    return [items[i] for i in order[low:high]]


def seed_of(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")


def _draw_groups(split: str, count: int, generator: torch.Generator, seed: int) -> tuple[Tensor, Tensor]:
    """Groups of emoji, and for each an emoji of this split: whose drawings are in no other split."""
    labels = _balanced(count, len(GROUP_WORDS), generator)
    artwork = torch.empty_like(labels)
    for index, group in enumerate(GROUP_WORDS):
        members = _members(lambda e, group=group: e.group == group)
        own = torch.tensor(_divide(members, split, f"emoji/{group}/{seed}"))
        rows = labels == index
        artwork[rows] = own[torch.randint(len(own), (int(rows.sum()),), generator=generator)]
    return labels, artwork


def _restyled(sprites: UInt8[Tensor, "n 4 p p"], style: Int64[Tensor, "n"]) -> UInt8[Tensor, "n 4 p p"]:
    drawn = torch.empty_like(sprites)
    for index, name in enumerate(RESTYLES):
        rows = (style == index).nonzero().flatten()
        for part in rows.split(CHUNK):
            drawn[part] = restyle(sprites[part], name)
    return drawn


def _scenes(sprites: UInt8[Tensor, "n 4 p p"], generator: torch.Generator) -> Scene:
    return _joined([draw_scenes(part, generator=generator, size=SIZE) for part in sprites.split(CHUNK)])


def _joined(parts: list) -> Scene | ShapeScene:
    return type(parts[0])(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(parts[0])))


def _scene_factors(scene: Scene) -> dict[str, Factor]:
    named = {"backdrop": Factor(scene.backdrop, BACKDROPS), "colour": Factor(scene.colour, tuple(COLOURS))}
    return named | _geometry(scene)


def _geometry(scene: Scene | ShapeScene) -> dict[str, Factor]:
    x, y = scene.position.T
    return {"size": Factor(scene.size), "angle": Factor(scene.angle), "x": Factor(x), "y": Factor(y)}


def _numeral(font: str, digit: str, beside: tuple[str, str], ink: tuple[int, int, int]) -> UInt8[Tensor, "4 72 72"]:
    face = _font(font)
    image = Image.new("RGBA", (SPRITE, SPRITE), (*ink, 0))
    draw = ImageDraw.Draw(image)
    rim = (255, 255, 255) if sum(ink) < 383 else (0, 0, 0)
    width = face.getlength(digit)
    for text, left in ((digit, 0.0), (beside[0], -width), (beside[1], width)):
        place = (SPRITE / 2 + left, SPRITE / 2)
        draw.text(place, text, font=face, fill=(*ink, 255), stroke_width=2, stroke_fill=(*rim, 255), anchor="mm")
    return pil_to_tensor(image)


@functools.cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{name}.ttf", 56)


@functools.cache
def _photograph(name: str) -> Float[Tensor, "3 h w"]:
    image = getattr(skimage.data, name)()
    image = torch.tensor(image[0] if isinstance(image, tuple) else image)  # a stereo pair and its disparities
    return (image[:, :, None].expand(-1, -1, 3) if image.ndim == 2 else image).permute(2, 0, 1).float()


def _photo_crops(
    which: Int64[Tensor, "n"], split: str, generator: torch.Generator, seed: int
) -> tuple[UInt8[Tensor, "n 3 s s"], Int64[Tensor, "n"]]:
    """Square crops, each inside one cell of this split, and which cell of which photograph."""
    images, cells = torch.empty(len(which), 3, SIZE, SIZE), torch.empty_like(which)
    zoom = 0.6 + 0.4 * torch.rand(len(which), generator=generator)
    place = torch.rand(len(which), 2, generator=generator)
    for index, name in enumerate(PHOTOGRAPHS):
        photograph = _photograph(name)
        height, width = (side // CELLS for side in photograph.shape[1:])
        own = torch.tensor(_divide(range(CELLS**2), split, f"{name}/{seed}"))
        for row in (which == index).nonzero().flatten().tolist():
            cell = int(own[torch.randint(len(own), (1,), generator=generator)])
            side = int(zoom[row] * min(height, width))
            top = cell // CELLS * height + int(place[row, 0] * (height - side))
            left = cell % CELLS * width + int(place[row, 1] * (width - side))
            crop = photograph[None, :, top : top + side, left : left + side]
            images[row] = F.interpolate(crop, SIZE, mode="bilinear", antialias=True)[0]
            cells[row] = index * CELLS**2 + cell
    return to_bytes(images / 255), cells


ENTRIES = {
    "reference": Entry(
        _reference, "ImageNet", "A little of everything: emoji of all groups and styles, alone and in company, on "
        "photographs, textures and drawn backdrops; photographs, textures, shapes and numbers.", counts=MANY
    ),
    "emoji-animals": Entry(
        _emoji(lambda e: e.group == "Animals & Nature"), "CIFAR-100", "Twemoji's animals and plants in scenes."
    ),
    "emoji-food": Entry(_emoji(lambda e: e.group == "Food & Drink"), "SUN397", "Twemoji's food and drink in scenes."),
    "emoji-flags": Entry(_emoji(lambda e: e.group == "Flags"), "Cars", "Twemoji's flags in scenes."),
    "emoji-faces": Entry(
        _emoji(lambda e: e.group == "Smileys & Emotion" and "face" in e.name),
        "GTSRB", "Twemoji's faces in scenes: alike, and told apart by small signs."
    ),
    "emoji-groups": Entry(
        _emoji_groups, "CIFAR-10", "All of Twemoji by Unicode group. A drawing is in one split only."
    ),
    "sketch": Entry(
        _sketch, "ImageNet-Sketch", "The edges of Twemoji's animals and plants, as ink on paper.",
        ("a sketch of {}", "a line drawing of {}", "a drawing of {}", "an outlined drawing of {}", "{}"),
    ),
    "styles": Entry(
        _styles, "PACS", "Emoji by group in six styles: colour, grey, line, silhouette, blocky and negative. "
        "A drawing is in one split only.", tasks={"style": ("{}", "{} of something", "a picture: {}")},
    ),
    "shapes": Entry(
        _shapes, "the paper's Figure 1", "Eight shapes in eight colours and four patterns, on black, grey or white.",
        SHAPE_TEMPLATES,
        {"shape": SHAPE_TEMPLATES, "colour": PROPERTY_TEMPLATES, "pattern": PROPERTY_TEMPLATES},
    ),
    "numerals": Entry(
        _numerals, "SVHN", "Numerals in matplotlib's fonts on clutter, half of them with neighbours. "
        "A font is in one split only.",
    ),
    "digits": Entry(_digits, "MNIST", "scikit-learn's 1,797 digits, written by 43 people, enlarged from 8 x 8 pixels."),
    "textures": Entry(
        _textures, "DTD", "Twelve patterns drawn from formulas, in two random colours.",
        ("{}", "a {} texture", "a {} pattern", "a {} background"),
    ),
    "photographs": Entry(
        _photographs, "EuroSAT, RESISC45", "Crops of the fifteen photographs that ship with scikit-image. "
        "A place in a photograph is in one split only.",
    ),
    "random": Entry(_noise, "random images", "Every value of every pixel drawn alike, as in the paper.", counts=MANY),
}  # fmt: skip
