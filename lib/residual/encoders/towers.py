"""The one shape that all decomposable image towers share, read off the libraries' own modules.

A tower is pre-norm blocks around a residual stream, a final LayerNorm, and at most
one linear projection, read at the class token (appendix A.1). Anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import open_clip.model as oc_model
import open_clip.transformer as oc
import torch.nn.functional as F
import transformers as hf
from jaxtyping import Float
from open_clip.coca_model import CoCa
from torch import Tensor, nn
from transformers.models.blip.modeling_blip import BlipEncoderLayer
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersLayer
from transformers.models.vit.modeling_vit import ViTLayer


class UnsupportedArchitectureError(ValueError):
    """The residual decomposition (Eq. 1) does not hold for this architecture."""


@dataclass(frozen=True)
class Block:
    """One pre-norm block: x + scale1(out(heads(norm1(x)))), then the same with mlp.

    qkv: (normed tokens [n t w], normed query tokens [n q w]) -> queries, keys, values [n t h*dh].
    """

    module: nn.Module
    norm1: nn.Module
    qkv: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    heads: int
    out: nn.Linear
    scale1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    scale2: nn.Module

    @property
    def gain(self) -> Float[Tensor, "w"] | None:
        """The layer scale that follows attention, as open_clip and transformers name it."""
        return getattr(self.scale1, "gamma", getattr(self.scale1, "lambda1", None))


@dataclass(frozen=True)
class Tower:
    """An image tower. `forward` is the library's own, to the pooled output."""

    root: nn.Module
    forward: Callable[[Tensor], Float[Tensor, "n d"]]
    blocks: tuple[Block, ...]
    norm: nn.LayerNorm
    projection: Callable[[], tuple[Tensor | None, Tensor | None]]  # weight [d w] and bias [d]
    image_size: tuple[int, int]
    smallest: int | None = None  # smallest side of other image sizes that the tower takes; None: it takes none


def read_tower(model: nn.Module, name: str) -> Tower:
    """Describe the image tower of a model.

    Raises UnsupportedArchitectureError, with the name and the reason, where Eq. 1 does not hold.
    """
    readers = {
        oc_model.CLIP: _open_clip,
        oc_model.CustomTextCLIP: _open_clip,
        CoCa: _open_clip,
        hf.BlipForImageTextRetrieval: _blip,
        hf.CLIPModel: _clip,
        hf.Dinov2Model: _dinov2,
        hf.Dinov2WithRegistersModel: _dinov2,
        hf.ViTModel: _vit,
    }
    reader = readers.get(type(model))
    if reader is None:
        refuse(name, f"models of class {type(model).__name__} have no known tower")
    tower = reader(model, name)
    if not isinstance(tower.norm, nn.LayerNorm):
        refuse(name, f"its final norm is {type(tower.norm).__name__}, not LayerNorm")
    if tower.norm.weight is None or tower.norm.bias is None:
        refuse(name, "its final norm has no weight or no bias")
    for index, block in enumerate(tower.blocks):
        if not isinstance(block.out, nn.Linear):
            refuse(name, f"the output projection of block {index} is {type(block.out).__name__}, not Linear")
    return tower


