"""Joins a vision tower to a reader: two linear maps, trained by contrast on captioned scenes, both towers frozen.

`python -m miniature train dinov2-minilm`. Images and captions are encoded once and kept, so a training takes minutes.
The same maps are trained for the tower with random weights, as a control. Source: Zhai et al. (2022).
"""

from __future__ import annotations

import csv
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from jaxtyping import Float, Int64
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from tqdm import tqdm

from miniature.emoji import GROUP_WORDS, vocabulary
from miniature.scenes import BACKDROPS, COLOURS
from miniature.sets import NUMBER_NAMES, Content, draw, drawing_key
from miniature.shapes import BACKGROUNDS, HUES, PATTERNS, SHAPES
from miniature.textures import TEXTURES
from miniature.training.objectives import contrastive_loss
from residual.data.dataset import load_dataset
from residual.data.names import split_task
from residual.encoders.encoder import load_encoder
from residual.encoders.from_joined import load_reader, read
from residual.encoders.names import Joining, joined_file, joining
from residual.files import write_bytes
from residual.selection import class_encodings, encode_images, zero_shot_accuracy
from residual.tensors import cache_key

CARD_TASKS = (
    "emoji-animals", "emoji-food", "emoji-flags", "emoji-faces", "emoji-groups", "shapes-shape", "shapes-colour",
    "shapes-pattern", "textures", "numerals", "digits", "sketch", "styles-style", "photographs",
)  # fmt: skip
CARD_IMAGES = 300
KINDS = ("trained", "random")  # weights of the tower
UNKNOWN = -1  # an attribute that an image does not have, or a caption does not mention
GROUNDS = tuple(f"{name} background" for name in (*COLOURS, *BACKDROPS[1:]))
WORDS = {
    "emoji": tuple(item.name for item in vocabulary()), "group": tuple(GROUP_WORDS.values()), "ground": GROUNDS,
    "shape": SHAPES, "colour": HUES, "pattern": PATTERNS, "background": BACKGROUNDS, "texture": TEXTURES,
    "number": NUMBER_NAMES,
}  # fmt: skip


@dataclass(frozen=True)
class JoinRecipe:
    """side: pixels of the images. width: of the common space. captions: of each image, drawn before training."""

    side: int = 112
    width: int = 256
    captions: int = 6
    steps: int = 4000
    batch: int = 1024
    rate: float = 2e-3
    decay: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Captioned:
    """Encodings of images by each tower, and of captions; which caption says what, and is whose.

    attributes, said: by the order of WORDS; UNKNOWN where an image has none, or a caption is silent.
    """

    images: dict[str, Float[Tensor, "n w"]]
    texts: Float[Tensor, "t v"]
    attributes: Int64[Tensor, "n a"]
    said: Int64[Tensor, "t a"]
    captions: Int64[Tensor, "n k"]


