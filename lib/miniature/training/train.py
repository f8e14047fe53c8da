"""Trains the embedded encoders: `python -m miniature train mini-openclip`.

A run can be stopped at any time and resumed by the same command. Every step draws
its batch from (seed, step), so a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

import contextlib
import csv
import math
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from tqdm import tqdm

from miniature.training.batches import Batches, Renderer
from miniature.training.objectives import Batch, build_objective
from miniature.training.recipes import RECIPES, Recipe, build_encoder
from miniature.training.recipes import save_encoder as save
from residual.files import replacing

WEIGHT_DECAY, WARM_UP = 0.1, 300


def train(
    name: str,
    out: Path,
    npm: Path,
    *,
    recipe: Recipe | None = None,
    device: str = "cpu",
    workers: int = 0,
    every: int = 100,
) -> None:
    """Train an embedded encoder and write it to the folder `out`, as its library reads it.

    npm: `node_modules` with OpenMoji's table of keywords, and the drawings in styles other than
    "twemoji". recipe: in place of the encoder's own. workers: processes that write captions and draw random numbers
    while the device computes. every: steps between checkpoints.
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
        self.optimizer = torch.optim.AdamW(groups)
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.log = out / "checkpoint.pt", out / "training.csv"
        self.first, seconds, self.loss_sum = 0, 0.0, torch.zeros((), dtype=torch.float64, device=device)
        if self.path.exists():
            state = torch.load(self.path, map_location=device, weights_only=True)
            if state["settings"] != repr(recipe):
                raise ValueError(f"{self.path} belongs to a run with other settings; delete it or give the same ones")
            self.objective.load_state_dict(state["objective"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.first, seconds = state["step"], state["seconds"]
        self.rows = _read_log(self.log, self.first)
        self.started = time.monotonic() - seconds

    def rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine."""
        return self.recipe.rate * min((step + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * step / self.recipe.steps)))

    def step(self, step: int, batch: Batch) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        # On a CPU, the backward pass of the fused attention kernel takes longer than all the rest at small heads.
        kernel = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext()
        with kernel:
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.objective(batch)
            self.optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.loss_sum += loss.detach()
        self.objective.after_step(step / self.recipe.steps)

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


def _read_log(path: Path, last: int) -> list[dict]:
    if not last:
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["step"]) <= last]
