"""Trains an aligner on a frozen encoder, or the encoder itself, with early stopping.

The loop is ours because a step takes a millisecond or less, most of which a trainer would spend on bookkeeping.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm.auto import tqdm

from residual.data.images import EncodedImages
from residual.encoders.encoder import Encoder
from residual.extraction import pixel_batches, pixels_for
from residual.tensors import DamagedFileError, cache_key, read_tensors, write_tensors

EPOCHS, PATIENCE = 30, 5
BATCH = 64  # images, of a step
RATES, STEPS = (1e-6, 1.0), 50  # the range of the learning rate finder, and in how many steps it is tried
SMALLEST = 1e-3  # a loss; how far it falls below does not count

Inputs = Tensor | EncodedImages  # of an aligner: outputs, component scores or images
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """How steps are taken.

    warmup: steps. clip: the largest norm of a gradient; None for any. cosine: by AdamW, at a rate that falls to zero
    along a cosine over all epochs, none of which is left out, in place of AdamW-ScheduleFree.
    """

    batch: int = BATCH
    warmup: int = 20
    clip: float | None = None
    cosine: bool = False


class FineTuned(nn.Module):
    """A copy of an encoder, in single precision, whose vision tower and projection are trained; its text tower is not.

    Takes images of a Dataset. `.encoder` is the encoder that results.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder.with_model(copy.deepcopy(encoder.model).float().requires_grad_(False))
        self.model = self.encoder.model
        tower = self.encoder.tower
        for parameter in (*tower.root.parameters(), *tower.projection()):
            if isinstance(parameter, nn.Parameter):
                parameter.requires_grad_(True)

    def forward(self, images: Inputs) -> Float[Tensor, "n d"]:
        return self.encoder.encode_image(pixels_for(self.encoder, images))

    def batches(self, images: Inputs, parts: Sequence[Tensor], workers: int) -> Iterable[Tensor]:
        """Pixels of the given rows, one part after another, decoded by `workers` processes."""
        return pixel_batches(self.encoder, [images[rows] for rows in parts], workers)

    def fingerprint(self) -> str:
        """Changes with the preprocessing; weights are part of a training's key already."""
        return self.encoder.preprocessing_hash()


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
    scale: float | None = 100.0,
    rate: float | Sequence[float] | None = None,
    schedule: Schedule = Schedule(),
    seed: int = 0,
    cache: Path | str | None = None,
    workers: int = 0,
    progress: bool = False,
) -> Fit:
    """Train an aligner by the cross-entropy of scaled cosines with frozen class encodings (section 4.2).

    train, validation: what the aligner takes (outputs, component scores, images), and labels, on any device.
    scale: of the cosines, the encoder's logit scale; None takes inner products of outputs that are not normalised, as
    the authors' code did at first. rate: found by `find_rate` by default; of several, each is tried, and the one with
    the best accuracy on the validation split is kept, the first of equals.
    By default AdamW-ScheduleFree in batches of 64, at most 30 epochs: training stops after 5 epochs without a better
    accuracy on the validation split, and restores the best.
    cache: a folder where finished trainings are kept, in files named after all that they depend on, and not repeated.
    workers: processes that decode the images of a fine-tuning.
    Raises ValueError for a single class, a class without a training image, labels out of range, and NaN.
    """
    _check_labels(train, validation, classes)
    task = _Task.of(aligner, train, classes, scale, workers, schedule)
    key = None if cache is None else _key(aligner, task, validation, rate, seed)
    path = key and Path(cache) / f"{key}.safetensors"
    if path and (finished := _read(path)):
        best, result = finished
    else:
        rate = rate or find_rate(aligner, train, classes, scale=scale, seed=seed)
        rates, before = rate if isinstance(rate, Sequence) else [rate], _trainable(aligner)
        tried = []
        for each in rates:
            _load(aligner, before)
            tried.append(_trained(aligner, task, validation, each, seed, progress))
        best, result = max(tried, key=lambda one: one[1].accuracy)
        if path:
            _write(path, best, result)
    _load(aligner, best)
    return result


def _trained(
    aligner: nn.Module, task: _Task, validation: tuple[Inputs, Tensor], rate: float, seed: int, progress: bool
) -> tuple[dict[str, Tensor], Fit]:
    """The best parameters, and how the training went."""
    trained, free = [p for p in aligner.parameters() if p.requires_grad], not task.schedule.cosine
    warmup = task.schedule.warmup
    optimizer = AdamWScheduleFree(trained, lr=rate, warmup_steps=warmup) if free else AdamW(trained, lr=rate)
    falling = None if free else CosineAnnealingLR(optimizer, EPOCHS)
    generator = torch.Generator().manual_seed(seed)
    accuracies: list[float] = []
    best: dict[str, Tensor] = {}
    with tqdm(total=EPOCHS, unit="epoch", disable=not progress, leave=False) as bar:
        while len(accuracies) < EPOCHS and not (free and _stale(accuracies)):
            if free:
                optimizer.train()
            for loss in task.epoch(aligner, generator):
                task.step(optimizer, loss)
            optimizer.eval() if free else falling.step()
            accuracies.append(task.accuracy(aligner, *validation))
            if accuracies[-1] > max(accuracies[:-1], default=-1.0):
                best = _trainable(aligner)
            bar.update()
            bar.set_postfix(accuracy=max(accuracies))
    return best, Fit(rate, tuple(accuracies))


