"""The five embedded encoders: their classes and libraries, their sizes, and how they are trained."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import transformers as hf
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import nn

SIZE, PATCH = 48, 8  # pixels a side
OUTPUT = 128
MEAN = STD = (0.5, 0.5, 0.5)  # pixels in [-1, 1]
CONTEXT, WORDS = 24, 3000
SPREAD = 0.06  # of initial weights, near 1 / sqrt(width)
TEXT = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512}


@dataclass(frozen=True)
class Recipe:
    """How an encoder is built and trained.

    objective: "contrastive" (image and caption), "distillation" (DINO) or "classification".
    styles: how often a drawing of each style is drawn, as shares.
    identity: weight of naming the emoji by a linear layer, beside the contrastive loss.
    """

    objective: str
    styles: MappingProxyType
    seed: int
    steps: int
    batch: int = 2048
    rate: float = 2e-3
    identity: float = 0.0
    width: int = 192
    layers: int = 12
    heads: int = 6


def _styles(**shares: float) -> MappingProxyType:
    return MappingProxyType({name.replace("_", "-"): share for name, share in shares.items()})


MIXED = _styles(twemoji=0.55, noto=0.15, openmoji=0.15, openmoji_line=0.15)
# As many steps as five trainings side by side made in four minutes on one H100, mini-dinov2 alone in five.
RECIPES = {
    "mini-openclip": Recipe("contrastive", MIXED, seed=0, steps=700, identity=1.0),
    "mini-clip": Recipe("contrastive", _styles(twemoji=0.7, noto=0.3), seed=1, steps=650, identity=1.0),
    "mini-blip": Recipe(
        "contrastive", _styles(twemoji=0.7, openmoji=0.2, openmoji_line=0.1), seed=2, steps=700, identity=1.0
    ),
    "mini-dinov2": Recipe("distillation", MIXED, seed=3, steps=3500, batch=1024, rate=1e-3),
    "mini-vit": Recipe("classification", MIXED, seed=4, steps=800),
}


def build_encoder(name: str, recipe: Recipe, vocabulary: int) -> nn.Module:
    """The library's own class at its small size, with random weights. vocabulary: word pieces."""
    vision = {"image_size": SIZE, "patch_size": PATCH, "hidden_size": recipe.width, "num_hidden_layers": recipe.layers}
    # transformers' deviation of 0.02 is made for widths near 1,000, and learns slowly at this one.
    vision |= {"num_attention_heads": recipe.heads, "intermediate_size": 4 * recipe.width, "initializer_range": SPREAD}
    if name in ("mini-openclip", "mini-clip"):
        config = open_clip_config(name, recipe, vocabulary)
        return CLIP(**{k: dict(v) if isinstance(v, dict) else v for k, v in config.items()})
    if name == "mini-blip":
        # Without a decoder there is no cross-attention, which matching would need and contrast does not.
        text = TEXT | {
            "initializer_range": SPREAD,
            "vocab_size": vocabulary,
            "max_position_embeddings": CONTEXT,
            "is_decoder": False,
        }
        text |= {"encoder_hidden_size": recipe.width, "projection_dim": OUTPUT, "pad_token_id": 0, "sep_token_id": 2}
        text |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "bos_token_id": 3, "eos_token_id": 2}
        config = hf.BlipConfig(
            vision_config=vision, text_config=text, initializer_range=SPREAD, image_text_hidden_size=OUTPUT
        )
        return hf.BlipForImageTextRetrieval(config)
    if name == "mini-dinov2":
        del vision["intermediate_size"]  # DINOv2 derives it from `mlp_ratio`
        return hf.Dinov2Model(hf.Dinov2Config(**vision, layerscale_value=0.1, drop_path_rate=0.0))
    return hf.ViTModel(hf.ViTConfig(**vision), add_pooling_layer=False)


def open_clip_config(name: str, recipe: Recipe, vocabulary: int) -> dict:
    vision = {"image_size": SIZE, "patch_size": PATCH, "width": recipe.width, "layers": recipe.layers}
    vision["head_width"] = recipe.width // recipe.heads
    text = {
        "context_length": CONTEXT,
        "vocab_size": vocabulary,
        "width": TEXT["hidden_size"],
        "heads": TEXT["num_attention_heads"],
        "layers": TEXT["num_hidden_layers"],
        "pool_type": "eos",
        "eos_id": 2,
        "hf_tokenizer_name": "local",  # open_clip reads the tokenizer beside this file
    }
    return {"embed_dim": OUTPUT, "vision_cfg": vision, "text_cfg": text, "quick_gelu": name == "mini-clip"}


def save_encoder(name: str, recipe: Recipe, model: nn.Module, tokenizer: hf.PreTrainedTokenizerBase, out: Path) -> None:
    """Weights in half precision with configuration, preprocessing and tokenizer, as the library reads them."""
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(model, CLIP):
        weights = {key: value.detach().cpu().half().contiguous() for key, value in model.state_dict().items()}
        save_file(weights, out / "open_clip_model.safetensors")
        preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic"}
        model_config = open_clip_config(name, recipe, len(tokenizer))
        config = {"model_cfg": model_config, "preprocess_cfg": preprocess}
        (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    else:
        model.half().save_pretrained(out)
        processor = hf.ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD)
        processor.save_pretrained(out)
    if name not in ("mini-dinov2", "mini-vit"):
        tokenizer.save_pretrained(out)