def train_joined(
    name: str, out: Path, recipe: JoinRecipe, *, device: str = "cpu", worlds: dict[str, Any] | None = None
) -> None:
    """Train the maps of a joined encoder, and those of its random control, into the folder `out`.

    name: of an installed source, or a folder with joined.json. worlds: as joining.yml has them, by default those.
    Raises FileNotFoundError where a part's package is missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_bytes(out / "joined.json", joined_file(name).read_bytes())
    worlds = worlds or yaml.safe_load(Path(__file__).with_suffix(".yml").read_text())["worlds"]
    data, rows = _captioned(name, out, recipe, device, worlds), []
    for kind, images in data.images.items():
        maps, log = _maps(images.to(device), data, recipe, kind)
        half = {key: value.half().cpu().contiguous() for key, value in maps.items()}
        save_file(half, out / ("maps.safetensors" if kind == "trained" else "maps-random.safetensors"))
        rows += log
    with (out / "training.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    about = json.dumps({"recipe": vars(recipe), "scenes": len(data.attributes), "captions": len(data.texts)}, indent=2)
    write_bytes(out / "recipe.json", (about + "\n").encode())


def write_joined_card(name: str, out: Path) -> None:
    """Measure a joined encoder and its control on validation splits, and write its README.md."""
    about, parts, outputs = json.loads((out / "recipe.json").read_text()), joining(name), {}
    recipe, rows = about["recipe"], []
    encoders = [load_encoder(f"{out}{tag}", seed=parts.random_seed).at_size(recipe["side"]) for tag in ("", "@random")]
    for task in CARD_TASKS:
        data = load_dataset(task, "validation", size=recipe["side"], count=CARD_IMAGES)
        base, _ = split_task(task)
        if base not in outputs:  # tasks of one set have the same images
            outputs[base] = [encode_images(encoder, data) for encoder in encoders]
        pairs = zip(encoders, outputs[base], strict=True)
        shares = [zero_shot_accuracy(found, class_encodings(encoder, data), data.labels) for encoder, found in pairs]
        cells = " | ".join(f"{share:.2f}, standard error {error:.2f}" for share, error in shares)
        rows.append(f"| {task}, {len(data.classes)} classes | {cells} |")
    facts = {"name": name, "vision": parts.vision, "reader": parts.reader, "package": parts.weights.package}
    text = Path(__file__).with_suffix(".md").read_text().format(**facts, **about, rows="\n".join(rows))
    write_bytes(out / "README.md", text.encode())


def _captioned(name: str, out: Path, recipe: JoinRecipe, device: str, worlds: dict[str, Any]) -> Captioned:
    """Scenes and captions, encoded or as they were kept."""
    parts, generator = joining(name), torch.Generator().manual_seed(recipe.seed)
    scenes, lines = [], []
    for world, about in tqdm(worlds.items(), desc="scenes", unit="set"):
        for seed in about["seeds"]:
            scenes.append(_scenes(out, parts, recipe, device, world, seed, about["count"]))
            rows = scenes[-1]["attributes"].tolist()
            lines += [_captions(about["captions"], row, recipe.captions, generator) for row in rows]
    places = {line: place for place, line in enumerate(dict.fromkeys(line for own in lines for line in own))}
    images = {kind: torch.cat([part[kind] for part in scenes]) for kind in KINDS}
    attributes = torch.cat([part["attributes"] for part in scenes])
    texts = _encoded_texts(out, parts, [text for text, _ in places])
    said = torch.tensor([said for _, said in places])
    return Captioned(images, texts, attributes, said, torch.tensor([[places[line] for line in own] for own in lines]))


def _scenes(
    out: Path, parts: Joining, recipe: JoinRecipe, device: str, world: str, seed: int, count: int
) -> dict[str, Tensor]:
    """Scenes of a set, drawn from one seed: encodings by "trained" and "random" towers [n w], and attributes [n a]."""
    path = out / f"scenes-{world}-{seed}-{cache_key(parts, drawing_key(), recipe.side, count, list(WORDS))}.safetensors"
    if path.is_file():
        return load_file(path)
    content = draw(world, "train", seed, recipe.side, count)
    found = {"attributes": _attributes(content)}
    for kind, name in zip(KINDS, (parts.vision, f"{parts.vision}@random"), strict=True):
        tower = load_encoder(name, seed=parts.random_seed, device=device).at_size(recipe.side)
        bar = tqdm(content.images.split(250), desc=f"{world}, {kind}", leave=False)
        found[kind] = torch.cat([tower.encode_image(part).cpu() for part in bar])
    write_bytes(path, save(found))
    return found


@torch.no_grad()
def _encoded_texts(out: Path, parts: Joining, texts: list[str]) -> Float[Tensor, "t v"]:
    path = out / f"texts-{cache_key(parts.weights, *texts)}.safetensors"
    if not path.is_file():
        reader, tokenizer = load_reader(parts)
        bar = tqdm(range(0, len(texts), 256), desc="captions")
        write_bytes(path, save({"texts": torch.cat([read(reader, tokenizer, texts[i : i + 256]) for i in bar])}))
    return load_file(path)["texts"]


def _attributes(content: Content) -> Int64[Tensor, "n a"]:
    """What is known of each image, by the order of WORDS."""
    known = {name: torch.full_like(content.labels, UNKNOWN) for name in WORDS}
    factors = {name: factor.values for name, factor in content.factors.items()}
    names, codes = {name: i for i, name in enumerate(WORDS["emoji"])}, list(GROUP_WORDS)
    if content.classes == TEXTURES:
        known["texture"] = content.labels
    elif content.classes == NUMBER_NAMES:
        known["number"] = content.labels
    elif "shape" in factors:
        known |= {name: factors[name].long() for name in ("shape", "colour", "pattern", "background")}
    else:
        own = factors.get("artwork", torch.tensor([names.get(name, UNKNOWN) for name in content.classes]))
        known["emoji"] = own if "artwork" in factors else own[content.labels]
        groups = torch.tensor([codes.index(item.group) for item in vocabulary()])
        plain = factors["backdrop"] == 0
        known["group"] = groups[known["emoji"]]
        known["ground"] = factors["colour"].where(plain, len(COLOURS) - 1 + factors["backdrop"]).long()
    return torch.stack(list(known.values()), 1)


def _captions(
    patterns: list[str], row: list[int], count: int, generator: torch.Generator
) -> list[tuple[str, tuple[int, ...]]]:
    """Captions of an image, and what each says of it."""
    found = []
    for pattern in (patterns[int(i)] for i in torch.randint(len(patterns), (count,), generator=generator)):
        slots = re.findall(r"\{(\w+)\}", pattern)
        words = {name: WORDS[name][row[place]] for place, name in enumerate(WORDS) if name in slots}
        said = tuple(value if name in slots else UNKNOWN for name, value in zip(WORDS, row, strict=True))
        found.append((pattern.format(**words), said))
    return found


def _maps(images: Tensor, data: Captioned, recipe: JoinRecipe, kind: str) -> tuple[dict[str, Tensor], list[dict]]:
    """The maps into the common space, and a row of the log for every hundred steps."""
    device, generator = images.device, torch.Generator().manual_seed(recipe.seed)
    texts, attributes, said, captions = (
        value.to(device) for value in (data.texts, data.attributes, data.said, data.captions)
    )
    maps = {
        name: (torch.randn(recipe.width, width, generator=generator) / width**0.5).to(device).requires_grad_()
        for name, width in (("image_map", images.shape[1]), ("text_map", texts.shape[1]))
    }
    maps["logit_scale"] = torch.tensor(math.log(1 / 0.07), device=device, requires_grad=True)
    optimizer = torch.optim.AdamW(maps.values(), lr=recipe.rate, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    rows, losses, start = [], [], time.monotonic()
    for step in tqdm(range(recipe.steps), desc=f"maps, {kind}", mininterval=5):
        drawn = torch.randint(len(images), (recipe.batch,), generator=generator).to(device)
        which = torch.randint(captions.shape[1], (recipe.batch,), generator=generator).to(device)
        text = captions[drawn, which]
        true = (said[text][None] == UNKNOWN) | (said[text][None] == attributes[drawn][:, None])
        image, read_as = (
            F.normalize(F.linear(values, maps[name]), dim=1)
            for values, name in ((images[drawn], "image_map"), (texts[text], "text_map"))
        )
        loss = contrastive_loss(image, read_as, maps["logit_scale"].exp(), true.all(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            maps["logit_scale"].clamp_(0, math.log(100))
        losses.append(loss.detach())
        if (step + 1) % 100 == 0:
            row = {"tower": kind, "step": step + 1, "loss": f"{torch.stack(losses).mean():.4f}"}
            rows.append(row | {"seconds": f"{time.monotonic() - start:.0f}"})
            losses.clear()
    return {name: value.detach() for name, value in maps.items()}, rows
