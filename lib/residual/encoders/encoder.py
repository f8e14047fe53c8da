"""Encoders by paper name, open_clip name, hub id or local folder.

The models are the libraries' own; this module finds them, refuses those that cannot
be decomposed before anything is downloaded, and gives them one interface.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from PIL.Image import Image, fromarray
from torch import Tensor, nn

from residual.sources import find, split_tag
from residual.towers import Tower, read_tower


@dataclass(frozen=True, eq=False)
class Encoder:
    """A frozen image encoder whose pooled output is a sum of residual units.

    family: "OpenCLIP", "CLIP", "BLIP", "DINOv2" or "ViT". weights: where they come from.
    logit_scale: factor of zero-shot logits; None where the model has none (BLIP, DINOv2, ViT).
    preprocess: PIL image -> normalised pixels [3 h w]. mean, std: what it normalises by.
    """

    name: str
    family: str
    weights: str
    model: nn.Module
    tower: Tower
    preprocess: Callable[[Image], Float[Tensor, "3 h w"]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokenize: Callable[[Sequence[str]], object] | None

    def __repr__(self) -> str:
        sizes = f"{self.layers} layers of {self.heads} heads of {self.head_width}, output {self.output_dim}"
        return f"Encoder({self.name!r}, {self.family}, {self.weights}: {sizes})"

    @property
    def layers(self) -> int:
        return len(self.tower.blocks)

    @property
    def heads(self) -> int:
        return self.tower.blocks[0].heads

    @property
    def width(self) -> int:
        return self.tower.norm.normalized_shape[0]

    @property
    def head_width(self) -> int:
        return self.tower.blocks[0].out.in_features // self.heads

    @property
    def output_dim(self) -> int:
        weight, _ = self.tower.projection()
        return self.width if weight is None else weight.shape[0]

    @property
    def logit_scale(self) -> float | None:
        scale = getattr(self.model, "logit_scale", None)
        return None if scale is None else scale.detach().exp().item()

    @property
    def dtype(self) -> torch.dtype:
        return self.tower.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.tower.norm.weight.device

    def encode_image(self, pixels: Tensor) -> Float[Tensor, "n d"]:
        """Pooled outputs, not normalised. pixels: as `check_pixels` takes them."""
        return self.tower.forward(self.check_pixels(pixels))

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "t d"]:
        """Text encodings, not normalised. Raises ValueError without a text tower or tokenizer."""
        if self.tokenize is None:
            why = "has no text tower" if self.family in ("DINOv2", "ViT") else "was built without a tokenizer"
            raise ValueError(f"{self.name} {why}; use a text-aligned encoder such as 'mini-openclip'")
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts must be a non-empty list of strings, not {texts!r}")
        tokens = self.tokenize(list(texts))
        if isinstance(tokens, Tensor):
            return self.model.encode_text(tokens.to(self.device))
        tokens = tokens.to(self.device)
        if self.family == "BLIP":
            hidden = self.model.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
            return self.model.text_proj(hidden[:, 0])
        return self.model.text_projection(self.model.text_model(**tokens).pooler_output)

    def check_pixels(self, pixels: Tensor) -> Float[Tensor, "n 3 h w"]:
        """Pixels as the model takes them, or a clear refusal.

        pixels: [n 3 h w], either floats as `preprocess` makes them, or uint8 RGB, which is
        normalised here. Raises TypeError or ValueError that name what is wrong.
        """
        if not isinstance(pixels, Tensor):
            raise TypeError(f"pixels must be a torch tensor [n 3 h w], not {type(pixels).__name__}")
        if pixels.ndim != 4 or pixels.shape[1] != 3 or len(pixels) == 0:
            raise ValueError(f"pixels must have shape [n 3 h w] with n > 0, not {list(pixels.shape)}")
        size, need = tuple(pixels.shape[2:]), self.tower.image_size
        smallest = self.tower.smallest
        if size != need and (smallest is None or min(size) < smallest):
            sides = f"{need[0]} x {need[1]} pixels, not {size[0]} x {size[1]}"
            raise ValueError(f"{self.name} takes images of {sides}; use enc.preprocess")
        if pixels.dtype == torch.uint8:
            mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (self.mean, self.std))
            pixels = (pixels / 255 - mean) / std
        elif not pixels.is_floating_point():
            raise TypeError(f"pixels must be uint8 or floating point, not {pixels.dtype}")
        bad = (~pixels.flatten(1).isfinite()).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"pixels hold NaN or infinity in rows {bad[:10]}{' ...' if len(bad) > 10 else ''}")
        return pixels.to(self.device, self.dtype, non_blocking=True)

    def compile(self) -> None:
        """Compile the blocks' MLPs, where the time is, with `torch.compile`. Units are the same up to rounding."""
        for block in self.tower.blocks:
            block.mlp.compile()

    def preprocessing_hash(self) -> str:
        """SHA-256 of what `preprocess` makes of one picture, and of what raw pixels are normalised by."""
        ramp = (torch.arange(90 * 70 * 3, dtype=torch.int64).square() % 251).to(torch.uint8).view(90, 70, 3)
        pixels = self.preprocess(fromarray(ramp.numpy())).mul(1000).round()  # not the last digits of a resize
        digest = hashlib.sha256(repr((self.mean, self.std, tuple(pixels.shape))).encode())
        digest.update(pixels.to(torch.int32).contiguous().numpy().data)
        return digest.hexdigest()

    def weights_hash(self) -> str:
        """SHA-256 of the image tower's parameters and buffers, names and shapes included."""
        weight, bias = self.tower.projection()
        named = {**self.tower.root.state_dict(), "projection.weight": weight, "projection.bias": bias}
        digest = hashlib.sha256()
        for name, value in sorted(named.items()):
            if value is not None:
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def load_encoder(
    name: str,
    pretrained: bool | str = True,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """Load an encoder, in evaluation mode, with its parameters frozen.

    name: an embedded encoder ("mini-openclip"), a name of the paper ("OpenCLIP-L", ...), a model
    name of open_clip, a hub id ("facebook/dinov2-small"; "hf-hub:org/name" for open_clip's own),
    or a local folder that open_clip or transformers saved. "name@tag" stands for pretrained="tag",
    and "name@random" for pretrained=False.
    pretrained: True for the encoder's own weights; a tag of open_clip ("laion2b_s34b_b88k");
    False for random weights drawn from `seed`, which needs no network.
    Raises UnsupportedArchitectureError where Eq. 1 does not hold, ValueError for an unknown
    name or tag, FileNotFoundError or RuntimeError for weights that are missing or unreadable.
    """
    base, tag = split_tag(name)
    if tag:
        pretrained = False if tag == "random" else tag
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = find(base, pretrained)
    model = found.model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return Encoder(
        name=name,
        family=found.family,
        weights=f"random, seed {seed}" if pretrained is False else found.weights,
        model=model,
        tower=read_tower(model, name),
        preprocess=found.preprocess,
        mean=found.mean,
        std=found.std,
        tokenize=found.tokenize,
    )
