"""Moments that can be merged, the PCA of units from moments, and the similarity of two spectra."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

PLACES = 8  # units in the last place by which sums in single precision may differ from batch to batch
ROUNDING = torch.finfo(torch.float32).eps  # of a value, relative to it: a unit in the last place


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter (sum of outer products of deviations) of samples in R^k.

    Leading axes `...` (units, layers, heads) are separate. Always in double precision.
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

    @staticmethod
    def merge_all(parts: Iterable[dict[str, Moments]]) -> dict[str, Moments]:
        """Moments of all parts together, name by name; the parts are consumed one after another."""
        return functools.reduce(lambda a, b: {name: a[name].merge(b[name]) for name in a}, parts)

    def __getitem__(self, index: int) -> Moments:
        """The moments at an index of the first leading axis."""
        return Moments(self.count, self.mean[index], self.scatter[index])

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

    Variance that could come from rounding of the samples counts as none.
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
    All leading axes at once: every head of an encoder in one call. Variance along a component that rounding could make
    counts as none: of samples to single precision, of c by the sums behind it, and of the decomposition in double.
    """
    if frame is None:
        eigenvalues, vectors = torch.linalg.eigh(moments.covariance)
        axes, components, mean, places = vectors.mT, vectors.mT, moments.mean, 1
    else:
        basis, factor = isometry(frame)
        eigenvalues, vectors = torch.linalg.eigh(factor @ moments.covariance @ factor.mT)
        axes, components = vectors.mT @ factor, vectors.mT @ basis.mT
        mean, places = framed_mean(moments, frame, constant), PLACES
    squares = moments.mean.square() + moments.covariance.diagonal(dim1=-2, dim2=-1)
    rounding = (places * ROUNDING) ** 2 * (axes.square() @ squares[..., None])[..., 0]
    least = eigenvalues[..., -1:] * eigenvalues.shape[-1] * torch.finfo(torch.float64).eps
    varies = eigenvalues > rounding.maximum(least)
    return PCA(mean, _fix_signs(components.flip(-2)), eigenvalues.where(varies, 0).flip(-1))


def framed_mean(
    moments: Moments, frame: Float[Tensor, "... k d"], constant: Tensor | None = None
) -> Float64[Tensor, "... d"]:
    """The mean of c @ frame + constant, from the moments of c, in double precision."""
    mean = (moments.mean[..., None, :] @ frame.double())[..., 0, :]
    return mean if constant is None else mean + constant.double()


def uncentred_pca(
    moments: Moments, frame: Float[Tensor, "... k d"] | None = None, constant: Tensor | None = None
) -> PCA:
    """As `pca_from_moments`, but of the samples as they are: right singular vectors, and mean squares along them."""
    if constant is not None:
        pad = torch.nn.functional.pad
        moments = Moments(moments.count, pad(moments.mean, (0, 1), value=1.0), pad(moments.scatter, (0, 1, 0, 1)))
        frame = torch.cat([frame.double(), constant.double().expand(*frame.shape[:-2], 1, -1)], -2)
    mean = moments.mean
    squares = moments.scatter + moments.count * mean[..., :, None] * mean[..., None, :]
    return pca_from_moments(Moments(moments.count, torch.zeros_like(mean), squares), frame)


def isometry(frame: Float[Tensor, "... k d"]) -> tuple[Float64[Tensor, "... d r"], Float64[Tensor, "... r k"]]:
    """Q with orthonormal columns and R such that c @ frame = (c @ R.T) @ Q.T, r = min(k, d).

    Distances and inner products of c @ R.T, in R^r, equal those of the units in R^d.
    """
    return torch.linalg.qr(frame.double().mT)


def spectral_cosine(
    a: Tensor, b: Tensor, weights_a: Tensor | None = None, weights_b: Tensor | None = None, *, choose: str = "weighted"
) -> float:
    """Normalised spectral cosine similarity of two sets of directions, from 0 to 1.

    a, b: directions in rows, [k d] and [m d]; their lengths and signs do not matter. weights_a [k], weights_b [m]:
    not negative, 1 by default; the paper's figures use eigenvalues.
    choose: pairs are chosen one after another, by the "weighted" cosine, as in the figures, or by the "cosine" alone,
    as Eq. 3 reads. Of pairs that tie, the one with the smallest sum of indices goes first.
    Raises ValueError for zero rows, for weights that do not fit, are negative or all zero, for NaN and infinity.
    Source: Eq. 3 and 4.
    """
    (rows_a, weights_a), (rows_b, weights_b) = _directions("a", a, weights_a), _directions("b", b, weights_b)
    if rows_a.shape[1] != rows_b.shape[1]:
        raise ValueError(f"directions in R^{rows_a.shape[1]} and in R^{rows_b.shape[1]} cannot be compared")
    return float(_matched(rows_a @ rows_b.mT, weights_a, weights_b, choose))