def _stale(accuracies: list[float]) -> bool:
    past, last = accuracies[:-PATIENCE], accuracies[-PATIENCE:]
    return bool(past) and max(last) <= max(past)


@torch.no_grad()
def transformed(aligner: nn.Module, inputs: Inputs, *, batch: int = 256, workers: int = 0) -> Float[Tensor, "n d"]:
    """The aligner's outputs for all inputs, batch by batch on its own device; the result is on the CPU."""
    device = next(aligner.parameters()).device
    parts = torch.arange(len(inputs)).split(batch)
    return torch.cat([aligner(part).cpu() for part in _batches(aligner, inputs, parts, device, workers)])


def parameter_count(aligner: nn.Module) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in aligner.parameters() if p.requires_grad)


def find_rate(
    aligner: nn.Module,
    train: tuple[Inputs, Int64[Tensor, "n"]],
    classes: Float[Tensor, "c d"],
    *,
    scale: float | None = 100.0,
    seed: int = 0,
) -> float:
    """The learning rate at which the lowest loss so far falls by the largest share, while the rate grows step by step.

    `STEPS` steps over `RATES`, after which the aligner is as it was; the search ends where the loss is four times
    the lowest. Source: Smith (2017), with two changes. The loss is always that of the same batch, not of each step's,
    whose noise at rates too small to matter is often the steepest fall. Only falls to a new lowest loss count: where a
    rate too large has driven the loss up, its way back is often steeper.
    Where no step lowers the loss, the smallest rate, with a warning unless the loss is below `SMALLEST` already.
    Raises ValueError where the loss is not finite.
    """
    before, task = _trainable(aligner), _Task.of(aligner, train, classes, scale)
    rates, losses = _range_test(aligner, task, torch.Generator().manual_seed(seed))
    _load(aligner, before)
    if len(losses) < 3 or not np.isfinite(losses[:-1]).all():
        raise ValueError(f"the loss is not finite, or grows from the first steps on: {losses[:3]}; check the inputs")
    lowest = np.minimum.accumulate(losses[:-1]).clip(min=SMALLEST)
    if lowest[-1] == lowest[0] > SMALLEST:
        log.warning("no learning rate lowers the loss, %.3g at first; training at %g", losses[0], RATES[0])
    return float(rates[int(np.gradient(np.log(lowest)).argmin())])


