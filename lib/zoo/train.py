"""Trains the embedded encoders: `python -m residual.zoo train mini-openclip`.

A run can be stopped at any time and resumed by the same command. Every step draws
its batch from (seed, step), so a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import math
import os
import string
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from residual.artwork import STYLES, Artwork, load_artwork, vocabulary
from residual.render import BACKDROPS, COLOURS, draw_scenes
from residual.zoo.captions import OPENINGS, STYLE_WORDS, Concepts, load_concepts, write_captions
from residual.zoo.objectives import Batch, Classification, Contrast, Distillation
from residual.zoo.recipes import CONTEXT, MEAN, RECIPES, SIZE, STD, WORDS, Recipe, build_encoder, image_tokens
from residual.zoo.recipes import save_encoder as save

WEIGHT_DECAY, WARM_UP = 0.1, 100
# How often an emoji of each Unicode group is drawn, relative to one of the others: the groups of which the
# tasks are made more often, and people, who come in many near-copies, more seldom.
GROUP_WEIGHTS = {
    "Animals & Nature": 2.0,
    "Food & Drink": 2.0,
    "Flags": 2.0,
    "Smileys & Emotion": 2.0,
    "People & Body": 0.4,
}


def train(
    name: str, out: Path, npm: Path, *, recipe: Recipe | None = None, device: str = "cpu", every: int = 100
) -> None:
    """Train an embedded encoder and write it to the folder `out`, as its library reads it.

    npm: `node_modules` with OpenMoji's table of keywords, and the drawings in styles other than
    "twemoji". recipe: other than the encoder's own. every: steps between checkpoints.
    Raises ValueError if `out` holds a run with another recipe, FileNotFoundError without drawings.
    """
    recipe = recipe or RECIPES[name]
    artwork, concepts = load_artwork(tuple(recipe.styles), npm), load_concepts(npm)
    tokenizer = build_tokenizer(concepts)
    torch.manual_seed(recipe.seed)
    objective = _objective(recipe, build_encoder(name, len(tokenizer))).to(device).train()
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
    )
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, log = out / "checkpoint.pt", out / "training.csv"
    first, seconds, settings = 0, 0.0, repr(recipe)
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["settings"] != settings:
            raise ValueError(f"{checkpoint} belongs to a run with other settings; delete it or give the same ones")
        objective.load_state_dict(state["objective"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    rows = _read_log(log, first)
    drawings = _weights(artwork, recipe)
    progress = tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, desc=name, mininterval=5)
    started, loss_sum = time.monotonic() - seconds, 0.0
    for step in progress:
        rate = recipe.rate * min((step + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = _draw(recipe, artwork, drawings, concepts, tokenizer, step, device)
        torch.manual_seed(recipe.seed * 1_000_003 + step)  # of dropped tokens and disturbed colours
        kept = recipe.tokens if step < 0.9 * recipe.steps else 1.0
        # On a CPU, the fused attention kernel's backward pass takes longer than all the rest at 20-dimensional heads.
        kernel = sdpa_kernel(SDPBackend.MATH) if torch.device(device).type == "cpu" else contextlib.nullcontext()
        with _dropped(image_tokens(objective.encoder), kept), kernel:
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                loss = objective(batch)
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        objective.after_step(step / recipe.steps)
        loss_sum += loss.item()
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            since = step + 1 - (int(rows[-1]["step"]) if rows else 0)
            seconds = time.monotonic() - started
            row = {"step": step + 1, "loss": f"{loss_sum / since:.4f}", "rate": f"{rate:.2e}"}
            rows.append(row | {"seconds": f"{seconds:.0f}"})
            progress.set_postfix(loss=row["loss"])
            loss_sum = 0.0
            _write_log(log, rows)
            state = {"objective": objective.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step + 1, "seconds": seconds, "settings": settings}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    encoder = objective.teacher[0] if isinstance(objective, Distillation) else objective.encoder
    save(name, encoder, tokenizer, out)


def build_tokenizer(concepts: Concepts) -> PreTrainedTokenizerFast:
    """WordPiece over the most frequent words of captions and all single characters.

    The vocabulary is counted, not trained: the trainers of `tokenizers` break ties at random, and a
    resumed run must give every word its old number.
    """
    texts = [*concepts.words, *STYLE_WORDS, *BACKDROPS, *COLOURS, *OPENINGS, "something on background big small"]
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    counts = Counter(w for text in texts for w, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    characters = sorted({*string.ascii_lowercase, *string.digits, *"".join(counts)})
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    special = ["[PAD]", "[UNK]", "[EOS]", "[CLS]"]
    vocabulary = [*special, *characters, *(f"##{c}" for c in characters), *words][:WORDS]
    pieces = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    # CLIP's text tower is read out at [EOS], BLIP's at [CLS].
    ends = [("[CLS]", pieces["[CLS]"]), ("[EOS]", pieces["[EOS]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [EOS]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]", "cls_token": "[CLS]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **names)


def _objective(recipe: Recipe, encoder: nn.Module) -> nn.Module:
    if recipe.objective == "contrastive":
        return Contrast(encoder)
    if recipe.objective == "distillation":
        return Distillation(encoder)
    return Classification(encoder, len(vocabulary()))


def _weights(artwork: Artwork, recipe: Recipe) -> Tensor:
    """How often each drawing is drawn, up to a factor."""
    groups = torch.tensor([GROUP_WEIGHTS.get(item.group, 1.0) for item in vocabulary()])
    weights = groups[artwork.emoji]
    for style, share in recipe.styles.items():
        rows = artwork.style == STYLES.index(style)
        weights[rows] *= share / weights[rows].sum()
    return weights


def _draw(
    recipe: Recipe, artwork: Artwork, drawings: Tensor, concepts: Concepts, tokenizer, step: int, device: str
) -> Batch:
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    drawn = torch.multinomial(drawings, recipe.batch, replacement=True, generator=generator)
    line = artwork.style[drawn] == STYLES.index("openmoji-line")
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    scene = draw_scenes(artwork.sprites[drawn], generator=generator, line=line, size=SIZE)
    batch = Batch((scene.images / 255 - mean) / std, None, artwork.emoji[drawn], None, None, None)
    if recipe.objective == "contrastive":
        captions = write_captions(concepts, artwork, drawn, scene, generator)
        text = tokenizer(captions.texts, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
        batch = dataclasses.replace(
            batch, tokens=text.input_ids, attention=text.attention_mask, positives=captions.positives
        )
    if recipe.objective == "distillation":
        again = draw_scenes(artwork.sprites[drawn], generator=generator, line=line, size=SIZE)
        batch = dataclasses.replace(batch, again=(again.images / 255 - mean) / std)
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return Batch(**{key: None if value is None else value.to(device) for key, value in values.items()})


@contextlib.contextmanager
def _dropped(module: nn.Module, share: float) -> Iterator[None]:
    """Within it, the encoder sees the class token and a random `share` of the patches of each image."""

    def keep(_module: nn.Module, _inputs: tuple, tokens: Tensor) -> Tensor:
        n, patches = tokens.shape[0], tokens.shape[1] - 1
        order = torch.rand(n, patches, device=tokens.device).argsort(1)[:, : round(share * patches)] + 1
        rows = torch.cat([order.new_zeros(n, 1), order], 1)
        return tokens.gather(1, rows[:, :, None].expand(-1, -1, tokens.shape[2]))

    handle = module.register_forward_hook(keep) if share < 1 else None
    try:
        yield
    finally:
        if handle:
            handle.remove()


def _read_log(path: Path, last: int) -> list[dict]:
    if not last:
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["step"]) <= last]


def _write_log(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
