"""Intrinsic dimension: linear (PCA) and nonlinear (TwoNN)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

FEWEST = 20  # distinct rows that TwoNN needs
TINY = torch.finfo(torch.float64).tiny
MEMBERS = 16  # columns in a group, among which neighbours are sought


def pca_dimension(eigenvalues: Float[Tensor, "k"], threshold: float = 0.99) -> int:
    """Number of components that explain a share `threshold` of the variance; 0 without variance.

    Raises ValueError for a threshold outside (0, 1], or for NaN. Source: section 3.1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], not {threshold}")
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
    if eigenvalues.ndim != 1 or not eigenvalues.isfinite().all():
        raise ValueError("eigenvalues must be one finite vector")
    cumulative = eigenvalues.clamp(min=0).sort(descending=True).values.cumsum(0)
    if len(cumulative) == 0 or cumulative[-1] == 0:
        return 0
    return int((cumulative < (threshold - 1e-12) * cumulative[-1]).sum()) + 1


@torch.no_grad()
def two_nn(
    x: Float[Tensor, "n d"], *, keep: float = 0.9, block: int = 256, precision: torch.dtype | None = None
) -> float:
    """Intrinsic dimension from the ratio of second to first neighbour distance.

    keep: fraction of the smallest ratios that is fitted, in (0, 1]. block: how many rows are compared with all others
    at a time; memory is O(n (d + block)). Runs on the device of x. Duplicates are dropped, also those that differ by
    the rounding of `precision` (see `duplicate_distance`), by default that of x, or single where that holds a double x.
    Raises ValueError with fewer than 20 distinct rows, or with NaN or infinity.
    Source: Facco et al. (2017), section "The estimator"; section 3.1 of the paper.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must lie in (0, 1], not {keep}")
    x = torch.as_tensor(x)
    if x.ndim != 2 or x.shape[1] == 0 or not x.is_floating_point():
        raise ValueError(f"two_nn takes floating-point samples [n d], not {x.dtype} {list(x.shape)}")
    largest = float(torch.linalg.vector_norm(x, torch.inf)) if len(x) else 0.0
    if not math.isfinite(largest):
        raise ValueError("two_nn: the samples hold NaN or infinity")
    if precision is None:
        single = x.dtype == torch.float64 and x.float().double().equal(x)
        precision = torch.float32 if single else x.dtype
    scaled = x.double() / (largest or 1.0)  # squares neither overflow nor vanish
    first, second = _distinct_distances(scaled, block, duplicate_distance(x.shape[1], precision))
    return _fitted_dimension((second / first).log().sort().values, keep)


def duplicate_distance(d: int, precision: torch.dtype) -> float:
    """The distance, over max |x|, up to which two rows of d values may be one row that was rounded differently.

    As in batches of two sizes, each value is off by up to two units in the last place of the largest of all.
    """
    return 2 * math.sqrt(d) * torch.finfo(precision).eps


def _distinct_distances(x: Tensor, block: int, apart: float) -> tuple[Tensor, Tensor]:
    """`_neighbour_distances` of the rows that are further than `apart` from all earlier ones."""
    rows = torch.unique(x, dim=0) if len(x) < FEWEST else x
    while len(rows) >= FEWEST:
        first, second, nearest = _neighbour_distances(rows, block, apart)
        close = first <= apart
        if not close.any():
            return first, second
        if (first == 0).any() and len(unique := torch.unique(rows, dim=0)) < len(rows):
            rows = unique
        else:  # of each two that are closest to each other, the later one goes
            rows = rows[~(close & (nearest < torch.arange(len(rows), device=x.device)))]
    raise ValueError(f"two_nn needs at least {FEWEST} distinct rows, not {len(rows)}")


def _fitted_dimension(ratios: Float[Tensor, "n"], keep: float) -> float:
    """The slope of -log(1 - F) over the sorted logarithms of the ratios, with F their empirical distribution."""
    n = len(ratios)
    fitted = min(max(int(n * keep), 1), n - 1)  # at the last ratio the empirical distribution is 1, its log infinite
    ratios = ratios[:fitted]
    survival = -torch.log1p(-torch.arange(1, fitted + 1, dtype=torch.float64, device=ratios.device) / n)
    if ratios[-1] < 1e-12:
        raise ValueError("two_nn: the two nearest neighbours of every point are equally far, as on a grid")
    return float((ratios @ survival) / (ratios @ ratios))


def subsampling_error(
    estimate: Callable[[Tensor], float],
    x: Float[Tensor, "n d"],
    *,
    share: float = 0.25,
    repeats: int = 8,
    seed: int = 0,
) -> float:
    """Standard error of `estimate(x)` from its spread over random subsets of `share * n` rows.

    The spread is scaled by sqrt(share), the rate of an estimator that averages over rows.
    Source: Politis & Romano (1994).
    """
    size = round(share * len(x))
    if not 1 <= size < len(x) or repeats < 2:
        raise ValueError(f"share {share} of {len(x)} rows, {repeats} times, leaves nothing to compare")
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randperm(len(x), generator=generator)[:size].to(x.device) for _ in range(repeats))
    spread = torch.tensor([estimate(x[rows]) for rows in draws], dtype=torch.float64).std()
    return float(spread) * math.sqrt(share)


def _neighbour_distances(x: Tensor, block: int, apart: float) -> tuple[Tensor, Tensor, Tensor]:
    """Distances to the first and second neighbour of every row, in double precision; and which is first.

    x: in double precision, with 1 as the largest value. Of a row that has a neighbour no further than `apart`, only
    that is certain.

    Neighbours are found by |b|^2 - 2ab in single precision, and their distances computed again from differences. Where
    these are so small that rounding may have chosen the wrong rows, neighbours are searched again in double precision,
    and at last by differences. A search in double precision alone takes 1.5 to 2.2 times as long.
    """
    centred = x - x.mean(0)
    reach = centred.square().sum(1).max()
    centred /= reach.sqrt().clamp(min=TINY)
    first, second = x.new_zeros(2, len(x))
    nearest = torch.zeros(len(x), dtype=torch.long, device=x.device)
    rows = torch.arange(len(x), device=x.device)
    for precision in (torch.float32, torch.float64, None):
        neighbours = _by_products(centred.to(precision), rows, block) if precision else _by_differences(x, rows, block)
        distances, order = (x[rows][:, None] - x[neighbours]).norm(dim=2).sort(1)
        first[rows], second[rows] = distances.T
        nearest[rows] = neighbours.gather(1, order[:, :1])[:, 0]
        # Rounding is a few eps of the largest norm: below this, a wrong choice could change a ratio by over 0.1 %.
        rounding = 2000 * 8 * torch.finfo(precision or x.dtype).eps * reach
        rows = ((first.square() < rounding) & (first > apart)).nonzero()[:, 0]
        if len(rows) == 0:
            break
    return first, second, nearest


def _by_products(x: Tensor, rows: Tensor, block: int) -> Tensor:
    """Indices [r 2] of the two rows of x nearest to each of the given rows.

    Columns are dealt into groups, and the two nearest are sought in the two groups whose least distances are smallest:
    the least of each group takes one pass, where finding a row's place twice takes longer than all the products.
    """
    groups = 16 * -(-len(x) // (16 * MEMBERS))  # whole vectors of a processor
    offsets = groups * torch.arange(MEMBERS, device=x.device)
    left = torch.cat([x[rows], x.new_ones(len(rows), 1)], 1)
    right = torch.cat([-2 * x, x.square().sum(1, keepdim=True)], 1).T.contiguous()
    buffer = x.new_full((min(block, len(rows)), MEMBERS * groups), torch.inf)  # one, or the allocator keeps many
    neighbours = []
    for part, factor in zip(rows.split(block), left.split(block), strict=True):
        distances = buffer[: len(part)]
        torch.mm(factor, right, out=distances[:, : len(x)])  # |b|^2 - 2ab, for rows a and all b
        distances.scatter_(1, part[:, None], torch.inf)
        least = distances.unflatten(1, (MEMBERS, groups)).amin(1)
        members = (least.topk(2, largest=False).indices[:, :, None] + offsets).flatten(1)
        nearest = distances.gather(1, members).topk(2, largest=False).indices
        neighbours.append(members.gather(1, nearest))
    return torch.cat(neighbours)


def _by_differences(x: Tensor, rows: Tensor, block: int) -> Tensor:
    """The same from differences, which are exact and slow."""
    neighbours = []
    for part in rows.split(block):
        distances = torch.cdist(x[part], x, compute_mode="donot_use_mm_for_euclid_dist")
        distances.scatter_(1, part[:, None], torch.inf)
        neighbours.append(distances.topk(2, largest=False).indices)
    return torch.cat(neighbours)
