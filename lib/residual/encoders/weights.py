"""Files of weights: which there are, whose they look like, and what training loops wrap around them."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
POINTER = b"version https://git-lfs"  # how a file begins that git-LFS has not fetched
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "_orig_mod", "net")  # around or before the names
ORIGINS = {  # patterns of names, by what saves them
    "open_clip or OpenAI's CLIP": r"visual\.(transformer\.resblocks|conv1|trunk)\.",
    "transformers' SigLIP": r"vision_model\.head\.(probe|attention)",
    "transformers' BLIP": r"vision_model\.encoder\.layers\.\d+\.self_attn\.(qkv|projection)",
    "transformers' CLIP": r"vision_model\.encoder\.layers\.\d+\.self_attn\.q_proj",
    "the BLIP of its authors": r"visual_encoder\.blocks\.",
    "transformers' DINOv2": r"layers?\.\d+\.layer_scale1\.lambda1",
    "transformers' ViT": r"layer\.\d+\.(attention\.attention|intermediate)\.|layers\.\d+\.attention\.q_proj",
    "timm, or DINO of its authors": r"blocks\.\d+\.attn\.(qkv|proj)",
    "torchvision's ViT": r"encoder_layer_\d+\.self_attention",
    "a ConvNeXt": r"stages\.\d+\.(blocks|layers)\.\d+\.(conv_dw|dwconv)",
    "a ResNet": r"layer\d\.\d+\.conv\d",
    "adapters (LoRA)": r"lora_[AB]\.",
}

log = logging.getLogger(__name__)


class WeightsError(RuntimeError):
    """Weights are missing, or are not those of the model; says which, and what to do."""


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder: safetensors where there are any, as libraries prefer them."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in ENDINGS and path.is_file()]
    return [path for path in files if path.suffix == ".safetensors"] or files


def check_files(files: Collection[Path], name: str) -> None:
    """Raises WeightsError where there is none, or git left a pointer in the place of one."""
    if not files:
        raise WeightsError(
            f"{name} holds no weights (a file that ends in {', '.join(ENDINGS)}); complete it, or pass "
            "pretrained=False for random ones"
        )
    for path in files:
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise WeightsError(
                    f"{path} is a pointer of git-LFS, not the weights; run `git lfs pull` in {path.parent}, or "
                    "download the file itself"
                )


def unwrapped(files: Iterable[Path], name: str) -> dict[str, Tensor] | None:
    """Weights under the model's own names, where the files have them wrapped ("module.", "state_dict"); None if not.

    Names that are not of the model, such as an optimiser's, are left out, and counted in a warning.
    """
    weights: dict[str, Tensor] = {}
    changed = False
    for path in files:
        if path.suffix == ".safetensors" and not _wrapper(_stored_names(path)):
            continue
        stored = _read(path)
        inner = _unwrap(stored)
        weights |= inner
        changed |= inner.keys() != stored.keys()
    if changed and (others := len(_flat(stored)) - len(inner)):
        log.warning("%s: %d entries beside the weights are left out of %s", name, others, path.name)
    return weights if changed else None


def shapes_of(files: Iterable[Path]) -> dict[str, torch.Size]:
    """The shapes of all weights in files, by name."""
    return {name: value.shape for path in files for name, value in _unwrap(_read(path)).items()}


def _stored_names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def _read(path: Path) -> dict:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError) as error:
        if "weights_only" not in str(error):  # the file is damaged
            raise
        raise WeightsError(
            f"cannot load {path}: it holds a program (a pickle of other than tensors, or TorchScript), which is not "
            "run; give its tensors as safetensors"
        ) from error


def _unwrap(stored: Mapping) -> dict[str, Tensor]:
    """Out of dictionaries in dictionaries, then from behind common beginnings of names."""
    while outer := next((w for w in WRAPPERS if isinstance(stored.get(w), Mapping)), None):
        stored = stored[outer]
    weights = {str(name): value for name, value in stored.items() if isinstance(value, Tensor)}
    while wrapper := _wrapper(weights):
        weights = {n.removeprefix(wrapper): value for n, value in weights.items() if n.startswith(wrapper)}
    return weights


def _wrapper(names: Collection[str]) -> str:
    """The beginning, such as "module.", that more than half of the names have; "" for none."""
    starts = (f"{word}." for word in WRAPPERS)
    return next((start for start in starts if 2 * sum(n.startswith(start) for n in names) > len(names)), "")


def _flat(stored: Mapping) -> list[str]:
    """The names of all tensors of nested dictionaries."""
    parts = (_flat(value) if isinstance(value, Mapping) else [name] for name, value in stored.items())
    return [name for part in parts for name in part]


def misfit(name: str, kind: str, total: int, wrong: Iterable[str], theirs: Iterable[str]) -> str:
    """A message about weights that do not fit.

    kind: the model's class. total: of its weights. wrong: those of them that are missing or of another shape.
    theirs: names in the file that are none of the model's.
    """
    wrong, theirs = sorted(wrong), sorted(theirs)
    problems = []
    if wrong:
        problems.append(f"{len(wrong)} of its {total} are missing or of another shape ({_first(wrong)})")
    if theirs:
        problems.append(f"{len(theirs)} in the file are none of its own ({_first(theirs)})")
    origin = next((o for o, pattern in ORIGINS.items() if any(re.search(pattern, n) for n in theirs)), "")
    source = f"They look like those of {origin}. " if origin else ""
    advice = "Give the configuration that these weights were saved with."
    return f"the weights of {name} do not fit {kind}: {' and '.join(problems)}. {source}{advice}"


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def deeper(theirs: Iterable[str], names: Iterable[str]) -> list[str]:
    """Names of a file that continue the model's own blocks, so that the model was cut short: "layers.12.mlp.fc1"."""
    patterns = {re.sub(r"\d+", "#", name) for name in names if re.search(r"\d", name)}
    return [name for name in theirs if re.sub(r"\d+", "#", name) in patterns]


def warn_of_gelu(name: str, path: Path, activation: str, remedy: str) -> None:
    """Warn where a file or folder is named after weights that were trained with QuickGELU, and the model has another.

    The weights fit both, so that nothing else can tell.
    """
    named = " ".join(path.resolve().parts[-2:]).lower()
    if re.search(r"openai|quick-?_?gelu", named) and "quick" not in activation.lower():
        told = "%s: by its name it was trained with QuickGELU, as OpenAI's are, but this model has %s; %s"
        log.warning(told, name, activation, remedy)
