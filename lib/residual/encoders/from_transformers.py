"""Encoders of transformers: loading, the image tower, and text."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers as hf
from PIL import Image
from torch import Tensor, nn

from residual.encoders.towers import Block, Loaded, Tower, clear_errors, fused_qkv, refuse, separate_qkv, sides
from residual.encoders.weights import check_names, read_weights, weight_files

log = logging.getLogger(__name__)
Tokenizer = hf.PreTrainedTokenizerBase
# Parts of weights that have no place in a tower, as they come after it or are for training.
UNREAD = (
    "classifier|cls_classifier|distillation_classifier|pooler|mask_token|decoder|text_decoder|position_ids|itm_head"
)
UNREAD_TEXT = "text_model|text_encoder|text_projection|text_proj|logit_scale|logit_bias"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt")
PROJECTED = "clip_vision_model with projection"


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
    folder = Path(source) if Path(source).is_dir() else None
    with clear_errors(name, folder):
        files = weight_files(folder) if folder and pretrained else None
    if offline and not pretrained:
        config = hf.AutoConfig.for_model(**offline)
    else:
        with clear_errors(name, folder):
            config = hf.AutoConfig.from_pretrained(source, trust_remote_code=False)
    _read_by_name(config)
    family = _family(name, config)
    model = _pretrained(name, source, family, config, files) if pretrained else family.model(config, **family.options)
    saved = pretrained or not offline
    height, width = sides(getattr(config, "vision_config", config).image_size)
    processor = _saved_processor(name, source, folder) if saved else None
    if processor is None and folder and pretrained:
        log.warning("%s has no preprocessor_config.json; its size, mean and deviation are taken for the usual", name)
    if processor is not None:
        _check_processor(processor, read_tower(model, name), name)
    processor = processor or family.processor(height, width)
    mean, std = _normalisation(processor)
    tokenizer = _tokenizer(name, source, folder) if family.text and saved else None
    return Loaded(
        model=model,
        family=family.name,
        weights=name if folder else source,
        read_tower=read_tower,
        preprocess=lambda image: _pixels(processor, image),
        mean=mean,
        std=std,
        text=tokenizer and (lambda model, texts: _encode_text(family, model, tokenizer, texts)),
        too_long=tokenizer and (lambda texts: _too_long(config, tokenizer, texts)),
    )


def _read_by_name(config: hf.PretrainedConfig) -> None:
    """Towers read a model's results by name, even where its configuration asks for tuples."""
    for part in (config, *(getattr(config, name) for name in config.sub_configs if hasattr(config, name))):
        part.return_dict = True


def read_tower(model: nn.Module, name: str) -> Tower:
    """The image tower of a model. Raises UnsupportedArchitectureError, with the reason, where Eq. 1 does not hold."""
    towers = {family.model: family.tower for family in FAMILIES.values()}
    if type(model) not in towers:
        refuse(name, f"models of class {type(model).__name__} have no known tower")
    return towers[type(model)](model).checked(name)


def _family(name: str, config: hf.PretrainedConfig) -> Family:
    kind = config.model_type
    if kind not in FAMILIES:
        refuse(name, f"these are: {', '.join(FAMILIES)}", what=f"is of model type {kind!r}, which is not read here")
    if (channels := getattr(getattr(config, "vision_config", config), "num_channels", 3)) != 3:
        refuse(name, f"it takes images of {channels} channels, not RGB")
    if "CLIPVisionModelWithProjection" in (config.architectures or ()):  # of the same model type as without
        kind = PROJECTED
    return FAMILIES[kind]


def _pretrained(
    name: str, source: str, family: Family, config: hf.PretrainedConfig, files: list[Path] | None
) -> nn.Module:
    """The model, with the weights of a hub or of local files. Raises WeightsError where these are not the model's."""
    # Weights may be stored in half precision; `load_encoder` decides in which they are used.
    options = family.options | {"config": config, "dtype": torch.float32, "output_loading_info": True}
    options |= {"ignore_mismatched_sizes": True}
    with clear_errors(name, Path(source) if files else None), silent():
        options |= {"state_dict": read_weights(files)} if files else {}
        model, report = family.model.from_pretrained(None if files else source, **options)
    unread = UNREAD if family.text else rf"{UNREAD}|{UNREAD_TEXT}"
    wrong = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    theirs = [key for key in report["unexpected_keys"] if not re.search(rf"(^|\.)({unread})(\.|$)", key)]
    check_names(model, name, wrong, theirs)
    return model


