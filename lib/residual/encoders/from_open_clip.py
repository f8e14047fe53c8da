"""Encoders of open_clip: loading, the image tower, and text."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import open_clip
import open_clip.model as models
import open_clip.transformer as blocks
import torch
from open_clip.coca_model import CoCa
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn

from residual.encoders.towers import Block, Loaded, Tower, clear_errors, fused_qkv, refuse
from residual.encoders.weights import WeightsError, check_names, read_weights, weight_files

# Sizes and buffers that older releases stored beside the weights.
UNREAD = ("attn_mask", "position_ids", "input_resolution", "context_length", "vocab_size")
MODELS = (models.CLIP, models.CustomTextCLIP, CoCa)


def load(name: str, model_name: str, pretrained: bool | str) -> Loaded:
    """See `load_encoder`. model_name: one of open_clip's, or "hf-hub:" or "local-dir:" and what has a configuration."""
    folder = Path(model_name.removeprefix("local-dir:")) if model_name.startswith("local-dir:") else None
    with _quiet(), torch.device("meta"), clear_errors(name, folder):  # without memory: to refuse before any work
        probe = open_clip.create_model(model_name, load_weights=False, pretrained_text=False, device="meta")
    read_tower(probe, name)
    tag = _checked_tag(name, model_name, pretrained)
    file = Path(tag) if tag and Path(tag).is_file() else None
    if folder and pretrained:
        with clear_errors(name, folder):
            file, *more = weight_files(folder)
        if more:
            raise WeightsError(f"{folder} holds weights in {1 + len(more)} shards; open_clip reads one file")
    with clear_errors(name, folder or file), _quiet():
        known = open_clip.get_pretrained_cfg(model_name, tag) if tag and not file else None
        options = {"quick_gelu": bool(known.get("quick_gelu", False))} if known else {}  # as the weights were trained
        fetched = pretrained is not False and file is None
        options |= {"load_weights": fetched, "pretrained_text": False, "require_pretrained": fetched}
        options |= {"device": torch.get_default_device()}  # "meta" where sizes alone are asked for
        model = open_clip.create_model(model_name, None if file else tag, **options)
        if file:
            _load(model, name, read_weights([file]))
        tokenizer = open_clip.get_tokenizer(model_name)
    settings = model.visual.preprocess_cfg
    gelu = type(model.visual.transformer.resblocks[0].mlp.gelu).__name__
    return Loaded(
        model=model,
        family="CLIP" if tag == "openai" or gelu == "QuickGELU" else "OpenCLIP",
        weights=f"{model_name}, {tag}" if tag else name,
        read_tower=read_tower,
        preprocess=image_transform_v2(PreprocessCfg(**settings), is_train=False),
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        text=lambda model, texts: _encode_text(model, tokenizer, texts),
        too_long=lambda texts: _too_long(tokenizer, texts),
    )


def _load(model: nn.Module, name: str, weights: dict[str, Tensor]) -> None:
    own = model.state_dict()
    wrong = (key for key, value in own.items() if key not in weights or weights[key].shape != value.shape)
    check_names(model, name, wrong, (key for key in weights.keys() - own if key.rpartition(".")[2] not in UNREAD))
    model.load_state_dict(weights, strict=False)


def _checked_tag(name: str, model_name: str, pretrained: bool | str) -> str | None:
    """The tag of the weights, or None for random ones and for models that name their own."""
    if ":" in model_name:
        if isinstance(pretrained, str):
            raise ValueError(f"{name} names its own weights; pretrained={pretrained!r} does not apply")
        return None
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if pretrained is not False and pretrained not in tags and not Path(str(pretrained)).is_file():
        problem = "comes with several weights" if pretrained is True else f"has no weights {pretrained!r}"
        raise ValueError(f"{name} {problem}; give pretrained= one of {tags}, a file, or False")
    return pretrained or None


def _encode_text(model: nn.Module, tokenizer: Callable[[Sequence[str]], Tensor], texts: Sequence[str]) -> Tensor:
    return model.encode_text(tokenizer(texts).to(model.visual.ln_post.weight.device))


def _too_long(tokenizer: Callable[..., Tensor], texts: Sequence[str]) -> list[bool]:
    """Which texts would fill more than the tokenizer's context: those that leave no padding after it in a wider one."""
    width = tokenizer.context_length
    padding = tokenizer([""], context_length=width + 2)[0, -1]
    return (tokenizer(texts, context_length=width + 2)[:, width:] != padding).any(1).tolist()


def read_tower(model: nn.Module, name: str) -> Tower:
    """The image tower of a model. Raises UnsupportedArchitectureError, with the reason, where Eq. 1 does not hold."""
    if type(model) not in MODELS:
        refuse(name, f"models of class {type(model).__name__} have no known tower")
    visual = model.visual
    if not isinstance(visual, blocks.VisionTransformer):
        refuse(name, f"its image tower is {type(visual).__name__}, not open_clip's VisionTransformer")
    if visual.attn_pool is not None:
        refuse(name, "it pools by attention, which is not linear in the residual stream")
    if visual.pool_type != "tok":
        refuse(name, f"it pools by {visual.pool_type!r}, and has no class token to read")
    if not isinstance(visual.patch_dropout, nn.Identity):
        refuse(name, "it drops patches")

    def forward(pixels: Tensor) -> Tensor:
        output = visual(pixels)
        return output[0] if isinstance(output, tuple) else output

    def projection() -> tuple[Tensor | None, None]:
        return (None if visual.proj is None else visual.proj.T), None

    residual_blocks = tuple(_block(module, name) for module in visual.transformer.resblocks)
    return Tower(visual, forward, residual_blocks, visual.ln_post, projection, tuple(visual.image_size)).checked(name)


def _block(module: nn.Module, name: str) -> Block:
    if type(module) is not blocks.ResidualAttentionBlock:
        refuse(name, f"its blocks are {type(module).__name__}, whose inner norms and scales are not linear")
    attention = module.attn
    qkv = fused_qkv(lambda: (attention.in_proj_weight, attention.in_proj_bias))
    first, second = (module.ln_1, qkv, attention.num_heads, attention.out_proj, module.ls_1), (module.ln_2, module.mlp)
    return Block(module, *first, *second, module.ls_2)


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
