"""The objectives of the embedded encoders: modules that hold the encoder and return a loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from open_clip.model import CLIP
from torch import Tensor, nn

from miniature.emoji import vocabulary
from miniature.training.recipes import OUTPUT, Recipe


@dataclass(frozen=True)
class Batch:
    """Scenes, and what an objective may know about them.

    images: for distillation, one view of every drawing and then the other. emoji: rows of `vocabulary()`.
    positives: [image, caption], whether the caption is true of the image.
    """

    images: Float[Tensor, "m 3 s s"]
    emoji: Int64[Tensor, "n"]
    tokens: Int64[Tensor, "n t"] | None = None
    attention: Int64[Tensor, "n t"] | None = None
    positives: Bool[Tensor, "n n"] | None = None


def contrastive_loss(
    image: Float[Tensor, "n d"], text: Float[Tensor, "n d"], scale: Tensor, positives: Bool[Tensor, "n n"]
) -> Tensor:
    """InfoNCE both ways, with the target mass spread evenly over all true pairs."""
    logits = scale * image @ text.T
    target = positives.float()
    by_image = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
    by_text = F.cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
    return (by_image + by_text) / 2


class Contrast(nn.Module):
    """CLIP's objective, with every true pair of the batch as a positive.

    identity: weight of a second target, the emoji, which a linear layer on the output names.
    """

    def __init__(self, encoder: nn.Module, identity: float) -> None:
        super().__init__()
        self.encoder, self.identity = encoder, identity
        if identity:
            self.classify = nn.Linear(OUTPUT, len(vocabulary()))
        if not isinstance(encoder, CLIP):  # BLIP's retrieval class has no temperature
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, batch: Batch) -> Tensor:
        if isinstance(self.encoder, CLIP):
            image, text, scale = self.encoder(batch.images, batch.tokens)
        else:
            seen = self.encoder.vision_model(batch.images).last_hidden_state[:, 0]
            read = self.encoder.text_encoder(batch.tokens, attention_mask=batch.attention).last_hidden_state[:, 0]
            image = F.normalize(self.encoder.vision_proj(seen).float(), dim=1)
            text, scale = F.normalize(self.encoder.text_proj(read).float(), dim=1), self.logit_scale.exp()
        with torch.autocast(image.device.type, enabled=False):
            loss = contrastive_loss(image.float(), text.float(), scale.float(), batch.positives)
            if self.identity:
                loss = loss + self.identity * self._naming_loss(image.float(), batch.emoji)
            return loss

    def _naming_loss(self, image: Float[Tensor, "n d"], emoji: Int64[Tensor, "n"]) -> Tensor:
        return F.cross_entropy(self.classify(math.sqrt(OUTPUT) * image), emoji, label_smoothing=0.1)

    def trained_encoder(self) -> nn.Module:
        return self.encoder

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        (self.encoder if isinstance(self.encoder, CLIP) else self).logit_scale.clamp_(0, math.log(100))


class Classification(nn.Module):
    """Names the emoji, by a linear layer on the class token that is discarded after training."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.classify = encoder, nn.Linear(width, len(vocabulary()))

    def forward(self, batch: Batch) -> Tensor:
        logits = self.classify(self.encoder(batch.images).last_hidden_state[:, 0])
        return F.cross_entropy(logits.float(), batch.emoji, label_smoothing=0.1)

    def trained_encoder(self) -> nn.Module:
        return self.encoder

    def after_step(self, progress: float) -> None:
        pass


@torch.no_grad()
def assignments(logits: Float[Tensor, "n k"], temperature: float = 0.04, rounds: int = 3) -> Float[Tensor, "n k"]:
    """Soft assignment of samples to prototypes, all prototypes used equally (Sinkhorn-Knopp): rows sum to 1."""
    scores = (logits.double() / temperature).log_softmax(1)
    for _ in range(rounds):
        scores = (scores - scores.logsumexp(0)).log_softmax(1)
    return scores.exp().to(logits.dtype)


def distillation_loss(
    student: Sequence[Float[Tensor, "n k"]], teacher: Sequence[Float[Tensor, "n k"]], temperature: float = 0.1
) -> Tensor:
    """DINO's: each view of the student predicts the teacher's assignment of the other view."""
    targets = assignments(torch.cat(teacher)).chunk(len(teacher))
    losses = [
        F.cross_entropy(view / temperature, target)
        for i, view in enumerate(student)
        for j, target in enumerate(targets)
        if i != j
    ]
    return torch.stack(losses).mean()


class Distillation(nn.Module):
    """DINO with DINOv2's centring: a student learns to agree with the moving average of itself.

    The two views of an image are two scenes of one drawing, placed on different backdrops,
    with colours disturbed. No names, groups or captions are read.
    """

    PROTOTYPES = 1024

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(nn.Linear(width, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 64))
        self.prototypes = nn.utils.parametrizations.weight_norm(nn.Linear(64, self.PROTOTYPES, bias=False))
        self.prototypes.parametrizations.weight.original0.data.fill_(1)
        self.prototypes.parametrizations.weight.original0.requires_grad_(False)
        self.teacher = copy.deepcopy(nn.ModuleList([encoder, self.head, self.prototypes])).requires_grad_(False)

    def forward(self, batch: Batch) -> Tensor:
        student = _prototype_logits(self.encoder, self.head, self.prototypes, batch.images)
        with torch.no_grad():
            teacher = _prototype_logits(*self.teacher, batch.images)
        return distillation_loss(student.chunk(2), teacher.chunk(2))

    def trained_encoder(self) -> nn.Module:
        """The teacher's."""
        return self.teacher[0]

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        momentum = 1 - (1 - 0.99) * (1 + math.cos(math.pi * progress)) / 2
        trained = nn.ModuleList([self.encoder, self.head, self.prototypes])
        torch._foreach_lerp_(list(self.teacher.parameters()), list(trained.parameters()), 1 - momentum)


def _prototype_logits(encoder: nn.Module, head: nn.Module, prototypes: nn.Module, images: Tensor) -> Tensor:
    features = head(encoder(images).last_hidden_state[:, 0]).float()
    with torch.autocast(images.device.type, enabled=False):
        return prototypes(F.normalize(features, dim=1))


def build_objective(recipe: Recipe, encoder: nn.Module) -> nn.Module:
    if recipe.objective == "contrastive":
        return Contrast(encoder, recipe.identity)
    if recipe.objective == "distillation":
        return Distillation(encoder, recipe.width)
    return Classification(encoder, recipe.width)
