"""The batches of a training: what is random about each, drawn from (seed, step) by any process, and its rendering."""

from __future__ import annotations

import string
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int64
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from miniature.emoji import STYLES, Artwork, load_artwork, vocabulary
from miniature.scenes import BACKDROPS, COLOURS, Draws, render_scenes, sample_scenes
from miniature.training.captions import OPENINGS, STYLE_WORDS, Concepts, load_concepts, write_captions
from miniature.training.objectives import Batch
from miniature.training.recipes import CONTEXT, MEAN, SIZE, STD, WORDS, Recipe

# How often an emoji of each Unicode group is drawn, relative to one of the others: the groups of which the
# tasks are made more often, and people, who come in many near-copies, more seldom.
GROUP_WEIGHTS = {
    "Animals & Nature": 2.0,
    "Food & Drink": 2.0,
    "Flags": 2.0,
    "Smileys & Emotion": 2.0,
    "People & Body": 0.4,
}


@dataclass(frozen=True)
class Disturbance:
    """Of contrast, brightness and balance of colours; and which images turn grey, one in eight."""

    gain: Float[Tensor, "n 3 1 1"]
    shift: Float[Tensor, "n 1 1 1"]
    grey: Bool[Tensor, "n 1 1 1"]

    @staticmethod
    def sample(n: int, generator: torch.Generator) -> Disturbance:
        gain = 1 + 0.3 * (2 * torch.rand(n, 3, 1, 1, generator=generator) - 1)
        shift = 0.2 * (2 * torch.rand(n, 1, 1, 1, generator=generator) - 1)
        return Disturbance(gain, shift, torch.rand(n, 1, 1, 1, generator=generator) < 0.125)

    def __call__(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n 3 s s"]:
        gain, shift, grey = (value.to(images.device) for value in (self.gain, self.shift, self.grey))
        return torch.where(grey, images.mean(1, keepdim=True), images) * gain + shift


@dataclass(frozen=True)
class Drawn:
    """A batch before it is rendered.

    rows: of the artwork. views: scenes of these, and how they are disturbed.
    """

    rows: Int64[Tensor, "n"]
    views: tuple[tuple[Draws, Disturbance | None], ...]
    tokens: Int64[Tensor, "n t"] | None = None
    attention: Int64[Tensor, "n t"] | None = None
    positives: Bool[Tensor, "n n"] | None = None


class Batches(torch.utils.data.Dataset):
    """`batches[step]` is what is random about the batch of a step. The same on every machine and device."""

    def __init__(self, recipe: Recipe, npm: Path) -> None:
        self.recipe, self.artwork, self.concepts = recipe, load_artwork(tuple(recipe.styles), npm), load_concepts(npm)
        self.tokenizer, self.weights = build_tokenizer(self.concepts), _weights(self.artwork, recipe)

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> Drawn:
        recipe, generator = self.recipe, torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        rows = torch.multinomial(self.weights, recipe.batch, replacement=True, generator=generator)
        pair = recipe.objective == "distillation"
        views = tuple(
            (sample_scenes(recipe.batch, generator), Disturbance.sample(recipe.batch, generator) if pair else None)
            for _ in range(2 if pair else 1)
        )
        if recipe.objective != "contrastive":
            return Drawn(rows, views)
        captions = write_captions(self.concepts, self.artwork, rows, views[0][0], generator)
        options = {"padding": "max_length", "truncation": True, "max_length": CONTEXT, "return_tensors": "pt"}
        text = self.tokenizer(captions.texts, **options)
        return Drawn(rows, views, text.input_ids, text.attention_mask, captions.positives)


class Renderer:
    """Renders batches on a device, where the artwork stays."""

    def __init__(self, artwork: Artwork, device: torch.device) -> None:
        self.device = device
        self.sprites, self.emoji = artwork.sprites.to(device), artwork.emoji.to(device)
        self.line = (artwork.style == STYLES.index("openmoji-line")).to(device)
        self.mean, self.std = (torch.tensor(value, device=device)[:, None, None] for value in (MEAN, STD))

    def __call__(self, drawn: Drawn) -> Batch:
        rows = drawn.rows.to(self.device)
        views = torch.cat([self._images(rows, *view) for view in drawn.views])
        others = {name: getattr(drawn, name) for name in ("tokens", "attention", "positives")}
        others = {name: None if value is None else value.to(self.device) for name, value in others.items()}
        return Batch(views, self.emoji[rows], **others)

    def _images(self, rows: Tensor, draws: Draws, disturb: Disturbance | None) -> Tensor:
        images = render_scenes(draws.to(self.device), self.sprites[rows], line=self.line[rows], size=SIZE).images
        images = (images / 255 - self.mean) / self.std
        return images if disturb is None else disturb(images)


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


def _weights(artwork: Artwork, recipe: Recipe) -> Tensor:
    """How often each drawing is used, up to a factor."""
    groups = torch.tensor([GROUP_WEIGHTS.get(item.group, 1.0) for item in vocabulary()])
    weights = groups[artwork.emoji]
    for style, share in recipe.styles.items():
        rows = artwork.style == STYLES.index(style)
        weights[rows] *= share / weights[rows].sum()
    return weights
