"""Encoders of transformers: loading, the image tower, and text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers as hf
from torch import Tensor, nn

from residual.encoders.towers import Block, Loaded, Tower, clear_errors, fused_qkv, refuse, separate_qkv, sides

REASONS = {  # why some well-known model types are refused
    "swin": "it has no class token, and its residual stream is merged between stages",
    "swinv2": "its blocks are post-norm, and it has no class token",
    "convnext": "it is a convolutional network",
    "resnet": "it is a convolutional network",
    "siglip": "it pools by attention, which is not linear in the residual stream",
    "siglip2": "it pools by attention, which is not linear in the residual stream",
    "beit": "its class token is not read by default: it pools by averaging patches",
}


@dataclass(frozen=True)
class Family:
    """A model type of transformers. text: (model, tokens) -> encodings; None without a text tower.

    options: of the model's class. processor: (height, width) -> image processor, for models saved without one.
    """

    name: str
    model: type[hf.PreTrainedModel]
    tower: Callable[[nn.Module], Tower]
    processor: Callable[[int, int], hf.BaseImageProcessor]
    text: Callable[[nn.Module, hf.BatchEncoding], Tensor] | None = None
    options: dict[str, bool] = field(default_factory=dict)


def load(name: str, source: str, pretrained: bool | str, offline: dict | None = None) -> Loaded:
    """See `load_encoder`. offline: a configuration with which random weights need no network."""
    if isinstance(pretrained, str):
        raise ValueError(f"{name} is a model of transformers and has no tags; pretrained={pretrained!r} does not apply")
    if offline and not pretrained:
        config = hf.AutoConfig.for_model(**offline)
    else:
        with clear_errors(name):
            config = hf.AutoConfig.from_pretrained(source, trust_remote_code=False)
    family = _family(name, config)
    model = _pretrained(name, source, family) if pretrained else family.model(config, **family.options)
    saved = pretrained or not offline
    height, width = sides(getattr(config, "vision_config", config).image_size)
    processor = (_saved_processor(name, source) if saved else None) or family.processor(height, width)
    mean, std = _normalisation(processor)
    return Loaded(
        model=model,
        family=family.name,
        weights=name if Path(source).is_dir() else source,
        read_tower=read_tower,
        preprocess=lambda image: processor(images=image.convert("RGB"), return_tensors="pt").pixel_values[0],
        mean=mean,
        std=std,
        text=_text_encoder(family, source) if saved else None,
    )


def read_tower(model: nn.Module, name: str) -> Tower:
    """The image tower of a model. Raises UnsupportedArchitectureError, with the reason, where Eq. 1 does not hold."""
    towers = {family.model: family.tower for family in FAMILIES.values()}
    if type(model) not in towers:
        refuse(name, f"models of class {type(model).__name__} have no known tower")
    return towers[type(model)](model).checked(name)


def _family(name: str, config: hf.PretrainedConfig) -> Family:
    kind = config.model_type
    if kind not in FAMILIES:
        reason = REASONS.get(kind, "only pre-norm blocks with a class token and a linear read-out can be")
        refuse(name, f"model type {kind!r}: {reason} (known types: {', '.join(FAMILIES)})")
    if (channels := getattr(getattr(config, "vision_config", config), "num_channels", 3)) != 3:
        refuse(name, f"it takes images of {channels} channels, not RGB")
    return FAMILIES[kind]


def _pretrained(name: str, source: str, family: Family) -> nn.Module:
    # Weights may be stored in half precision; `load_encoder` decides in which they are used.
    options = family.options | {"dtype": torch.float32, "output_loading_info": True}
    with clear_errors(name), _no_bar():
        model, report = family.model.from_pretrained(source, **options)
    if misfits := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        kind = type(model).__name__
        raise RuntimeError(f"the weights of {name} do not fit {kind}: {misfits[:5]} missing or of another shape")
    return model


def _text_encoder(family: Family, source: str) -> Callable[[nn.Module, Sequence[str]], Tensor] | None:
    if family.text is None:
        return None
    try:
        tokenizer = hf.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, TypeError):  # there is none beside the weights
        return None

    def encode_text(model: nn.Module, texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return family.text(model, tokens.to(model.device))

    return encode_text


def _saved_processor(name: str, source: str) -> hf.BaseImageProcessor | None:
    """The image processor saved with a model; None where there is none."""
    if Path(source).is_dir() and not (Path(source) / "preprocessor_config.json").is_file():
        return None
    with clear_errors(name):
        return hf.AutoImageProcessor.from_pretrained(source)


def _normalisation(processor: hf.BaseImageProcessor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, of pixels in [0, 1], that stand for all that the processor does to values."""
    factor = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    return tuple(m / factor for m in mean), tuple(s / factor for s in std)


