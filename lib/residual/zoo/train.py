"""Trains the embedded encoders: `python -m residual.zoo train mini-openclip`.

A run can be stopped at any time and resumed by the same command. Every step draws
its batch from (seed, step), so a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

import csv
import json
import math
import os
import string
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from open_clip.model import CLIP
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from residual.artwork import STYLES, Artwork, load_artwork
from residual.render import BACKDROPS, COLOURS, draw_scenes
from residual.zoo.captions import OPENINGS, STYLE_WORDS, Concepts, load_concepts, write_captions

MODEL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 48, "patch_size": 8, "width": 192, "layers": 8, "head_width": 24},
    "text_cfg": {
        "context_length": 24,
        "vocab_size": 3000,
        "width": 128,
        "heads": 4,
        "layers": 3,
        "pool_type": "eos",
        "eos_id": 2,
        "hf_tokenizer_name": "local",  # open_clip reads the tokenizer beside this file
    },
}
MEAN, STD = (0.5, 0.5, 0.5), (0.3, 0.3, 0.3)
PEAK_RATE, WEIGHT_DECAY, WARM_UP = 1e-3, 0.1, 100


def train_clip(
    out: Path,
    npm: Path,
    *,
    styles: tuple[str, ...] = STYLES,
    steps: int = 3600,
    batch: int = 256,
    seed: int = 0,
    device: str = "cpu",
    every: int = 100,
) -> None:
    """Train `mini-openclip` and write it to the folder `out`, in open_clip's local-dir layout.

    npm: `node_modules` with OpenMoji's table of keywords, and the drawings in styles other than
    "twemoji". every: steps between checkpoints.
    """
    out.mkdir(parents=True, exist_ok=True)
    artwork, concepts = load_artwork(styles, npm), load_concepts(npm)
    tokenizer = build_tokenizer(concepts, MODEL["text_cfg"]["vocab_size"], MODEL["text_cfg"]["context_length"])
    torch.manual_seed(seed)
    model = CLIP(**{k: dict(v) if isinstance(v, dict) else v for k, v in MODEL.items()}).to(device).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}], lr=PEAK_RATE
    )
    checkpoint, log = out / "checkpoint.pt", out / "training.csv"
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if (state["steps"], state["batch"], state["seed"]) != (steps, batch, seed):
            raise ValueError(f"{checkpoint} belongs to a run with other settings; delete it or give the same ones")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    rows = _read_log(log, first)
    progress = tqdm(range(first, steps), initial=first, total=steps, desc=out.name, mininterval=5)
    started, loss_sum = time.monotonic() - seconds, 0.0
    for step in progress:
        rate = PEAK_RATE * min((step + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        images, tokens, positives = _batch(artwork, concepts, tokenizer, batch, seed, step)
        # On a CPU, the fused attention kernel's backward pass takes longer than all the rest at 24-dimensional heads.
        with torch.autocast(torch.device(device).type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            image, text, scale = model(images.to(device), tokens.to(device))
        loss = contrastive_loss(image.float(), text.float(), scale, positives.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        loss_sum += loss.item()
        if (step + 1) % every == 0 or step + 1 == steps:
            since = step + 1 - (int(rows[-1]["step"]) if rows else 0)
            seconds = time.monotonic() - started
            rows.append(
                {
                    "step": step + 1,
                    "loss": f"{loss_sum / since:.4f}",
                    "rate": f"{rate:.2e}",
                    "seconds": f"{seconds:.0f}",
                }
            )
            progress.set_postfix(loss=rows[-1]["loss"])
            loss_sum = 0.0
            _write_log(log, rows)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            state |= {"seconds": seconds, "steps": steps, "batch": batch, "seed": seed}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    tokenizer.save_pretrained(out)
    save_clip(model, out)


def contrastive_loss(
    image: Float[Tensor, "n d"], text: Float[Tensor, "n d"], scale: Tensor, positives: Bool[Tensor, "n n"]
) -> Tensor:
    """InfoNCE both ways, with the target mass spread evenly over all true pairs."""
    logits = scale * image @ text.T
    target = positives.float()
    by_image = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
    by_text = F.cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
    return (by_image + by_text) / 2


def build_tokenizer(concepts: Concepts, vocab_size: int, context_length: int) -> PreTrainedTokenizerFast:
    """WordPiece over the most frequent words of captions and all single characters.

    The vocabulary is counted, not trained: the trainers of `tokenizers` break ties at random, and a
    resumed run must give every word its old number.
    """
    texts = [*concepts.words, *STYLE_WORDS, *BACKDROPS, *COLOURS, *OPENINGS, "something on background big small"]
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    counts = Counter(w for text in texts for w, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    characters = sorted({*string.ascii_lowercase, *string.digits, *"".join(counts)})
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    vocabulary = ["[PAD]", "[UNK]", "[EOS]", *characters, *(f"##{c}" for c in characters), *words][:vocab_size]
    pieces = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[EOS]",
        model_max_length=context_length,
    )


def save_clip(model: CLIP, out: Path) -> None:
    """Weights in half precision and open_clip's configuration."""
    weights = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, out / "open_clip_model.safetensors")
    config = {"model_cfg": MODEL, "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic"}}
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _batch(artwork: Artwork, concepts: Concepts, tokenizer, batch: int, seed: int, step: int):
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    drawn = torch.randint(len(artwork.sprites), (batch,), generator=generator)
    line = artwork.style[drawn] == STYLES.index("openmoji-line")
    scene = draw_scenes(artwork.sprites[drawn], generator=generator, line=line)
    captions = write_captions(concepts, artwork, drawn, scene, generator)
    length = MODEL["text_cfg"]["context_length"]
    tokens = tokenizer(captions.texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (scene.images / 255 - mean) / std, tokens.input_ids, captions.positives


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