def _range_test(aligner: nn.Module, task: _Task, generator: torch.Generator) -> tuple[np.ndarray, list[float]]:
    """Rates that grow step by step, and the loss of the same images after each step."""
    optimizer = AdamWScheduleFree([p for p in aligner.parameters() if p.requires_grad], lr=RATES[0])
    optimizer.train()
    probe = torch.randperm(len(task.labels), generator=generator)[:BATCH]
    (probed,) = _batches(aligner, task.inputs, [probe], task.device, task.workers)
    rates, losses = np.geomspace(*RATES, STEPS), []
    batch_losses = (loss for _ in range(STEPS) for loss in task.epoch(aligner, generator))
    for rate, loss in zip(rates, batch_losses, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        task.step(optimizer, loss)
        with torch.no_grad():
            losses.append(task.loss(aligner(probed), probe).item())
        if not losses[-1] <= 4 * min(losses):
            break
    return rates, losses


@dataclass(frozen=True)
class _Task:
    """Training inputs, labels and the loss."""

    inputs: Inputs
    labels: Int64[Tensor, "n"]
    classes: Float[Tensor, "c d"]
    scale: float | None
    device: torch.device
    workers: int = 0
    schedule: Schedule = Schedule()

    @staticmethod
    def of(aligner: nn.Module, train: tuple[Inputs, Tensor], classes: Tensor, scale: float | None, *more: Any) -> _Task:
        """more: the last fields, if not by default."""
        device = next(aligner.parameters()).device
        return _Task(train[0], train[1].long(), classes.to(device), scale, device, *more)

    def epoch(self, aligner: nn.Module, generator: torch.Generator) -> Iterator[Tensor]:
        """The loss of every batch of an epoch in random order."""
        parts = torch.randperm(len(self.labels), generator=generator).split(self.schedule.batch)
        batches = _batches(aligner, self.inputs, parts, self.device, self.workers)
        for rows, batch in zip(parts, batches, strict=True):
            yield self.loss(aligner(batch), rows)

    def loss(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """The loss of some training images, from the aligner's outputs."""
        signals = outputs if self.scale is None else self.scale * F.normalize(outputs, dim=1)
        logits = signals @ self.classes.T
        return F.cross_entropy(logits, self.labels[rows.to(self.labels.device)].to(self.device))

    def step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        if self.schedule.clip:
            nn.utils.clip_grad_norm_(
                [p for group in optimizer.param_groups for p in group["params"]], self.schedule.clip
            )
        optimizer.step()

    def accuracy(self, aligner: nn.Module, inputs: Inputs, labels: Tensor) -> float:
        outputs = transformed(aligner, inputs, batch=4 * BATCH, workers=self.workers)
        return int(((outputs @ self.classes.T.cpu()).argmax(1) == labels.cpu()).sum()) / len(inputs)


def _batches(
    aligner: nn.Module, inputs: Inputs, parts: Sequence[Tensor], device: torch.device, workers: int
) -> Iterable[Tensor]:
    """Inputs of the given rows, part by part, as the aligner takes them: tensors, unless it makes its own batches."""
    if hasattr(aligner, "batches"):
        return aligner.batches(inputs, parts, workers)
    taken = (inputs[rows.to(inputs.device)].to(device) for rows in parts)
    return (part.float() if part.is_floating_point() else part for part in taken)


def _check_labels(train: tuple[Inputs, Tensor], validation: tuple[Inputs, Tensor], classes: Tensor) -> None:
    count = len(classes)
    if not classes.isfinite().all():
        raise ValueError("class encodings hold NaN or infinity")
    if count < 2:
        raise ValueError(f"{count} class; classification needs at least two")
    for name, (inputs, labels) in (("training", train), ("validation", validation)):
        if len(inputs) != len(labels) or len(labels) == 0:
            raise ValueError(f"{len(inputs)} {name} images and {len(labels)} labels")
        real = isinstance(inputs, Tensor) and inputs.is_floating_point()
        if real and not all(part.isfinite().all() for part in inputs.split(1024)):
            raise ValueError(f"{name} inputs hold NaN or infinity; check the images that they came from")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= count:
            raise ValueError(f"{name} labels run from {low} to {high}, but {count} classes need 0 to {count - 1}")
    if empty := sorted(set(range(count)) - set(train[1].tolist())):
        shown = f"{empty[:10]}{' ...' if len(empty) > 10 else ''}"
        raise ValueError(f"no training image of classes {shown}; take more images, or leave these classes out")


def _trainable(aligner: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in aligner.named_parameters() if p.requires_grad}


@torch.no_grad()
def _load(aligner: nn.Module, state: dict[str, Tensor]) -> None:
    named = dict(aligner.named_parameters())
    for name, value in state.items():
        named[name].copy_(value)


def _key(
    aligner: nn.Module, task: _Task, validation: tuple[Inputs, Tensor], rate: float | None, seed: int
) -> str | None:
    """Changes with all that a training depends on: its code, libraries, options, and every value of its inputs.

    None, with a warning, for an aligner whose code is in no file, such as a notebook's.
    """
    try:
        facts = [Path(__file__).read_text(), inspect.getsource(type(aligner)), *map(version, ("torch", "schedulefree"))]
    except (OSError, TypeError):
        log.warning("a training of %s is not kept, as its code is in no file", type(aligner).__name__)
        return None
    facts += [task.scale, rate, seed, task.schedule, EPOCHS, PATIENCE]
    for inputs in (task.inputs, validation[0]):
        facts.append(inputs if isinstance(inputs, Tensor) else inputs.fingerprint())
    if hasattr(aligner, "fingerprint"):
        facts.append(aligner.fingerprint())
    tensors = task.labels, validation[1].long(), task.classes, *_trainable(aligner).values(), *aligner.buffers()
    return cache_key(*facts, *tensors)


def _write(path: Path, best: dict[str, Tensor], result: Fit) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.cpu().contiguous() for name, value in best.items()}
        write_tensors(path, tensors, {"fit": json.dumps([result.rate, result.accuracies])})
    except OSError as error:
        log.warning("a training cannot be kept, and will be repeated: %s", error)


def _read(path: Path) -> tuple[dict[str, Tensor], Fit] | None:
    """A finished training; None, with a warning, where the file is damaged, and None where there is none."""
    try:
        best, about = read_tensors(path)
        rate, accuracies = json.loads(about["fit"])
        return best, Fit(rate, tuple(accuracies))
    except FileNotFoundError:
        return None
    except (DamagedFileError, KeyError, ValueError) as error:
        log.warning("%s is damaged (%s); training again", path, error)
        return None
