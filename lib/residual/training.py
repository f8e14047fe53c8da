"""Training: what is fitted on top of a frozen encoder, or the encoder itself, with early stopping and checkpoints.

The loop is ours because a step takes a millisecond or less, of which a trainer's bookkeeping would be most.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import io
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from tqdm.auto import tqdm

from residual.encoders import Encoder
from residual.extraction import pixel_batches, pixels_for
from residual.hub import EncodedImages
from residual.store import write_bytes
from residual.towers import read_tower

EPOCHS, PATIENCE, BATCH = 30, 5, 64
RATES = (1e-6, 1.0)  # between which the finder looks, in STEPS steps
STEPS, PROBE = 100, 128
WARMUP = 20
PAUSE = 20.0  # seconds between checkpoints, at least

Inputs = Tensor | EncodedImages  # of an aligner: outputs, coordinates or images
log = logging.getLogger(__name__)


class FineTuned(nn.Module):
    """A copy of an encoder, in single precision, whose vision tower and projection are trained; its text tower is not.

    Takes images of a Dataset. `.encoder` is the encoder that results.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.model = copy.deepcopy(encoder.model).float().requires_grad_(False)
        self.encoder = replace(encoder, model=self.model, tower=read_tower(self.model, encoder.name))
        own = self.encoder.tower
        for parameter in (*own.root.parameters(), *own.projection()):
            if isinstance(parameter, nn.Parameter):
                parameter.requires_grad_(True)

    def forward(self, images: Inputs) -> Float[Tensor, "n d"]:
        return self.encoder.encode_image(pixels_for(self.encoder, images))

    def batches(self, images: Inputs, parts: Sequence[Tensor], workers: int) -> Iterable[Tensor]:
        """Pixels of the given rows, one part after another, decoded by `workers` processes."""
        return pixel_batches(self.encoder, [images[rows] for rows in parts], workers)


@dataclass(frozen=True)
class Fit:
    """How a training went. rate: learning rate. accuracies: on the validation split, after each epoch."""

    rate: float
    accuracies: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        """The best, whose parameters were restored."""
        return max(self.accuracies)


