"""Encoders by name, with one interface. Models are open_clip's and transformers' own classes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from PIL.Image import Image, fromarray
from torch import Tensor, nn
from torch.nn.functional import interpolate

from residual.encoders.names import PAPER, SHIPPED, check_name, joining, open_clip_names, split_tag, tower_name
from residual.encoders.towers import Loaded, Tower
from residual.encoders.weights import check_values
from residual.sources import encoder_folders
from residual.tensors import tensor_bytes

CACHED = 2_000  # tokens at once on a CPU, which saves larger encoders a tenth of the time (benchmarks/test_speed.py)
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Encoder(Loaded):
    """A frozen image encoder whose pooled output is a sum of residual units. Its other fields are those of `Loaded`."""

    name: str
    tower: Tower

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
    def reads_text(self) -> bool:
        """Whether `encode_text` works."""
        return self.text is not None

    @property
    def logit_scale(self) -> float | None:
        """Factor of zero-shot logits; None where the model has none (BLIP, DINOv2, ViT)."""
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
        return torch.cat([self.forward(part) for part in self.cached_parts(self.check_pixels(pixels))])

    def cached_parts(self, pixels: Float[Tensor, "n 3 h w"]) -> tuple[Tensor, ...]:
        """A batch in parts so small that a CPU's cache holds what its blocks compute; on a GPU, the whole batch."""
        if self.device.type != "cpu":
            return (pixels,)
        rows, columns = self.patch_grid(pixels)
        return pixels.split(max(1, CACHED // (rows * columns + 1)))

    def patch_grid(self, pixels: Shaped[Tensor, "n c h w"]) -> tuple[int, int]:
        """Rows and columns of the patches that these pixels are cut into: the last tokens, row by row."""
        patch = next(module for module in self.tower.root.modules() if isinstance(module, nn.Conv2d)).stride
        return pixels.shape[2] // patch[0], pixels.shape[3] // patch[1]

    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """The tower's own forward pass."""
        with _unrounded_convolutions():
            return self.tower.forward(pixels)

    def encode_text(self, texts: Sequence, *, batch: int = 256) -> Float[Tensor, "t d"]:
        """Encodings of a list of strings, not normalised. texts: as `check_texts` takes them."""
        texts = self.check_texts(texts)
        return torch.cat([self.text(self.model, texts[start : start + batch]) for start in range(0, len(texts), batch)])

    def check_texts(self, texts: Sequence) -> list[str]:
        """The same as a list, with a warning about those that are cut, as they are longer than the tower reads.

        Raises ValueError without a text tower or tokenizer, and for what is no string.
        """
        if self.text is None:
            raise ValueError(
                f"{self.name} has no text tower or no tokenizer; use a text-aligned encoder such as 'mini-openclip'"
            )
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"texts must be a non-empty list of strings, not {texts!r}")
        texts = list(texts)
        if bad := [(i, text) for i, text in enumerate(texts) if not isinstance(text, str)]:
            raise ValueError(f"texts[{bad[0][0]}] is {type(bad[0][1]).__name__}, not a string: {bad[0][1]!r}")
        if cut := [text for text, long in zip(texts, self.too_long(texts), strict=True) if long]:
            told = "%s: %d of %d texts have more tokens than it reads, and are cut, such as %r"
            log.warning(told, self.name, len(cut), len(texts), cut[0][:60])
        return texts

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

    def at_size(self, side: int) -> Encoder:
        """The same encoder for images of so many pixels a side, to which `preprocess` then brings them.

        Raises ValueError for a tower that takes one size only, and for fewer pixels than its smallest image has.
        """
        smallest = self.tower.smallest
        if self.tower.image_size == (side, side):
            return self
        if smallest is None or side < smallest:
            raise ValueError(f"{self.name} does not take images of {side} x {side} pixels")

        def resized(image: Image) -> Tensor:
            return interpolate(self.preprocess(image)[None], (side, side), mode="bilinear", antialias=True)[0]

        return replace(self, preprocess=resized, tower=replace(self.tower, image_size=(side, side)))

    def with_model(self, model: nn.Module) -> Encoder:
        """The same encoder with another model of the same class."""
        tower = replace(self.read_tower(model, self.name), image_size=self.tower.image_size)
        return replace(self, model=model, tower=tower)

    def unmapped(self) -> Encoder | None:
        """The encoder that a linear map turned into this one, with the same tower; None for others."""
        if self.vision is None:
            return None
        model, tag = self.model.vision, split_tag(self.name)[1]
        name = tower_name(self.name) + (f"@{tag}" if tag else "")
        tower = replace(self.vision.read_tower(model, name), image_size=self.tower.image_size)
        loaded = vars(self.vision) | {"model": model, "preprocess": self.preprocess}
        return Encoder(**loaded, name=name, tower=tower)

    def preprocessing_hash(self) -> str:
        """SHA-256 of one picture after `preprocess`, of mean and std, and of the size that is read as it is."""
        ramp = (torch.arange(90 * 70 * 3, dtype=torch.int64).square() % 251).to(torch.uint8).view(90, 70, 3)
        pixels = self.preprocess(fromarray(ramp.numpy())).mul(1000).round()  # not the last digits of a resize
        digest = hashlib.sha256(repr((self.mean, self.std, self.tower.image_size, tuple(pixels.shape))).encode())
        digest.update(tensor_bytes(pixels.to(torch.int32)))
        return digest.hexdigest()

    def weights_hash(self) -> str:
        """SHA-256 of the image tower's parameters and buffers, names and shapes included."""
        weight, bias = self.tower.projection()
        named = {**self.tower.root.state_dict(), "projection.weight": weight, "projection.bias": bias}
        digest = hashlib.sha256()
        for name, value in sorted(named.items()):
            if value is not None:
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(tensor_bytes(value))
        return digest.hexdigest()


@contextlib.contextmanager
def _unrounded_convolutions() -> Iterator[None]:
    """By default, cuDNN rounds convolutions in single precision to TF32, which costs 4e-4 of an encoder's output."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def load_encoder(
    name: str,
    pretrained: bool | str = True,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """Load an encoder, in evaluation mode, with its parameters frozen.

    name: an encoder of an installed source ("mini-openclip"), one of the paper's ("OpenCLIP-L", ...), a model
    name of open_clip, a hub id ("facebook/dinov2-small"; "hf-hub:org/name" for open_clip models),
    or a local folder that open_clip or transformers saved, or that joins two by joined.json. "name@tag"
    stands for pretrained="tag", and "name@random" for pretrained=False.
    pretrained: True for the encoder's own weights; a tag of open_clip ("laion2b_s34b_b88k");
    False for random weights drawn from `seed`, which needs no network.
    device: "meta" with pretrained=False gives the encoder's sizes alone, in a moment, and nothing that can be run.
    Raises UnsupportedArchitectureError where Eq. 1 does not hold, ValueError for an unknown
    name or tag, FileNotFoundError or RuntimeError for weights that are missing or unreadable.
    """
    base, tag = split_tag(name)
    if tag:
        pretrained = False if tag == "random" else tag
    sizes_alone = torch.device(device).type == "meta"
    if sizes_alone and pretrained:
        raise ValueError(f"{name}: device='meta' has room for sizes alone; give pretrained=False")
    with torch.random.fork_rng(devices=[]), torch.device("meta") if sizes_alone else contextlib.nullcontext():
        torch.manual_seed(seed)
        loaded = _find(base, pretrained, seed)
    if not sizes_alone:
        check_values(loaded.model, name)
    model = loaded.model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    if pretrained is False:
        random = {"weights": f"random, seed {seed}"}
        loaded = replace(loaded, **random, vision=loaded.vision and replace(loaded.vision, **random))
    return Encoder(**vars(loaded), name=name, tower=loaded.read_tower(model, name))


def _find(name: str, pretrained: bool | str, seed: int) -> Loaded:
    """Load what a name stands for by the library that it is of, which is imported only then; see `load_encoder`."""
    check_name(name)
    if name == SHIPPED:
        return _from_package(name, pretrained)
    folder = encoder_folders().get(name) or Path(name)
    if parts := joining(name):
        from residual.encoders import from_joined

        vision = _find(parts.vision, pretrained, seed)
        return from_joined.load(name, folder, parts, vision, bool(pretrained), seed)
    by_id = {source.id: source for source in PAPER.values() if source.tag is None}
    if folder.is_dir():
        if (folder / "open_clip_config.json").is_file():
            return _from_open_clip(name, f"local-dir:{folder}", pretrained)
        if (folder / "config.json").is_file():
            return _from_transformers(name, str(folder), pretrained)
        raise FileNotFoundError(f"{folder} has neither open_clip_config.json, config.json nor joined.json")
    if source := PAPER.get(name) or by_id.get(name):
        if source.tag is None:
            return _from_transformers(name, source.id, pretrained, source.config)
        return _from_open_clip(name, source.id, source.tag if pretrained is True else pretrained)
    if name.startswith("hf-hub:") or name in open_clip_names():
        return _from_open_clip(name, name, pretrained)
    return _from_transformers(name, name, pretrained)


def _from_open_clip(*arguments: object) -> Loaded:
    from residual.encoders import from_open_clip

    return from_open_clip.load(*arguments)


def _from_transformers(*arguments: object) -> Loaded:
    from residual.encoders import from_transformers

    return from_transformers.load(*arguments)


def _from_package(name: str, pretrained: bool | str) -> Loaded:
    from residual.encoders import from_package, from_transformers

    if pretrained is False:
        return from_transformers.load(name, name, False, from_package.OFFLINE)
    return from_transformers.load(name, str(from_package.converted()), pretrained)
