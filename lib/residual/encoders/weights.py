"""Files of weights: which there are, whose they look like, and what training loops wrap around them."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from residual.files import is_pointer, pointer_fault

ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
NAMES = (  # that libraries give to a model's weights, the preferred first; shards have "-00001-of-00002" in theirs
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip
BESIDE = r"training_args|optimizer|scheduler|rng_state|scaler|adapter_"  # files of training, beside the weights
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "_orig_mod", "net")  # around or before the names
ORIGINS = {  # patterns of names, by what saves them
    "adapters (LoRA), which must be merged into the weights first": r"lora_[AB]\b",
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
}

log = logging.getLogger(__name__)


class WeightsError(RuntimeError):
    """Weights are missing, or are not those of the model; says which, and what to do."""


def weight_files(folder: Path, name: str) -> list[Path]:
    """The file of weights in a folder, or its shards: the one that libraries would take, or the only one.

    Raises WeightsError where there is none, where several could be meant, and for files that git-LFS has not fetched.
    """
    every = [path for path in sorted(folder.iterdir()) if path.suffix in ENDINGS and path.is_file()]
    sets: dict[str, list[Path]] = {}
    for path in every:
        if not re.match(BESIDE, path.name):
            sets.setdefault(re.sub(r"-\d+-of-\d+", "", path.name), []).append(path)
    chosen = next((own for own in NAMES if own in sets), next(iter(sets), ""))
    if chosen not in NAMES and len(sets) > 1:
        raise WeightsError(f"{name} holds several files of weights, {', '.join(sets)}; call the right one {NAMES[4]}")
    if others := [path.name for path in every if path not in sets.get(chosen, ())]:
        log.warning("%s: weights come from %s; left out are %s", name, chosen or "no file", ", ".join(others))
    check_files(sets.get(chosen, []), name)
    return sets[chosen]


def check_folder(folder: Path) -> None:
    """Raises WeightsError where git left a pointer in the place of a configuration or a tokenizer."""
    for path in sorted(folder.iterdir()):
        if path.suffix not in ENDINGS and is_pointer(path):
            raise WeightsError(pointer_fault(path))


def check_files(files: Collection[Path], name: str) -> None:
    """Raises WeightsError where there is none, or git left a pointer in the place of one."""
    if not files:
        raise WeightsError(
            f"{name} holds no weights (a file that ends in {', '.join(ENDINGS)}); complete it, or pass "
            "pretrained=False for random ones"
        )
    for path in files:
        if is_pointer(path):
            raise WeightsError(pointer_fault(path))


def read_weights(files: Iterable[Path], name: str) -> dict[str, Tensor]:
    """Weights under the model's own names, out of what a training loop wrapped around them ("module.", "state_dict").

    What is not of the model, such as an optimiser's state, is left out, and named in a warning. Raises WeightsError
    for files without weights.
    """
    weights: dict[str, Tensor] = {}
    for path in files:
        stored = _read(path)
        inner = _unwrap(stored, path)
        if others := len(_flat(stored)) - len(inner):
            kept = f" ({', '.join(map(str, list(stored)[:5]))})" if len(stored) < len(inner) else ""
            log.warning("%s: %d entries beside the weights are left out of %s%s", name, others, path.name, kept)
        weights |= inner
    return weights


def is_plain(path: Path) -> bool:
    """Whether a file of safetensors has the weights' own names, as far as wrappers are known."""
    if path.suffix != ".safetensors":
        return False
    with safe_open(path, "pt") as file:
        return not _wrapper(list(file.keys()))


def without_prefix(weights: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The beginning, as "backbone.", that most names share, and the weights without it; "" where they share none."""
    starts = Counter(name.partition(".")[0] for name in weights if "." in name)
    start, count = starts.most_common(1)[0] if starts else ("", 0)
    if 2 * count <= len(weights):
        return "", dict(weights)
    return f"{start}.", {name.removeprefix(f"{start}."): value for name, value in weights.items()}


def _read(path: Path) -> Mapping:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError) as error:
        if "weights_only" not in str(error):  # the file is damaged
            raise
        raise WeightsError(
            f"cannot load {path}: it holds a program (a pickle of other than tensors, or TorchScript), which is not "
            "run; give its tensors as safetensors"
        ) from error
    if not isinstance(stored, Mapping):
        raise WeightsError(f"{path} holds {type(stored).__name__}, not weights by name")
    return stored


def _unwrap(stored: Mapping, path: Path) -> dict[str, Tensor]:
    """Out of dictionaries in dictionaries, then from behind common beginnings of names."""
    first = stored
    while inner := _inner(stored):
        stored = inner
    weights = {str(name): value for name, value in stored.items() if isinstance(value, Tensor)}
    if not weights:
        raise WeightsError(f"{path} holds no weights under a name that is known; it holds {', '.join(map(str, first))}")
    while wrapper := _wrapper(weights):
        weights = {n.removeprefix(wrapper): value for n, value in weights.items() if n.startswith(wrapper)}
    return weights


def _inner(stored: Mapping) -> Mapping | None:
    """The dictionary in a dictionary that holds weights: one with a known name, or the only one with tensors."""
    known = next((stored[word] for word in WRAPPERS if isinstance(stored.get(word), Mapping)), None)
    if known is not None or any(isinstance(value, Tensor) for value in stored.values()):
        return known
    inside = [value for value in stored.values() if isinstance(value, Mapping) and _flat(value)]
    tensors = [value for value in inside if any(isinstance(part, Tensor) for part in value.values())]
    return tensors[0] if len(tensors) == 1 else None


def _wrapper(names: Collection[str]) -> str:
    """The beginning, such as "module.", that more than half of the names have; "" for none."""
    starts = (f"{word}." for word in WRAPPERS)
    return next((start for start in starts if 2 * sum(n.startswith(start) for n in names) > len(names)), "")


def _flat(stored: Mapping) -> list[str]:
    """The names of all entries of nested dictionaries."""
    parts = (_flat(value) if isinstance(value, Mapping) else [name] for name, value in stored.items())
    return [name for part in parts for name in part]


def check_values(model: nn.Module, name: str) -> None:
    """Raises WeightsError where weights hold NaN or infinity."""
    state = {key: value for key, value in model.state_dict().items() if value.numel()}
    if bad := [key for key, value in state.items() if not all(end.isfinite() for end in value.aminmax())]:
        raise WeightsError(f"the weights of {name} hold NaN or infinity: {_first(bad)}")


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


def warn_of_gelu(name: str, path: Path, activation: str, remedy: str) -> None:
    """Warn where a file or folder is named after weights that were trained with QuickGELU, and the model has another.

    The weights fit both, so that nothing else can tell.
    """
    parts = path.resolve().parts
    named = parts[-3] if parts[-2] == "snapshots" else parts[-1]  # in a hub's cache, a model's name is above
    if re.search(r"open_?ai|quick-?_?gelu|metaclip", named.lower()) and "quick" not in activation.lower():
        told = "%s: by its name it was trained with QuickGELU, as OpenAI's are, but this model has %s; %s"
        log.warning(told, name, activation, remedy)