def _directions(name: str, rows: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of length 1, and their weights; see `spectral_cosine`."""
    rows = torch.as_tensor(rows).double()
    weights = rows.new_ones(len(rows)) if weights is None else torch.as_tensor(weights).to(rows)
    if rows.ndim != 2 or weights.shape != rows.shape[:1]:
        raise ValueError(f"{name} must be [k d] with weights [k], not {list(rows.shape)} and {list(weights.shape)}")
    lengths = rows.norm(dim=1, keepdim=True)
    if not (lengths.isfinite().all() and lengths.gt(0).all()):
        raise ValueError(f"rows of {name} hold NaN, infinity, or only zeros")
    if not (weights.isfinite().all() and weights.ge(0).all() and weights.sum() > 0):
        raise ValueError(f"weights of {name} must be finite, not negative and not all zero, not {weights.tolist()}")
    return rows / lengths, weights


def pca_similarity(a: PCA, b: PCA, *, evr: float = 0.9, choose: str = "weighted") -> Float[Tensor, "..."]:
    """Spectral cosine similarity of units on two data sets, all leading axes at once (section 3.3).

    Bases are cut where they explain `evr` of the variance, and weighted with eigenvalues.
    Zero where a unit does not vary. Raises ValueError for an evr outside (0, 1] and as `spectral_cosine`.
    """
    if not 0 < evr <= 1:
        raise ValueError(f"evr must be in (0, 1], not {evr}")
    cosines = a.components @ b.components.mT.to(a.components)
    return _matched(cosines, _leading(a, evr), _leading(b, evr).to(cosines), choose)


def _leading(spectrum: PCA, evr: float) -> Tensor:
    """Eigenvalues of the components that explain `evr` of the variance, zero for the others."""
    ratio = spectrum.explained_variance_ratio
    return spectrum.eigenvalues.where(ratio.cumsum(-1) - ratio < evr - 1e-12, 0)


def _matched(cosines: Tensor, weights_a: Tensor, weights_b: Tensor, choose: str) -> Tensor:
    """Eq. 3 and 4 for cosines [... k m]; directions of weight zero are left out."""
    if choose not in ("weighted", "cosine"):
        raise ValueError(f"choose must be 'weighted' or 'cosine', not {choose!r}")
    k, m = cosines.shape[-2:]
    scale_a, scale_b = (w / w.amax(-1, keepdim=True).clamp(min=1e-300) for w in (weights_a, weights_b))
    products = scale_a[..., :, None] * scale_b[..., None, :]
    weighted = cosines.abs().clamp(max=1) * products
    scores = (weighted if choose == "weighted" else cosines.abs()).masked_fill(products == 0, -1).flatten(-2)
    # Pairs with the same sum of indices have no index in common, so their order does not matter, nor which set is a.
    order = (torch.arange(k)[:, None] + torch.arange(m)).flatten().to(cosines.device)
    rows, columns = (torch.arange(k * m, device=cosines.device) // m, torch.arange(k * m, device=cosines.device) % m)
    total = torch.zeros_like(scores[..., 0])
    for _ in range(min(k, m)):
        best = scores.amax(-1, keepdim=True)
        ties = scores >= best - 1e-12
        pair = torch.where(ties, order, k + m).argmin(-1, keepdim=True)
        total = total + (weighted.flatten(-2).gather(-1, pair)[..., 0] * (best[..., 0] >= 0)).square()
        row, column = pair // m, pair % m
        scores = scores.masked_fill((rows == row) | (columns == column), -1)
    most = min(k, m)
    sorted_a, sorted_b = (w.sort(-1, descending=True).values[..., :most] for w in (scale_a, scale_b))
    bound = (sorted_a * sorted_b).square().sum(-1)
    return (total / bound.where(bound > 0, 1)).sqrt().clamp(max=1)


def _fix_signs(components: Tensor) -> Tensor:
    largest = components.abs().argmax(-1, keepdim=True)
    signs = components.gather(-1, largest).sign()
    return components * signs.where(signs != 0, 1)
