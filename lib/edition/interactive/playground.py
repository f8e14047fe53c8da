"""The playground: one static page on which a reader scales heads and components, and sees what becomes of a task.

Only logits are needed, and they are linear: an image's score along a component, times the component's lambda, times the
component's inner product with a class. So a page holds scores [n k] and products [k c], and a browser does the rest.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from edition.interactive import write_page, write_script
from residual.alignment import Bases, ResiDual, reference_bases
from residual.data.dataset import Dataset
from residual.data.images import thumbnails
from residual.store import StoredUnits

SHOWN = 48  # images
LEADING = 3  # components of a head that have sliders
PIXELS = 48  # a side, of an image that is shown


@dataclass(frozen=True)
class Scene:
    """What a playground is about: an encoder on the test images of a task.

    bases: `all_components`. scores: of `component_scores` for them. outputs, labels: of the same images.
    """

    encoder: str
    task: str
    data: Dataset
    labels: Int64[Tensor, "n"]
    names: tuple[str, ...]
    bases: Bases
    scores: Float[Tensor, "n w"]
    outputs: Float[Tensor, "n d"]
    classes: Float[Tensor, "c d"]

    def head(self, count: int) -> Scene:
        """The same of the first images."""
        first = {name: getattr(self, name)[:count] for name in ("labels", "scores", "outputs")}
        return replace(self, data=self.data.head(min(count, len(self.data))), **first)

    def presets(self, trained: dict[str, ResiDual], chosen: list[tuple[int, int]]) -> dict[str, dict[str, Any]]:
        """Lambdas of every component, and what else is added, by the name of a button.

        means: of the units that are not scaled to zero. X0, rest: the embedding, and what no component holds.
        """
        index, ones = self.bases.unit_index, torch.ones(len(self.bases.components))
        heads = torch.tensor([unit.kind == "head" for unit in self.bases.units])
        few = torch.tensor([unit.kind == "head" and (unit.layer, unit.head) in chosen for unit in self.bases.units])
        whole = {"the encoder": ones, "all heads": heads[index].float()}
        whole[f"{len(chosen)} heads, by U"] = few[index].float()
        presets = {
            name: {"lambdas": lambdas, "means": True, "X0": name == "the encoder", "rest": name == "the encoder"}
            for name, lambdas in whole.items()
        }
        for name, adapter in trained.items():
            lambdas = _spread(adapter, self.bases)
            presets[name] = {"lambdas": lambdas, "means": False, "X0": adapter.bases.kind == "RD", "rest": False}
        return presets

    def logits(self, preset: dict[str, Any]) -> Float[Tensor, "n c"]:
        """What the page computes for a setting."""
        count, lambdas = len(self.bases.components), preset["lambdas"]
        output = (self.scores[:, :count].float() * lambdas) @ self.bases.components
        if preset["X0"]:
            output = output + self.scores[:, count:]
        if preset["means"]:
            on = torch.zeros(len(self.bases.units)).index_add_(0, self.bases.unit_index, lambdas.abs()) > 0
            output = output + on.float() @ self.bases.means
        return (self.outputs if preset["rest"] else output) @ self.classes.T

    def accuracy(self, preset: dict[str, Any]) -> float:
        return (self.logits(preset).argmax(1) == self.labels).double().mean().item()

    def payload(self, presets: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """All numbers of a page, as JSON takes them: matrices in base64, scores as 16-bit integers with a step each."""
        count = len(self.bases.components)
        own, embedding = self.scores[:, :count].float(), self.scores[:, count:].float()
        step = own.abs().amax(0).clamp(min=1e-12) / 32767
        products, means = self.bases.components @ self.classes.T, self.bases.means @ self.classes.T
        x0 = embedding @ self.classes.T
        rest = self.outputs @ self.classes.T - own @ products - means.sum(0) - x0
        return {
            "units": [[unit.kind, unit.layer, unit.head] for unit in self.bases.units],
            "sizes": torch.bincount(self.bases.unit_index).tolist(),
            "classes": list(self.names), "labels": self.labels.tolist(), "leading": LEADING,
            "scores": _packed((own / step).round().to(torch.int16)), "step": _packed(step),
            "products": _packed(products), "means": _packed(means), "x0": _packed(x0), "rest": _packed(rest),
            "presets": {name: preset | {"lambdas": _packed(preset["lambdas"])} for name, preset in presets.items()},
        }  # fmt: skip


def all_components(reference: StoredUnits) -> Bases:
    """Bases of heads and MLPs as for "RD", with the two components of each head that ResiDual leaves out."""
    heads, whole = (reference_bases(reference, kind) for kind in ("O", "RD"))
    mlps = whole.unit_index >= len(heads.units)
    parts = ((getattr(heads, name), getattr(whole, name)[mlps]) for name in ("components", "unit_index", "variances"))
    components, index, variances = (torch.cat(pair) for pair in parts)
    return replace(whole, components=components, unit_index=index, variances=variances)


def write_playground(folder: Path, scene: Scene, presets: dict[str, dict[str, Any]]) -> Path:
    """Write `folder/index.html`, and its numbers beside it; returns the page."""
    write_script(folder / "data.js", "window.played", scene.payload(presets))
    return write_page(
        folder, "playground.html.jinja",
        encoder=scene.encoder, task=scene.task, images=len(scene.labels), shown=min(SHOWN, len(scene.labels)),
        sprite=_sprite(scene.data), size=PIXELS,
    )  # fmt: skip


def _spread(adapter: ResiDual, bases: Bases) -> Float[Tensor, "k"]:
    """Its lambdas at the components of larger bases; zero where it has none. A unit's components are its first ones."""
    lambdas, starts = torch.zeros(len(bases.components)), torch.searchsorted(bases.unit_index, bases.unit_index)
    places = {unit: index for index, unit in enumerate(bases.units)}
    for index, unit in enumerate(adapter.bases.units):
        its = adapter.lambdas.detach()[adapter.bases.unit_index == index]
        start = int(starts[(bases.unit_index == places[unit]).nonzero()[0, 0]])
        lambdas[start : start + len(its)] = its
    return lambdas


def _packed(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()


def _sprite(data: Dataset) -> str:
    """The first images side by side, as an address that holds the picture."""
    images = thumbnails(data.images[:SHOWN])
    images = torch.nn.functional.interpolate(images.float(), PIXELS, mode="area").round().byte()
    picture = io.BytesIO()
    to_pil_image(make_grid(images, len(images), padding=0)).save(picture, "PNG")
    return "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