def fit(
    aligner: nn.Module,
    train: tuple[Inputs, Int64[Tensor, "n"]],
    validation: tuple[Inputs, Int64[Tensor, "m"]],
    classes: Float[Tensor, "c d"],
    *,
    scale: float = 100.0,
    rate: float | None = None,
    seed: int = 0,
    checkpoint: Path | str | None = None,
    workers: int = 0,
    progress: bool = False,
) -> Fit:
    """Train an aligner by the cross-entropy of scaled cosines with frozen class encodings (section 4.2).

    train, validation: what the aligner takes (outputs, coordinates, images), and labels, on any device.
    scale: of the cosines, the encoder's own. rate: by default `find_rate` finds it.
    AdamW-ScheduleFree in batches of 64, at most 30 epochs; ends after 5 without a better
    accuracy on the validation split, and restores the best.
    checkpoint: a folder for what is written after an epoch, twenty seconds or more after the last time, and at the end,
    under a name of this training's own. A run that was stopped goes on from there; one that had ended is not repeated.
    workers: processes that decode the images of a fine-tuning.
    Raises ValueError for a single class, a class without a training image, labels out of range, and NaN.
    """
    _check_labels(train, validation, classes)
    train, validation = ((inputs, labels.long()) for inputs, labels in (train, validation))
    device = next(aligner.parameters()).device
    task = _Task(train, classes.to(device), scale, device, workers)
    place = None if checkpoint is None else Path(checkpoint) / f"{_key(aligner, task, validation, rate, seed)}.pt"
    state, written = _resume(place), time.monotonic()
    if state and "optimizer" not in state:
        _load(aligner, state["best"])
        return Fit(state["rate"], tuple(state["accuracies"]))
    rate = (
        state["rate"] if state else rate or find_rate(aligner, train, classes, scale=scale, seed=seed, workers=workers)
    )
    trained = [p for p in aligner.parameters() if p.requires_grad]
    optimizer = AdamWScheduleFree(trained, lr=rate, warmup_steps=WARMUP)
    generator = torch.Generator().manual_seed(seed)
    accuracies: list[float] = []
    best: dict[str, Tensor] = {}
    if state:
        _load(aligner, state["now"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        accuracies, best = state["accuracies"], state["best"]
    with tqdm(total=EPOCHS, initial=len(accuracies), unit="epoch", disable=not progress, leave=False) as bar:
        while len(accuracies) < EPOCHS and not _stalled(accuracies):
            optimizer.train()
            for loss in task.epoch(aligner, generator):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            optimizer.eval()
            accuracies.append(task.accuracy(aligner, *validation))
            if accuracies[-1] > max(accuracies[:-1], default=-1.0):
                best = _trainable(aligner)
            if place is not None and time.monotonic() - written >= PAUSE:
                _keep(place, {
                    "rate": rate, "accuracies": accuracies, "best": best, "now": _trainable(aligner),
                    "optimizer": optimizer.state_dict(), "generator": generator.get_state(),
                })  # fmt: skip
                written = time.monotonic()
            bar.update()
            bar.set_postfix(accuracy=max(accuracies))
    _load(aligner, best)
    if place is not None:
        _keep(place, {"rate": rate, "accuracies": accuracies, "best": best})
    return Fit(rate, tuple(accuracies))


@torch.no_grad()
def transformed(aligner: nn.Module, inputs: Inputs, *, batch: int = 256, workers: int = 0) -> Float[Tensor, "n d"]:
    """What an aligner makes of all inputs, batch by batch on its own device; the result is on the CPU."""
    device = next(aligner.parameters()).device
    parts = torch.arange(len(inputs)).split(batch)
    return torch.cat([aligner(own).cpu() for own in _batches(aligner, inputs, parts, device, workers)])


def find_rate(
    aligner: nn.Module,
    train: tuple[Inputs, Int64[Tensor, "n"]],
    classes: Float[Tensor, "c d"],
    *,
    scale: float = 100.0,
    seed: int = 0,
    workers: int = 0,
) -> float:
    """The learning rate at which the loss falls fastest, while the rate grows step by step.

    100 steps from 1e-6 to 1, after which the aligner is as it was; the search ends where the loss is four times
    the least. The loss is that of 128 images, always the same: with that of each step's batch, as Lightning has it,
    the noise of the batches at rates that change nothing is often the steepest fall. Source: Smith (2017).
    Raises ValueError where the loss is not finite.
    """
    before = _trainable(aligner)
    device = next(aligner.parameters()).device
    task = _Task(train, classes.to(device), scale, device, workers)
    optimizer = AdamWScheduleFree([p for p in aligner.parameters() if p.requires_grad], lr=RATES[0])
    optimizer.train()
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randperm(len(train[0]), generator=generator)[:PROBE]
    (probed,) = _batches(aligner, train[0], [probe], device, workers)
    rates = np.geomspace(*RATES, STEPS)
    losses: list[float] = []
    batches = (loss for _ in range(STEPS) for loss in task.epoch(aligner, generator))
    for rate, loss in zip(rates, batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            losses.append(task.loss(aligner(probed), probe).item())
        if not losses[-1] <= 4 * min(losses):
            break
    _load(aligner, before)
    if len(losses) < 3 or not np.isfinite(losses[:-1]).all():
        raise ValueError(f"the loss is not finite, or grows from the first steps on: {losses[:3]}; look at the inputs")
    return float(rates[int(np.gradient(losses[:-1]).argmin())])


@dataclass(frozen=True)
class _Task:
    train: tuple[Inputs, Tensor]
    classes: Tensor
    scale: float
    device: torch.device
    workers: int = 0

    def epoch(self, aligner: nn.Module, generator: torch.Generator) -> Iterator[Tensor]:
        """The loss of every batch of an epoch in random order."""
        parts = torch.randperm(len(self.train[0]), generator=generator).split(BATCH)
        for rows, own in zip(parts, _batches(aligner, self.train[0], parts, self.device, self.workers), strict=True):
            yield self.loss(aligner(own), rows)

    def loss(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """The loss of some training images, from what the aligner made of them."""
        labels = self.train[1]
        logits = self.scale * F.normalize(outputs, dim=1) @ self.classes.T
        return F.cross_entropy(logits, labels[rows.to(labels.device)].to(self.device))

    def accuracy(self, aligner: nn.Module, inputs: Inputs, labels: Tensor) -> float:
        outputs = transformed(aligner, inputs, batch=4 * BATCH, workers=self.workers)
        return int(((outputs @ self.classes.T.cpu()).argmax(1) == labels.cpu()).sum()) / len(inputs)


def _batches(
    aligner: nn.Module, inputs: Inputs, parts: Sequence[Tensor], device: torch.device, workers: int
) -> Iterable[Tensor]:
    if isinstance(aligner, FineTuned):
        return aligner.batches(inputs, parts, workers)
    return (_take(inputs, rows, device) for rows in parts)


def _take(inputs: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    own = inputs[rows.to(inputs.device)].to(device)
    return own.float() if own.is_floating_point() else own


def _check_labels(train: tuple[Inputs, Tensor], validation: tuple[Inputs, Tensor], classes: Tensor) -> None:
    count = len(classes)
    if not classes.isfinite().all():
        raise ValueError("class encodings hold NaN or infinity")
    if count < 2:
        raise ValueError(f"{count} class: there is nothing to tell apart; give the task at least two")
    for name, (inputs, labels) in (("training", train), ("validation", validation)):
        if len(inputs) != len(labels) or len(labels) == 0:
            raise ValueError(f"{len(inputs)} {name} images and {len(labels)} labels")
        if (
            isinstance(inputs, Tensor)
            and inputs.is_floating_point()
            and not all(part.isfinite().all() for part in inputs.split(1024))
        ):
            raise ValueError(f"{name} inputs hold NaN or infinity; look at the images they came from")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= count:
            raise ValueError(f"{name} labels run from {low} to {high}, but {count} classes ask for 0 to {count - 1}")
    if empty := sorted(set(range(count)) - set(train[1].tolist())):
        shown = f"{empty[:10]}{' ...' if len(empty) > 10 else ''}"
        raise ValueError(f"no training image of classes {shown}; take more images, or leave these classes out")


def _stalled(accuracies: list[float]) -> bool:
    return len(accuracies) > PATIENCE and max(accuracies[-PATIENCE:]) <= max(accuracies[:-PATIENCE])


def _trainable(aligner: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in aligner.named_parameters() if p.requires_grad}


@torch.no_grad()
def _load(aligner: nn.Module, state: dict[str, Tensor]) -> None:
    named = dict(aligner.named_parameters())
    for name, value in state.items():
        named[name].copy_(value)


def _key(aligner: nn.Module, task: _Task, validation: tuple[Inputs, Tensor], rate: float | None, seed: int) -> str:
    """Changes with all that a training depends on, its code included; of inputs, with a thousand rows of each split."""
    schedule = EPOCHS, PATIENCE, BATCH, WARMUP
    facts = _recipe(type(aligner)), task.scale, rate, seed, schedule, len(task.train[0]), len(validation[0])
    digest = hashlib.sha256(repr(facts).encode())
    tensors = []
    for inputs in (task.train[0], validation[0]):
        if isinstance(inputs, Tensor):
            tensors.append(inputs[:: max(1, len(inputs) // 1000)])
        else:
            digest.update(inputs.fingerprint().encode())
    tensors += [task.train[1], validation[1], task.classes, *_trainable(aligner).values(), *aligner.buffers()]
    if isinstance(aligner, FineTuned):
        digest.update(aligner.encoder.preprocessing_hash().encode())
    for value in tensors:
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@functools.cache
def _recipe(aligner: type[nn.Module]) -> tuple[str, ...]:
    return *map(inspect.getsource, (sys.modules[__name__], aligner)), *map(version, ("torch", "schedulefree"))


def _keep(path: Path, state: dict[str, object]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
    except OSError as error:
        log.warning("the training goes on, but is not kept: %s", error)


def _resume(path: Path | None) -> dict[str, object] | None:
    """What a stopped run of the same training left; None where there is nothing to go on from."""
    if path is None or not path.is_file():
        return None
    data = path.read_bytes()
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        log.warning("%s is damaged; training anew", path)
        return None
    return torch.load(io.BytesIO(data[32:]), map_location="cpu", weights_only=True)


def parameter_count(aligner: nn.Module) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in aligner.parameters() if p.requires_grad)