def sides(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """Height and width from a configuration's size, which may be one number for both."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def refuse(name: str, reason: str) -> None:
    raise UnsupportedArchitectureError(f"{name} cannot be decomposed into residual units: {reason}")


def _open_clip(model: nn.Module, name: str) -> Tower:
    visual = model.visual
    if not isinstance(visual, oc.VisionTransformer):
        refuse(name, f"its image tower is {type(visual).__name__}, not open_clip's VisionTransformer")
    if visual.attn_pool is not None:
        refuse(name, "it pools by attention, which is not linear in the residual stream")
    if visual.pool_type != "tok":
        refuse(name, f"it pools by {visual.pool_type!r}, and has no class token to read")
    if not isinstance(visual.patch_dropout, nn.Identity):
        refuse(name, "it drops patches")
    blocks = []
    for module in visual.transformer.resblocks:
        if type(module) is not oc.ResidualAttentionBlock:
            refuse(name, f"its blocks are {type(module).__name__}, whose inner norms and scales are not linear")
        attention = module.attn
        blocks.append(
            Block(
                module,
                module.ln_1,
                _fused(lambda a=attention: (a.in_proj_weight, a.in_proj_bias)),
                attention.num_heads,
                attention.out_proj,
                module.ls_1,
                module.ln_2,
                module.mlp,
                module.ls_2,
            )
        )

    def forward(pixels: Tensor) -> Tensor:
        output = visual(pixels)
        return output[0] if isinstance(output, tuple) else output

    def projection() -> tuple[Tensor | None, None]:
        return (None if visual.proj is None else visual.proj.T), None

    return Tower(visual, forward, tuple(blocks), visual.ln_post, projection, tuple(visual.image_size))


def _fused(parameters: Callable[[], tuple[Tensor, Tensor | None]]) -> Callable:
    """Queries, keys and values from one weight [3w w]; queries for fewer tokens use its first third only."""

    def qkv(tokens: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = parameters()
        if queries is tokens:
            return F.linear(tokens, weight, bias).chunk(3, -1)
        width = weight.shape[1]
        first, rest = (None, None) if bias is None else bias.split([width, 2 * width])
        keys_values = F.linear(tokens, weight[width:], rest)
        return (F.linear(queries, weight[:width], first), *keys_values.chunk(2, -1))

    return qkv


def _separate(query: nn.Module, key: nn.Module, value: nn.Module) -> Callable:
    return lambda tokens, queries: (query(queries), key(tokens), value(tokens))


def _transformers_block(module: nn.Module) -> Block:
    """A block of transformers' ViT, DINOv2, CLIP or BLIP, which differ in names only."""
    match module:
        case BlipEncoderLayer() | CLIPEncoderLayer():
            attention, norm1, norm2 = module.self_attn, module.layer_norm1, module.layer_norm2
            heads = attention.num_heads
        case ViTLayer():
            attention, norm1, norm2 = module.attention, module.layernorm_before, module.layernorm_after
            heads = attention.num_attention_heads
        case Dinov2Layer() | Dinov2WithRegistersLayer():
            attention, norm1, norm2 = module.attention, module.norm1, module.norm2
            heads = attention.num_attention_heads
        case _:
            raise UnsupportedArchitectureError(f"blocks of class {type(module).__name__} are not decomposable")
    if isinstance(module, BlipEncoderLayer):
        qkv, out = _fused(lambda: (attention.qkv.weight, attention.qkv.bias)), attention.projection
    else:
        qkv = _separate(attention.q_proj, attention.k_proj, attention.v_proj)
        out = attention.out_proj if isinstance(module, CLIPEncoderLayer) else attention.o_proj
    scale1, scale2 = (getattr(module, f"layer_scale{i}", nn.Identity()) for i in (1, 2))
    return Block(module, norm1, qkv, heads, out, scale1, norm2, module.mlp, scale2)


def _blip(model: hf.BlipForImageTextRetrieval, name: str) -> Tower:
    vision = model.vision_model

    def forward(pixels: Tensor) -> Tensor:
        # `pooler_output` would apply the final norm twice; retrieval reads the class token.
        return model.vision_proj(vision(pixels).last_hidden_state[:, 0])

    return _transformers_tower(
        vision, forward, vision.encoder.layers, vision.post_layernorm, model.vision_proj, vision.config
    )


def _clip(model: hf.CLIPModel, name: str) -> Tower:
    vision = model.vision_model

    def forward(pixels: Tensor) -> Tensor:
        return model.visual_projection(vision(pixels).pooler_output)

    return _transformers_tower(
        vision, forward, vision.encoder.layers, vision.post_layernorm, model.visual_projection, vision.config
    )


def _dinov2(model: nn.Module, name: str) -> Tower:
    def forward(pixels: Tensor) -> Tensor:
        return model(pixels).last_hidden_state[:, 0]

    return _transformers_tower(
        model, forward, model.encoder.layer, model.layernorm, None, model.config, max(sides(model.config.patch_size))
    )


def _vit(model: hf.ViTModel, name: str) -> Tower:
    def forward(pixels: Tensor) -> Tensor:
        return model(pixels).last_hidden_state[:, 0]

    return _transformers_tower(model, forward, model.layers, model.layernorm, None, model.config)


def _transformers_tower(root, forward, layers, norm, linear: nn.Linear | None, config, smallest=None) -> Tower:
    def projection() -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if linear is None else (linear.weight, linear.bias)

    return Tower(
        root, forward, tuple(map(_transformers_block, layers)), norm, projection, sides(config.image_size), smallest
    )
