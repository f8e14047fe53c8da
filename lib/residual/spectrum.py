"""Moments that merge, and the PCA of units from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter (sum of outer products of deviations) of samples in R^k.

    Any leading axes `...` (units, layers, heads) are kept apart. Always double precision.
    """

    count: int
    mean: Float64[Tensor, "... k"]
    scatter: Float64[Tensor, "... k k"]

    @staticmethod
    def of(samples: Float[Tensor, "n ... k"]) -> Moments:
        """Moments of n samples, n >= 1."""
        if len(samples) == 0:
            raise ValueError("moments need at least one sample")
        samples = samples.double()
        mean = samples.mean(0)
        deviations = (samples - mean).movedim(0, -2)
        return Moments(len(samples), mean, deviations.mT @ deviations)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of samples together. Source: Chan, Golub & LeVeque (1979)."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"moments of shape {list(other.mean.shape)} do not merge into {list(self.mean.shape)}")
        count = self.count + other.count
        gap = other.mean - self.mean
        between = gap[..., :, None] * gap[..., None, :] * (self.count * other.count / count)
        return Moments(count, self.mean + gap * (other.count / count), self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Float64[Tensor, "... k k"]:
        """Unbiased covariance. Raises ValueError with fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {self.count}")
        return self.scatter / (self.count - 1)


@dataclass(frozen=True)
class PCA:
    """Principal components in rows, by falling eigenvalue; eigenvalues are variances (over n - 1).

    Each component's entry of largest magnitude is positive, so that signs are reproducible.
    """

    mean: Float[Tensor, "... d"]
    components: Float[Tensor, "... k d"]
    eigenvalues: Float[Tensor, "... k"]

    @property
    def explained_variance_ratio(self) -> Float[Tensor, "... k"]:
        """Share of each component in the variance; zero for a unit that does not vary."""
        total = self.eigenvalues.sum(-1, keepdim=True)
        return self.eigenvalues / total.where(total > 0, 1)


def pca(x: Float[Tensor, "n d"]) -> PCA:
    """PCA of samples by SVD in double precision; min(n, d) components, at least in single precision.

    Variance that the samples' own rounding can make counts as none.
    Raises ValueError with fewer than 2 samples, or with NaN or infinity.
    """
    x = torch.as_tensor(x)
    if x.ndim != 2 or len(x) < 2 or not x.is_floating_point():
        raise ValueError(f"pca takes floating-point samples [n d] with n >= 2, not {x.dtype} {list(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("pca: the samples hold NaN or infinity")
    samples, dtype = x.double(), torch.promote_types(x.dtype, torch.float32)
    mean = samples.mean(0)
    _, singular, components = torch.linalg.svd(samples - mean, full_matrices=False)
    rounding = torch.finfo(x.dtype).eps * float(samples.abs().max()) * math.sqrt(len(x))
    variances = singular.where(singular > rounding, 0).square() / (len(x) - 1)
    return PCA(mean.to(dtype), _fix_signs(components).to(dtype), variances.to(dtype))


def pca_from_moments(
    moments: Moments, frame: Float[Tensor, "... k d"] | None = None, constant: Tensor | None = None
) -> PCA:
    """PCA from moments alone, in double precision.

    frame, constant: the samples are c @ frame + constant and the moments are those of c.
    All leading axes at once: every head of an encoder in one call.
    """
    if frame is None:
        eigenvalues, vectors = torch.linalg.eigh(moments.covariance)
        return PCA(moments.mean, _fix_signs(vectors.mT.flip(-2)), eigenvalues.flip(-1).clamp(min=0))
    basis, factor = isometry(frame)
    eigenvalues, vectors = torch.linalg.eigh(factor @ moments.covariance @ factor.mT)
    mean = (moments.mean[..., None, :] @ frame.double())[..., 0, :]
    mean = mean if constant is None else mean + constant.double()
    components = vectors.mT.flip(-2) @ basis.mT
    return PCA(mean, _fix_signs(components), eigenvalues.flip(-1).clamp(min=0))


def isometry(frame: Float[Tensor, "... k d"]) -> tuple[Float64[Tensor, "... d r"], Float64[Tensor, "... r k"]]:
    """Q with orthonormal columns and R such that c @ frame = (c @ R.T) @ Q.T, r = min(k, d).

    Distances and inner products of c @ R.T, in R^r, equal those of the units in R^d.
    """
    return torch.linalg.qr(frame.double().mT)


def _fix_signs(components: Tensor) -> Tensor:
    largest = components.abs().argmax(-1, keepdim=True)
    signs = components.gather(-1, largest).sign()
    return components * signs.where(signs != 0, 1)
