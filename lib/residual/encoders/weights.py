"""Weights of a local folder: the file that is read, and refusals that name it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from residual.files import is_pointer, pointer_fault

ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
OWN = (  # what open_clip and transformers write, the preferred first
    "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin",
)  # fmt: skip
log = logging.getLogger(__name__)


class WeightsError(RuntimeError):
    """Weights are missing, or are not those of the model; says which, and what to do."""


def weight_files(folder: Path) -> list[Path]:
    """The shards that a folder's index names, or its file of weights under a library's name, or its only one.

    Other files of weights are named in a warning. Raises WeightsError where there is none, where several could be
    meant, where a shard is missing, and for files that git-LFS has not fetched.
    """
    for path in sorted(folder.iterdir()):
        if is_pointer(path):
            raise WeightsError(pointer_fault(path))
    every = sorted(path for path in folder.iterdir() if path.suffix in ENDINGS and path.is_file())
    own = next((folder / name for name in OWN if (folder / name).is_file()), None)
    if own is None and len(every) != 1:
        found = f"several files of weights, {', '.join(p.name for p in every)}" if every else "no weights"
        raise WeightsError(f"{folder} holds {found}; leave one beside the configuration, or pass pretrained=False")
    chosen = [own or every[0]]
    if chosen[0].suffix == ".json":
        if not (names := json.loads(own.read_text()).get("weight_map")):
            raise WeightsError(f"{own} has no weight_map, which names the file of each tensor; complete it")
        chosen = [folder / name for name in sorted(set(names.values()))]
        if missing := [path.name for path in chosen if not path.is_file()]:
            raise WeightsError(f"{folder} lacks {', '.join(missing[:5])}, which {own.name} names; complete it")
    if others := [path.name for path in every if path not in chosen]:
        log.warning("%s: weights come from %s; %s are ignored", folder, (own or chosen[0]).name, ", ".join(others))
    return chosen


def read_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """Tensors by name, also where a checkpoint of a training has them under "state_dict" or "model".

    Raises WeightsError for a file that holds no tensors, quantised ones, or some of another file, and UnpicklingError
    for one that holds a program.
    """
    weights: dict[str, Tensor] = {}
    for path in files:
        safe = path.suffix == ".safetensors"
        stored = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        stored = stored if isinstance(stored, dict) else {type(stored).__name__: None}
        inner = next((stored[key] for key in ("state_dict", "model") if isinstance(stored.get(key), dict)), stored)
        if not (tensors := {name: value for name, value in inner.items() if isinstance(value, Tensor)}):
            there = ", ".join(map(str, list(stored)[:5])) or "nothing"
            raise WeightsError(f"{path} holds no weights by name, but {there}; save the state_dict of the model alone")
        if all(name.startswith("module.") for name in tensors):  # of a training on several devices
            tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
        whole = [name for name, value in tensors.items() if name.endswith(".weight") and not value.is_floating_point()]
        if whole:
            raise WeightsError(f"{path} holds {whole[0]} as {tensors[whole[0]].dtype}; give weights in floating point")
        if again := sorted(weights.keys() & tensors):
            raise WeightsError(f"{path} holds {again[0]}, which another file holds too; give each weight once")
        weights |= tensors
    return weights


def check_names(model: nn.Module, name: str, wrong: Iterable[str], theirs: Iterable[str]) -> None:
    """Raises WeightsError where weights of a model are missing or misshapen, `wrong`, or others are there, `theirs`."""
    sides = (("missing in the file, or of another shape", sorted(wrong)), ("no part of the model", sorted(theirs)))
    if told := "; ".join(f"{len(names)} are {what} ({', '.join(names[:5])})" for what, names in sides if names):
        raise WeightsError(f"the weights of {name} do not fit {type(model).__name__}: {told}")


def check_values(model: nn.Module, name: str) -> None:
    """Raises WeightsError where weights hold NaN or infinity."""
    state = {key: value for key, value in model.state_dict().items() if value.numel()}
    if bad := [key for key, value in state.items() if not all(end.isfinite() for end in value.aminmax())]:
        raise WeightsError(f"the weights of {name} hold NaN or infinity: {', '.join(bad[:5])}")
