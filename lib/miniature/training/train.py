"""Trains the embedded encoders: `python -m miniature train mini-openclip`.

A run can be stopped at any time and resumed by the same command. Every step draws
its batch from (seed, step), so a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from tqdm import tqdm

from miniature.training.batches import Batches, Renderer
from miniature.training.objectives import Batch, build_objective
from miniature.training.recipes import RECIPES, Recipe, build_encoder, image_tokens
from miniature.training.recipes import save_encoder as save
from residual.files import replacing

WEIGHT_DECAY, WARM_UP = 0.1, 300
log = logging.getLogger(__name__)


def train(
    name: str,
    out: Path,
    npm: Path,
    *,
    recipe: Recipe | None = None,
    device: str = "cpu",
    workers: int = 0,
    every: int = 100,
    keep: tuple[int, ...] = (),
) -> None:
    """Train an embedded encoder and write it to the folder `out`, as its library reads it.

    npm: `node_modules` with OpenMoji's table of keywords, and the drawings in styles other than
    "twemoji". recipe: in place of the encoder's own. workers: processes that write captions and draw random numbers
    while the device computes. every: steps between checkpoints. keep: steps after which the encoder as it is then is
    kept, in folders named "step-N".
    Raises ValueError if `out` holds a run with another recipe, FileNotFoundError without drawings.
    """
    recipe = recipe or RECIPES[name]
    batches = Batches(recipe, npm)
    run = _Run(name, recipe, len(batches.tokenizer), out, device)
    render = Renderer(batches.artwork, run.device)
    loader = DataLoader(batches, batch_size=None, sampler=range(run.first, recipe.steps), num_workers=workers)
    steps = tqdm(loader, initial=run.first, total=recipe.steps, desc=name, mininterval=5)
    for step, drawn in enumerate(steps, run.first):
        run.step(step, render(drawn))
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            steps.set_postfix(loss=run.checkpoint(step + 1))
        if step + 1 in keep:
            half = copy.deepcopy(run.objective.trained_encoder())  # saving halves the precision in place
            save(name, recipe, half, batches.tokenizer, out / f"step-{step + 1}")
    save(name, recipe, run.objective.trained_encoder(), batches.tokenizer, out)


class _Run:
    """A training: what is trained, and its log and checkpoint in the folder `out`."""

    def __init__(self, name: str, recipe: Recipe, words: int, out: Path, device: str) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device = recipe, torch.device(device)
        self.objective = build_objective(recipe, build_encoder(name, recipe, words)).to(device).train()
        self.trained = [p for p in self.objective.parameters() if p.requires_grad]
        matrices, others = ([p for p in self.trained if (p.ndim >= 2) is flag] for flag in (True, False))
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        on_gpu = self.device.type == "cuda"
        rate = torch.zeros((), device=device) if on_gpu else 0.0  # a recorded step reads its rate from memory
        self.optimizer = torch.optim.AdamW(groups, lr=rate, fused=on_gpu, capturable=on_gpu)
        self.recorded = _Recorded(self._update) if on_gpu else None
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.log = out / "checkpoint.pt", out / "training.csv"
        self.first, seconds, self.loss_sum = 0, 0.0, torch.zeros((), dtype=torch.float64, device=device)
        if self.path.exists():
            state = torch.load(self.path, map_location=device, weights_only=True)
            if state["settings"] != repr(recipe):
                raise ValueError(f"{self.path} belongs to a run with other settings; delete it or give the same ones")
            self.objective.load_state_dict(state["objective"])
            self.optimizer.load_state_dict(state["optimizer"])
            for group in self.optimizer.param_groups:  # the checkpoint may be of another device
                group |= {"lr": rate, "fused": on_gpu, "capturable": on_gpu}
            self.first, seconds = state["step"], state["seconds"]
        self.rows = _read_log(self.log, self.first)
        self.started = time.monotonic() - seconds

    def rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine."""
        return self.recipe.rate * min((step + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * step / self.recipe.steps)))

    def step(self, step: int, batch: Batch) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"].fill_(self.rate(step)) if self.recorded else self.rate(step)
        self.loss_sum += self.recorded(batch) if self.recorded else self._update(batch)
        self.objective.after_step(step / self.recipe.steps)

    def _update(self, batch: Batch) -> Tensor:
        # On a CPU, the backward pass of the fused attention kernel takes longer than all the rest at small heads.
        kernel = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext()
        with _seen(image_tokens(self.objective.encoder), batch.patches), kernel:
            with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=not self.recorded):
                loss = self.objective(batch)
            self.optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return loss.detach()

    def checkpoint(self, done: int) -> str:
        """Write the state after `done` steps, and a row of the log; returns the mean loss since the last one."""
        since = done - (int(self.rows[-1]["step"]) if self.rows else 0)
        row = {"step": done, "loss": f"{self.loss_sum.item() / since:.4f}", "rate": f"{self.rate(done - 1):.2e}"}
        seconds = time.monotonic() - self.started
        self.loss_sum.zero_()
        self.rows.append(row | {"seconds": f"{seconds:.0f}"})
        with replacing(self.log) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.rows[0].keys())
            writer.writeheader()
            writer.writerows(self.rows)
        state = {"objective": self.objective.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"step": done, "seconds": seconds, "settings": repr(self.recipe)}
        with replacing(self.path) as partial:
            torch.save(state, partial)
        return row["loss"]


class _Recorded:
    """A step that is recorded as a CUDA graph and replayed: launching its thousands of small kernels takes longer.

    The first steps with batches of new shapes run as they are, and all do where recording fails.
    """

    EAGER = 3

    def __init__(self, update: Callable[[Batch], Tensor]) -> None:
        self.update, self.stream = update, torch.cuda.Stream()
        self.left, self.shapes, self.graph = self.EAGER, None, None

    def __call__(self, batch: Batch) -> Tensor:
        values = {f.name: getattr(batch, f.name) for f in fields(batch) if getattr(batch, f.name) is not None}
        if (shapes := {name: value.shape for name, value in values.items()}) != self.shapes:
            self.left, self.shapes, self.graph = self.EAGER, shapes, None
        if self.left == 0 and self.graph is None:
            self._record(batch)
        if self.graph is None:
            self.left -= 1
            return self._eager(batch)
        for name, value in values.items():
            getattr(self.batch, name).copy_(value)
        self.graph.replay()
        return self.loss

    def _eager(self, batch: Batch) -> Tensor:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            loss = self.update(batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss

    def _record(self, batch: Batch) -> None:
        self.batch, graph = batch, torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.loss = self.update(batch)
            self.graph = graph
        except RuntimeError as error:
            log.warning("steps cannot be recorded, and run more slowly: %s", error)


@contextlib.contextmanager
def _seen(module: nn.Module, patches: Tensor | None) -> Iterator[None]:
    """In this context, the encoder sees the tokens at the given positions of each image; None for all."""

    def keep(_module: nn.Module, _inputs: tuple, tokens: Tensor) -> Tensor:
        return tokens.gather(1, patches[:, :, None].expand(-1, -1, tokens.shape[2]))

    handle = module.register_forward_hook(keep) if patches is not None else None
    try:
        yield
    finally:
        if handle:
            handle.remove()


def _read_log(path: Path, last: int) -> list[dict]:
    if not last:
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["step"]) <= last]
