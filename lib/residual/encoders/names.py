"""Finds the model behind a name, and refuses what cannot be decomposed before any weights are read."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import transformers as hf
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import nn

from residual.towers import read_tower, refuse, sides

ZOO = Path(__file__).parent / "zoo"
EMBEDDED = ("mini-openclip", "mini-clip", "mini-blip", "mini-dinov2", "mini-vit")


@dataclass(frozen=True)
class Source:
    """Where an encoder of the paper comes from; `config` builds it offline with random weights."""

    id: str
    tag: str | None = None  # open_clip's name of the weights; None: a model of transformers
    config: dict | None = None


def _vit_sizes(layers: int, heads: int | None = None, **more: object) -> dict:
    heads = heads or (12 if layers == 12 else 16)
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | {"hidden_size": 64 * heads, "intermediate_size": 256 * heads} | more


def _dinov2_config(layers: int, heads: int | None = None) -> dict:
    sizes = _vit_sizes(layers, heads, model_type="dinov2", image_size=518, patch_size=14)
    del sizes["intermediate_size"]  # DINOv2 derives it from `mlp_ratio`
    return sizes


def _blip_config(layers: int) -> dict:
    # transformers' default for BLIP draws weights of 1e-10, with which no image differs from another.
    vision = _vit_sizes(layers, image_size=384, patch_size=16, initializer_range=0.02)
    text = {"encoder_hidden_size": vision["hidden_size"]}
    return {"model_type": "blip", "vision_config": vision, "text_config": text, "image_text_hidden_size": 256}


PAPER = {
    "OpenCLIP-L": Source("ViT-L-14", "laion2b_s32b_b82k"),
    "OpenCLIP-B": Source("ViT-B-16", "laion2b_s34b_b88k"),
    "CLIP-L": Source("ViT-L-14-quickgelu", "openai"),  # OpenAI trained with QuickGELU
    "CLIP-B": Source("ViT-B-16-quickgelu", "openai"),
    "BLIP-L": Source("Salesforce/blip-itm-large-flickr", config=_blip_config(24)),
    "BLIP-B": Source("Salesforce/blip-itm-base-flickr", config=_blip_config(12)),
    "DINOv2-L": Source("facebook/dinov2-large", config=_dinov2_config(24)),
    "DINOv2-S": Source("facebook/dinov2-small", config=_dinov2_config(12, heads=6)),  # not of the paper
    "DINOv2-B": Source("facebook/dinov2-base", config=_dinov2_config(12)),
    "ViT-L": Source("google/vit-large-patch16-224", config=_vit_sizes(24, model_type="vit")),
    "ViT-B": Source("google/vit-base-patch16-224", config=_vit_sizes(12, model_type="vit")),
}
FAMILIES = {"blip": "BLIP", "clip": "CLIP", "dinov2": "DINOv2", "dinov2_with_registers": "DINOv2", "vit": "ViT"}
CLASSES: dict[str, type[hf.PreTrainedModel]] = {
    "blip": hf.BlipForImageTextRetrieval,
    "clip": hf.CLIPModel,
    "dinov2": hf.Dinov2Model,
    "dinov2_with_registers": hf.Dinov2WithRegistersModel,
    "vit": hf.ViTModel,
}
REASONS = {  # why some well-known model types of transformers are refused
    "swin": "it has no class token, and its residual stream is merged between stages",
    "swinv2": "its blocks are post-norm, and it has no class token",
    "convnext": "it is a convolutional network",
    "resnet": "it is a convolutional network",
    "siglip": "it pools by attention, which is not linear in the residual stream",
    "siglip2": "it pools by attention, which is not linear in the residual stream",
    "beit": "its class token is not read by default: it pools by averaging patches",
}


@dataclass(frozen=True)
class Found:
    """A model with what turns images and texts into its inputs."""

    model: nn.Module
    family: str
    weights: str
    preprocess: Callable
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokenize: Callable | None


def encoder_names() -> tuple[str, ...]:
    """The names that need no hub to be understood: embedded encoders and the paper's."""
    return (*EMBEDDED, *PAPER)


