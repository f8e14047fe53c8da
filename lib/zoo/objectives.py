"""The objectives of the embedded encoders: modules that hold the encoder and return a loss."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from open_clip.model import CLIP
from torch import Tensor, nn

from zoo.recipes import WIDTH


@dataclass(frozen=True)
class Batch:
    """Scenes, and what an objective may know about them.

    again: other scenes of the same drawings. emoji: rows of `vocabulary()`.
    positives: [image, caption], whether the caption is true of the image.
    """

    images: Float[Tensor, "n 3 s s"]
    again: Float[Tensor, "n 3 s s"] | None
    emoji: Int64[Tensor, "n"]
    tokens: Int64[Tensor, "n t"] | None
    attention: Int64[Tensor, "n t"] | None
    positives: Bool[Tensor, "n n"] | None


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
    """CLIP's objective, with every true pair of the batch as a positive."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
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
            return contrastive_loss(image.float(), text.float(), scale.float(), batch.positives)

    def trained_encoder(self) -> nn.Module:
        return self.encoder

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        (self.encoder if isinstance(self.encoder, CLIP) else self).logit_scale.clamp_(0, math.log(100))


class Classification(nn.Module):
    """Names the emoji, by a linear layer on the class token that is discarded after training."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder, self.classify = encoder, nn.Linear(WIDTH, classes)

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
    student: list[Float[Tensor, "n k"]], teacher: list[Float[Tensor, "n k"]], temperature: float = 0.1
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

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(nn.Linear(WIDTH, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 64))
        self.prototypes = nn.utils.parametrizations.weight_norm(nn.Linear(64, self.PROTOTYPES, bias=False))
        self.prototypes.parametrizations.weight.original0.data.fill_(1)
        self.prototypes.parametrizations.weight.original0.requires_grad_(False)
        self.teacher = copy.deepcopy(nn.ModuleList([encoder, self.head, self.prototypes])).requires_grad_(False)

    def forward(self, batch: Batch) -> Tensor:
        views = [_disturb(batch.images), _disturb(batch.again)]
        student = [_prototype_logits(self.encoder, self.head, self.prototypes, view) for view in views]
        with torch.no_grad():
            teacher = [_prototype_logits(*self.teacher, view) for view in views]
        return distillation_loss(student, teacher)

    def trained_encoder(self) -> nn.Module:
        """The teacher's."""
        return self.teacher[0]

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        momentum = 1 - (1 - 0.99) * (1 + math.cos(math.pi * progress)) / 2
        trained = nn.ModuleList([self.encoder, self.head, self.prototypes])
        for mine, theirs in zip(trained.parameters(), self.teacher.parameters(), strict=True):
            theirs.lerp_(mine, 1 - momentum)


def _prototype_logits(encoder: nn.Module, head: nn.Module, prototypes: nn.Module, view: Tensor) -> Tensor:
    features = head(encoder(view).last_hidden_state[:, 0]).float()
    with torch.autocast(view.device.type, enabled=False):
        return prototypes(F.normalize(features, dim=1))


def _disturb(images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n 3 s s"]:
    """Contrast, brightness and balance of colours at random; one image in eight in grey."""
    n, like = len(images), {"device": images.device}
    gain = 1 + 0.3 * (2 * torch.rand(n, 3, 1, 1, **like) - 1)
    shift = 0.2 * (2 * torch.rand(n, 1, 1, 1, **like) - 1)
    grey = torch.rand(n, 1, 1, 1, **like) < 0.125
    return torch.where(grey, images.mean(1, keepdim=True), images) * gain + shift