def _tokenizer(name: str, source: str, folder: Path | None) -> Tokenizer | None:
    """The tokenizer saved with a model; None where there is none. Raises RuntimeError for one that does not work."""
    if folder and not any((folder / file).is_file() for file in TOKENIZERS):
        return None  # transformers would make one without words
    try:
        tokenizer = hf.AutoTokenizer.from_pretrained(source)
        tokenizer(["a", "a longer text"], padding=True)
        return tokenizer
    except Exception as error:  # `tokenizers` raises bare ones
        if folder is None:
            return None
        raise RuntimeError(
            f"the tokenizer of {name} cannot be used: {error}. Check {', '.join(TOKENIZERS)} in {folder}, or move them "
            "away to use the encoder without text"
        ) from error


def _encode_text(family: Family, model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    limit = _longest(model.config, tokenizer)
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    return family.text(model, tokens.to(model.device))


def _longest(config: hf.PretrainedConfig, tokenizer: Tokenizer) -> int:
    """Tokens that a text may have: some tokenizers do not know of their model's positions."""
    return min(tokenizer.model_max_length, config.text_config.max_position_embeddings)


def _too_long(config: hf.PretrainedConfig, tokenizer: Tokenizer, texts: Sequence[str]) -> list[bool]:
    limit = _longest(config, tokenizer)
    return [len(tokens) > limit for tokens in tokenizer(texts, verbose=False)["input_ids"]]


def _saved_processor(name: str, source: str, folder: Path | None) -> hf.BaseImageProcessor | None:
    """The image processor saved with a model; None where there is none."""
    if folder and not any((folder / f"{kind}_config.json").is_file() for kind in ("preprocessor", "processor")):
        return None
    with clear_errors(name, folder):
        return hf.AutoImageProcessor.from_pretrained(source)


def _check_processor(processor: hf.BaseImageProcessor, tower: Tower, name: str) -> None:
    """Raises ValueError where images of any shape do not become what the model takes."""
    height, width = tower.image_size
    images = (Image.new("RGB", size) for size in ((width, 2 * height), (2 * width, height)))
    tall, wide = (_pixels(processor, image).shape[1:] for image in images)
    fits = tuple(tall) == tower.image_size or (tower.smallest and min(tall) >= tower.smallest)
    if tall != wide or not fits:
        sizes = " or ".join(dict.fromkeys(f"{h} x {w}" for h, w in (tall, wide)))
        raise ValueError(
            f"{name}: its preprocessor_config.json makes images of {sizes} pixels, and config.json describes a model "
            f"for {height} x {width}; one of the two files is another model's"
        )


def _pixels(processor: hf.BaseImageProcessor, image: Image.Image) -> Tensor:
    return processor(images=image.convert("RGB"), return_tensors="pt").pixel_values[0]


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


def _clip_vision(model: nn.Module) -> Tower:
    """A CLIP without its text tower, with its projection or without."""
    vision, linear = getattr(model, "vision_model", model), getattr(model, "visual_projection", None)
    return _tower(vision, lambda output: output.pooler_output, vision.encoder.layers, vision.post_layernorm, linear)


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
    "clip_vision_model": Family("CLIP", hf.CLIPVisionModel, _clip_vision, _clip_processor),
    PROJECTED: Family("CLIP", hf.CLIPVisionModelWithProjection, _clip_vision, _clip_processor),
    "dinov2": Family("DINOv2", hf.Dinov2Model, _dinov2, _dinov2_processor),
    "dinov2_with_registers": Family("DINOv2", hf.Dinov2WithRegistersModel, _dinov2, _dinov2_processor),
    "vit": Family("ViT", hf.ViTModel, _vit, _resized(hf.ViTImageProcessor), options={"add_pooling_layer": False}),
}


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """transformers draws a bar for the reading of weights, which takes no time, and a table of those that do not fit.

    Downloads keep their bars; weights that do not fit are an error here.
    """
    logging = hf.utils.logging
    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