def _block(module: nn.Module) -> Block:
    """A block of transformers' ViT, DINOv2, CLIP or BLIP, which differ only in names."""
    attention = getattr(module, "self_attn", None) or module.attention
    norm1, norm2 = next(
        (getattr(module, first), getattr(module, second))
        for first, second in (
            ("layer_norm1", "layer_norm2"), ("layernorm_before", "layernorm_after"), ("norm1", "norm2"),
        ) if hasattr(module, first)
    )  # fmt: skip
    if hasattr(attention, "qkv"):  # BLIP
        qkv, out = fused_qkv(lambda: (attention.qkv.weight, attention.qkv.bias)), attention.projection
    else:
        qkv = separate_qkv(attention.q_proj, attention.k_proj, attention.v_proj)
        out = attention.out_proj if hasattr(attention, "out_proj") else attention.o_proj
    heads = attention.num_heads if hasattr(attention, "num_heads") else attention.num_attention_heads
    scale1, scale2 = (getattr(module, f"layer_scale{i}", nn.Identity()) for i in (1, 2))
    return Block(module, norm1, qkv, heads, out, scale1, norm2, module.mlp, scale2)


def _tower(root, pool, layers, norm, linear: nn.Linear | None = None, smallest: int | None = None) -> Tower:
    """pool: the model's own read-out, from the tower's result to the output before projection."""

    def forward(pixels: Tensor) -> Tensor:
        pooled = pool(root(pixels))
        return pooled if linear is None else linear(pooled)

    def projection() -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if linear is None else (linear.weight, linear.bias)

    blocks, size = tuple(map(_block, layers)), sides(root.config.image_size)
    return Tower(root, forward, blocks, norm, projection, size, smallest)


def _class_token(output) -> Tensor:
    return output.last_hidden_state[:, 0]


def _blip(model: hf.BlipForImageTextRetrieval) -> Tower:
    # `pooler_output` would apply the final norm twice; retrieval reads the class token.
    vision = model.vision_model
    return _tower(vision, _class_token, vision.encoder.layers, vision.post_layernorm, model.vision_proj)


def _clip(model: hf.CLIPModel) -> Tower:
    vision = model.vision_model
    pooled = vision.encoder.layers, vision.post_layernorm, model.visual_projection
    return _tower(vision, lambda output: output.pooler_output, *pooled)


def _dinov2(model: nn.Module) -> Tower:
    smallest = max(sides(model.config.patch_size))
    return _tower(model, _class_token, model.encoder.layer, model.layernorm, smallest=smallest)


def _vit(model: nn.Module) -> Tower:
    return _tower(model, _class_token, model.layers, model.layernorm)


def _blip_text(model: nn.Module, tokens: hf.BatchEncoding) -> Tensor:
    hidden = model.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return model.text_proj(hidden[:, 0])


def _clip_text(model: nn.Module, tokens: hf.BatchEncoding) -> Tensor:
    return model.text_projection(model.text_model(**tokens).pooler_output)


def _resized(processor: type[hf.BaseImageProcessor]) -> Callable[[int, int], hf.BaseImageProcessor]:
    return lambda height, width: processor(size={"height": height, "width": width})


def _clip_processor(height: int, width: int) -> hf.BaseImageProcessor:
    crop = {"height": height, "width": width}
    return hf.CLIPImageProcessor(size={"shortest_edge": max(height, width)}, crop_size=crop)


def _dinov2_processor(height: int, width: int) -> hf.BaseImageProcessor:
    height, width = min(height, 224), min(width, 224)  # published with 518 positions a side, and run at 224
    return hf.BitImageProcessor(
        size={"shortest_edge": max(height, width) * 8 // 7},
        crop_size={"height": height, "width": width},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


FAMILIES = {
    "blip": Family("BLIP", hf.BlipForImageTextRetrieval, _blip, _resized(hf.BlipImageProcessor), _blip_text),
    "clip": Family("CLIP", hf.CLIPModel, _clip, _clip_processor, _clip_text),
    "dinov2": Family("DINOv2", hf.Dinov2Model, _dinov2, _dinov2_processor),
    "dinov2_with_registers": Family("DINOv2", hf.Dinov2WithRegistersModel, _dinov2, _dinov2_processor),
    "vit": Family("ViT", hf.ViTModel, _vit, _resized(hf.ViTImageProcessor), options={"add_pooling_layer": False}),
}


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """transformers draws a bar for the reading of weights, which takes no time. Downloads keep theirs."""
    before = hf.utils.logging.is_progress_bar_enabled()
    hf.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            hf.utils.logging.enable_progress_bar()