def split_tag(name: str) -> tuple[str, str]:
    """The name and the tag of "name@tag"; the tag is empty where there is none."""
    if "@" not in name or Path(name).is_dir():
        return name, ""
    base, _, tag = name.rpartition("@")
    return base, tag


def check_name(name: str) -> str:
    """Return a name, with or without "@tag", that could be an encoder's. Raises ValueError for others."""
    base, _ = split_tag(name)
    by_id = base.removeprefix("hf-hub:").count("/") == 1
    if base in encoder_names() or base in open_clip.list_models() or by_id or (base and Path(base).is_dir()):
        return name
    raise ValueError(
        f"unknown encoder {base!r}; give one of {', '.join(encoder_names())}, a model name of open_clip, "
        "a hub id such as 'facebook/dinov2-small', or an existing folder"
    )


def weights_repo(name: str) -> str:
    """The hub's id of what holds an encoder's weights; empty where they are on none, or it cannot be told."""
    base, tag = split_tag(name)
    source = PAPER.get(base) or Source(base.removeprefix("hf-hub:"), tag or None)
    if source.tag:
        return (open_clip.get_pretrained_cfg(source.id, tag or source.tag) or {}).get("hf_hub", "").strip("/")
    return source.id if source.id.count("/") == 1 else ""


def find(name: str, pretrained: bool | str) -> Found:
    """See `load_encoder`."""
    check_name(name)
    folder = ZOO / name if name in EMBEDDED else Path(name)
    by_id = {source.id: source for source in PAPER.values() if source.tag is None}
    if name in EMBEDDED or folder.is_dir():
        if (folder / "open_clip_config.json").is_file():
            return _load_open_clip(name, f"local-dir:{folder}", pretrained)
        if (folder / "config.json").is_file():
            return _load_transformers(name, str(folder), pretrained, None)
        raise FileNotFoundError(f"{folder} has neither open_clip_config.json nor config.json")
    if name in PAPER or name in by_id:
        source = PAPER.get(name) or by_id[name]
        if source.tag is None:
            return _load_transformers(name, source.id, pretrained, source.config)
        return _load_open_clip(name, source.id, source.tag if pretrained is True else pretrained)
    if name.startswith("hf-hub:") or name in open_clip.list_models():
        return _load_open_clip(name, name, pretrained)
    return _load_transformers(name, name, pretrained, None)


def _load_open_clip(name: str, model_name: str, pretrained: bool | str) -> Found:
    with _quiet(), torch.device("meta"), _clear_errors(name):  # no memory, no weights: to refuse before any work
        probe = open_clip.create_model(model_name, load_weights=False, pretrained_text=False, device="meta")
    read_tower(probe, name)
    builtin = ":" not in model_name
    if pretrained is not False and builtin:
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        if pretrained not in tags and not Path(str(pretrained)).is_file():
            problem = "comes with several weights" if pretrained is True else f"has no weights {pretrained!r}"
            raise ValueError(f"{name} {problem}; give pretrained= one of {tags}, a file, or False")
    elif isinstance(pretrained, str):
        raise ValueError(f"{name} names its own weights; pretrained={pretrained!r} does not apply")
    tag = pretrained if builtin and pretrained else None
    options = {}
    if tag and (known := open_clip.get_pretrained_cfg(model_name, tag)):
        options["quick_gelu"] = bool(known.get("quick_gelu", False))  # as the weights were trained
    with _quiet(), _clear_errors(name):
        model = open_clip.create_model(
            model_name,
            tag,
            load_weights=pretrained is not False,
            pretrained_text=False,
            require_pretrained=pretrained is not False,
            **options,
        )
        tokenizer = open_clip.get_tokenizer(model_name)
    settings = model.visual.preprocess_cfg
    gelu = type(model.visual.transformer.resblocks[0].mlp.gelu).__name__
    return Found(
        model=model,
        family="CLIP" if tag == "openai" or gelu == "QuickGELU" else "OpenCLIP",
        weights=f"{model_name}, {tag}" if tag else name,
        preprocess=image_transform_v2(PreprocessCfg(**settings), is_train=False),
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        tokenize=tokenizer,
    )


