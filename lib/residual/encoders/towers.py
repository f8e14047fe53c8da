"""What loaders return: a model and its image tower, described in the same way for all libraries.

A tower is pre-norm blocks around a residual stream, a final LayerNorm, and at most
one linear projection, read at the class token (appendix A.1). Anything else is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten

import torch.nn.functional as F
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor, nn

from residual.encoders.weights import WeightsError

LONGEST = 500  # characters of another library's message


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

    def checked(self, name: str) -> Tower:
        """This tower, if Eq. 1 holds for it; raises UnsupportedArchitectureError, with the reason, if not."""
        if not isinstance(self.norm, nn.LayerNorm):
            refuse(name, f"its final norm is {type(self.norm).__name__}, not LayerNorm")
        if self.norm.weight is None or self.norm.bias is None:
            refuse(name, "its final norm has no weight or no bias")
        for index, block in enumerate(self.blocks):
            if not isinstance(block.out, nn.Linear):
                refuse(name, f"the output projection of block {index} is {type(block.out).__name__}, not Linear")
        return self


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model with what turns images and texts into its inputs.

    family: "OpenCLIP", "CLIP", "BLIP", "DINOv2" or "ViT". weights: where they come from.
    preprocess: PIL image -> normalised pixels [3 h w]. mean, std: of the pixels that it normalises.
    text: (model, texts) -> encodings [t d]; None without a text tower or tokenizer.
    too_long: which of the texts have more tokens than the text tower reads, and are cut.
    vision: what was joined to a reader by a linear map, for an encoder that is made of two.
    """

    model: nn.Module
    family: str
    weights: str
    read_tower: Callable[[nn.Module, str], Tower]
    preprocess: Callable[[Image], Float[Tensor, "3 h w"]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    text: Callable[[nn.Module, Sequence[str]], Float[Tensor, "t d"]] | None
    too_long: Callable[[Sequence[str]], list[bool]] | None
    vision: Loaded | None = field(default=None, kw_only=True)


def refuse(name: str, reason: str, *, what: str = "cannot be decomposed into residual units") -> None:
    raise UnsupportedArchitectureError(f"{name} {what}: {reason}")


def sides(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """Height and width from a configuration's size, which may be one number for both."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def fused_qkv(parameters: Callable[[], tuple[Tensor, Tensor | None]]) -> Callable:
    """Queries, keys and values from one weight [3w w]; queries for fewer tokens use only its first third."""

    def qkv(tokens: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = parameters()
        if queries is tokens:
            return F.linear(tokens, weight, bias).chunk(3, -1)
        width = weight.shape[1]
        first, rest = (None, None) if bias is None else bias.split([width, 2 * width])
        keys_values = F.linear(tokens, weight[width:], rest)
        return (F.linear(queries, weight[:width], first), *keys_values.chunk(2, -1))

    return qkv


def separate_qkv(query: nn.Module, key: nn.Module, value: nn.Module) -> Callable:
    return lambda tokens, queries: (query(queries), key(tokens), value(tokens))


@contextlib.contextmanager
def clear_errors(name: str, folder: Path | None = None) -> Iterator[None]:
    """Say what to do when weights or configuration cannot be read from a local folder, or fetched from a hub."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        program = "its file of weights is damaged, or holds a program, which is not run; give safetensors"
        told = program if isinstance(error, UnpicklingError) else " ".join(str(error).split()).rstrip(".")
        reason = shorten(told or type(error).__name__, LONGEST)
        advice = f"Check the files of {folder}: they must be whole, and of one model" if folder else (
            "Connect once, set HF_HOME to a cache that holds it, or give a local folder"
        )  # fmt: skip
        raise RuntimeError(
            f"cannot load {name!r}: {reason}. {advice}; pretrained=False gives random weights."
        ) from error
