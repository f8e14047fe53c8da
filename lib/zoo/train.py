"""Trains the embedded encoders: `python -m zoo train mini-openclip`.

A run can be stopped at any time and resumed by the same command. Every step draws
its batch from (seed, step), so a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

import contextlib
import csv
import math
import string
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from residual.data.miniature.emoji import STYLES, Artwork, load_artwork, vocabulary
from residual.data.miniature.scenes import BACKDROPS, COLOURS, draw_scenes
from residual.files import replacing
from zoo.captions import OPENINGS, STYLE_WORDS, Concepts, load_concepts, write_captions
from zoo.objectives import Batch, Classification, Contrast, Distillation
from zoo.recipes import CONTEXT, MEAN, RECIPES, SIZE, STD, WORDS, Recipe, build_encoder, image_tokens
from zoo.recipes import save_encoder as save

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
    "twemoji". recipe: in place of the encoder's own. every: steps between checkpoints.
    Raises ValueError if `out` holds a run with another recipe, FileNotFoundError without drawings.
    """
    recipe = recipe or RECIPES[name]
    scenes = _Scenes(recipe, npm)
    run = _Run(name, recipe, len(scenes.tokenizer), out, device)
    steps = tqdm(range(run.first, recipe.steps), initial=run.first, total=recipe.steps, desc=name, mininterval=5)
    for step in steps:
        run.step(step, scenes.batch(step, device))
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            steps.set_postfix(loss=run.checkpoint(step + 1))
    save(name, run.objective.trained_encoder(), scenes.tokenizer, out)


class _Run:
    """A training: what is trained, and its log and checkpoint in the folder `out`."""

    def __init__(self, name: str, recipe: Recipe, words: int, out: Path, device: str) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device = recipe, torch.device(device)
        self.objective = _objective(recipe, build_encoder(name, words)).to(device).train()
        self.trained = [p for p in self.objective.parameters() if p.requires_grad]
        matrices, others = ([p for p in self.trained if (p.ndim >= 2) is flag] for flag in (True, False))
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups)
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.log = out / "checkpoint.pt", out / "training.csv"
        self.first, self.loss_sum, seconds = 0, 0.0, 0.0
        if self.path.exists():
            state = torch.load(self.path, map_location=device, weights_only=True)
            if state["settings"] != repr(recipe):
                raise ValueError(f"{self.path} belongs to a run with other settings; delete it or give the same ones")
            self.objective.load_state_dict(state["objective"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.first, seconds = state["step"], state["seconds"]
        self.rows = _read_log(self.log, self.first)
        self.started = time.monotonic() - seconds

    def rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine."""
        return self.recipe.rate * min((step + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * step / self.recipe.steps)))

    def step(self, step: int, batch: Batch) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        torch.manual_seed(self.recipe.seed * 1_000_003 + step)  # of dropped tokens and disturbed colours
        share = self.recipe.tokens if step < 0.9 * self.recipe.steps else 1.0
        # On a CPU, the backward pass of the fused attention kernel takes longer than all the rest at heads of 20.
        kernel = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext()
        with _dropped(image_tokens(self.objective.encoder), share), kernel:
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.objective(batch)
            self.optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.objective.after_step(step / self.recipe.steps)
        self.loss_sum += loss.item()

    def checkpoint(self, done: int) -> str:
        """Write the state after `done` steps, and a row of the log; returns the mean loss since the last one."""
        since = done - (int(self.rows[-1]["step"]) if self.rows else 0)
        row = {"step": done, "loss": f"{self.loss_sum / since:.4f}", "rate": f"{self.rate(done - 1):.2e}"}
        seconds, self.loss_sum = time.monotonic() - self.started, 0.0
        self.rows.append(row | {"seconds": f"{seconds:.0f}"})
        with replacing(self.log) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.rows[0].keys())
            writer.writeheader()
            writer.writerows(self.rows)
        state = {"objective": self.objective.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"step": done, "seconds": seconds, "settings": repr(self.recipe)}
        with replacing(self.path) as partial:
            torch.save(state, partial)
        return row["loss"]


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
    """How often each drawing is used, up to a factor."""
    groups = torch.tensor([GROUP_WEIGHTS.get(item.group, 1.0) for item in vocabulary()])
    weights = groups[artwork.emoji]
    for style, share in recipe.styles.items():
        rows = artwork.style == STYLES.index(style)
        weights[rows] *= share / weights[rows].sum()
    return weights


class _Scenes:
    """The batches of a recipe, each drawn from (seed, step)."""

    def __init__(self, recipe: Recipe, npm: Path) -> None:
        self.recipe, self.artwork, self.concepts = recipe, load_artwork(tuple(recipe.styles), npm), load_concepts(npm)
        self.tokenizer, self.weights = build_tokenizer(self.concepts), _weights(self.artwork, recipe)

    def batch(self, step: int, device: str) -> Batch:
        recipe, generator = self.recipe, torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        drawn = torch.multinomial(self.weights, recipe.batch, replacement=True, generator=generator)
        line = self.artwork.style[drawn] == STYLES.index("openmoji-line")
        draw = partial(draw_scenes, self.artwork.sprites[drawn], generator=generator, line=line, size=SIZE)
        scene = draw()
        batch = Batch(_normalised(scene.images), None, self.artwork.emoji[drawn], None, None, None)
        if recipe.objective == "contrastive":
            captions = write_captions(self.concepts, self.artwork, drawn, scene, generator)
            options = {"padding": "max_length", "truncation": True, "max_length": CONTEXT, "return_tensors": "pt"}
            text, positives = self.tokenizer(captions.texts, **options), captions.positives
            batch = replace(batch, tokens=text.input_ids, attention=text.attention_mask, positives=positives)
        if recipe.objective == "distillation":
            batch = replace(batch, again=_normalised(draw().images))
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        return Batch(**{key: None if value is None else value.to(device) for key, value in values.items()})


def _normalised(images: Tensor) -> Tensor:
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (images / 255 - mean) / std


@contextlib.contextmanager
def _dropped(module: nn.Module, share: float) -> Iterator[None]:
    """In this context, the encoder sees the class token and a random `share` of the patches of each image."""

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