def _load_transformers(name: str, source: str, pretrained: bool | str, offline: dict | None) -> Found:
    if isinstance(pretrained, str):
        raise ValueError(f"{name} is a model of transformers and has no tags; pretrained={pretrained!r} does not apply")
    if offline and not pretrained:
        config = hf.AutoConfig.for_model(**offline)
    else:
        with _clear_errors(name):
            config = hf.AutoConfig.from_pretrained(source, trust_remote_code=False)
    kind = config.model_type
    if kind not in CLASSES:
        reason = REASONS.get(kind, "only pre-norm blocks with a class token and a linear read-out can be")
        refuse(name, f"model type {kind!r}: {reason} (known types: {', '.join(CLASSES)})")
    if (channels := getattr(getattr(config, "vision_config", config), "num_channels", 3)) != 3:
        refuse(name, f"it takes images of {channels} channels, not RGB")
    options = {"add_pooling_layer": False} if kind == "vit" else {}
    processor = tokenizer = None
    if pretrained:
        with _clear_errors(name), _no_bar():
            # Weights may be kept in half precision; `load_encoder` decides in which they are used.
            options |= {"dtype": torch.float32, "output_loading_info": True}
            model, report = CLASSES[kind].from_pretrained(source, **options)
        if report["missing_keys"] or report["mismatched_keys"]:
            missing = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
            raise RuntimeError(
                f"the weights of {name} do not fit {type(model).__name__}: {missing[:5]} missing or misshapen"
            )
    else:
        model = CLASSES[kind](config, **options)
    if pretrained or not offline:
        processor = _saved_processor(name, source)
        if kind in ("blip", "clip"):
            with contextlib.suppress(OSError, ValueError, TypeError):
                tokenizer = hf.AutoTokenizer.from_pretrained(source)
    processor = processor or _default_processor(kind, config)
    mean, std = _normalisation(processor)
    return Found(
        model=model,
        family=FAMILIES[kind],
        weights=name if Path(source).is_dir() else source,
        preprocess=lambda image: processor(images=image.convert("RGB"), return_tensors="pt").pixel_values[0],
        mean=mean,
        std=std,
        tokenize=tokenizer and (lambda texts: tokenizer(texts, padding=True, truncation=True, return_tensors="pt")),
    )


def _saved_processor(name: str, source: str) -> hf.BaseImageProcessor | None:
    """The image processor saved with a model; None where there is none."""
    file = Path(source) / "preprocessor_config.json"
    if Path(source).is_dir() and not file.is_file():
        return None
    with _clear_errors(name):
        return hf.AutoImageProcessor.from_pretrained(source)


def _normalisation(processor: hf.BaseImageProcessor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, of pixels in [0, 1], that stand for all that the processor does to values."""
    factor = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    return tuple(m / factor for m in mean), tuple(s / factor for s in std)


def _default_processor(kind: str, config: hf.PretrainedConfig) -> hf.BaseImageProcessor:
    height, width = sides(getattr(config, "vision_config", config).image_size)
    size = {"height": height, "width": width}
    if kind == "blip":
        return hf.BlipImageProcessor(size=size)
    if kind == "vit":
        return hf.ViTImageProcessor(size=size)
    if kind == "clip":
        return hf.CLIPImageProcessor(size={"shortest_edge": max(height, width)}, crop_size=size)
    # DINOv2 was published with 518 positions a side, and is run at 224.
    height, width = min(height, 224), min(width, 224)
    return hf.BitImageProcessor(
        size={"shortest_edge": max(height, width) * 8 // 7},
        crop_size={"height": height, "width": width},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs on the root logger that weights are random, which is asked for here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "QuickGELU mismatch")
            yield
    finally:
        logging.disable(before)


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


@contextlib.contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    """Say what to do when weights or configuration cannot be had or read."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"cannot load {name!r}: {str(error).strip().splitlines()[0]} Weights come from a hub, its cache or a local "
            "folder: connect once, give a complete folder, or pass pretrained=False for random weights."
        ) from error
