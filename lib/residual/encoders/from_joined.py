"""A vision tower and a reader, both frozen, joined by two linear maps into one space.

As in locked-image tuning (Zhai et al., 2022), but with the reader locked too. Eq. 1 stays exact: the image's map is a
projection after the final norm. `joined.json` in an encoder's folder names the parts; the maps are beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

from residual.encoders.from_transformers import silent
from residual.encoders.names import Joining
from residual.encoders.towers import Loaded, Tower, clear_errors


class Joined(nn.Module):
    """vision: the image tower's model. text: a BERT, read by its mean. Both maps have no bias."""

    def __init__(self, vision: nn.Module, text: nn.Module, maps: dict[str, Tensor]) -> None:
        super().__init__()
        self.vision, self.text = vision, text
        for name in ("image_map", "text_map"):
            rows, columns = maps[name].shape
            linear = nn.Linear(columns, rows, bias=False)
            linear.weight = nn.Parameter(maps[name].float())
            self.add_module(name, linear)
        self.logit_scale = nn.Parameter(maps["logit_scale"].float())  # its logarithm, as CLIP has it


def load(name: str, folder: Path, joining: Joining, vision: Loaded, pretrained: bool, seed: int) -> Loaded:
    """See `load_encoder`. vision: the loaded vision tower, with random weights unless `pretrained`.

    Raises ValueError for a random tower of another seed than the one that maps were trained for.
    """
    if not pretrained and seed != joining.random_seed:
        raise ValueError(f"{name} with random weights has maps for seed {joining.random_seed} only, not {seed}")
    maps = load_file(folder / ("maps.safetensors" if pretrained else "maps-random.safetensors"))
    text, tokenizer = load_reader(joining)
    model = Joined(vision.model, text, maps)

    def read_tower(model: nn.Module, name: str) -> Tower:
        return _mapped(vision.read_tower(model.vision, name), model)

    return replace(
        vision,
        model=model,
        weights=f"{vision.weights}, read by {joining.reader}",
        read_tower=read_tower,
        text=lambda model, texts: model.text_map(read(model.text, tokenizer, texts)),
        too_long=lambda texts: [len(t) > _longest(text, tokenizer) for t in tokenizer(list(texts)).input_ids],
        vision=vision,
    )


def load_reader(joining: Joining) -> tuple[hf.BertModel, hf.PreTrainedTokenizerBase]:
    """The text model and its tokenizer; errors as `Shipped.checked`."""
    folder = joining.weights.checked().parent
    with clear_errors(joining.reader, folder), silent():
        model = hf.BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
        return model.eval(), hf.AutoTokenizer.from_pretrained(folder)


def read(model: nn.Module, tokenizer: hf.PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Normalised means of a text's tokens [t w], as all-MiniLM-L6-v2 is read."""
    limit = _longest(model, tokenizer)
    tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
    tokens = tokens.to(model.device)
    mask = tokens.attention_mask[..., None]
    return F.normalize((model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1), dim=1)


def _longest(model: nn.Module, tokenizer: hf.PreTrainedTokenizerBase) -> int:
    return min(tokenizer.model_max_length, model.config.max_position_embeddings)


def _mapped(tower: Tower, model: Joined) -> Tower:
    """A tower with the image's map after its output."""

    def projection() -> tuple[Tensor, Tensor | None]:
        weight, bias = tower.projection()
        matrix = model.image_map.weight
        return matrix if weight is None else matrix @ weight, None if bias is None else matrix @ bias

    return replace(tower, forward=lambda pixels: model.image_map(tower.forward(pixels)), projection=projection)
