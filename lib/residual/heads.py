"""Which of the factors that images were drawn from drives a head: shares of variance, and a null."""

from __future__ import annotations

import math

import pandas as pd
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from residual.embedded import Factor
from residual.store import StoredUnits

BINS = 8  # of equal count, for a factor that is a measure
PLACES = 4  # a side, for a position


def factor_levels(factors: dict[str, Factor], names: dict[str, tuple[str, ...]]) -> dict[str, Int64[Tensor, "n"]]:
    """Each image's level of every factor, as an index.

    names: factor -> the columns of `factors` that make it up: {"position": ("x", "y")}. Named values
    are levels as they are; measures are cut into bins of equal count; of two, every pair is a level.
    Raises KeyError for an unknown column.
    """
    levels = {}
    for name, columns in names.items():
        level = torch.zeros_like(factors[columns[0]].values, dtype=torch.long)
        for column in columns:
            factor, bins = factors[column], BINS if len(columns) == 1 else PLACES
            own = factor.values.long() if factor.names else _bins(factor.values, bins)
            level = level * (int(own.max()) + 1) + own
        levels[name] = level.unique(return_inverse=True)[1]
    return levels


def variance_shares(
    values: Float[Tensor, "n k"], levels: Int64[Tensor, "n"]
) -> tuple[Float64[Tensor, "k"], Float64[Tensor, "k"]]:
    """Share of each column's variance that lies between levels, and the columns' variances.

    The share is epsilon squared: the correlation ratio, less what as many random levels explain on
    average, so that it is about 0, and may be negative, where there is no effect. Zero for a column that does not vary.
    Source: Kelley (1935).
    """
    n, groups = len(values), int(levels.max()) + 1
    if len(levels) != n or n <= groups:
        raise ValueError(f"{n} values for {len(levels)} labels of {groups} levels")
    centred = values.double() - values.double().mean(0)
    one_hot = torch.nn.functional.one_hot(levels, groups).to(centred)
    sums = one_hot.T @ centred
    between = (sums.square() / one_hot.sum(0).clamp(min=1)[:, None]).sum(0)
    total = centred.square().sum(0)
    share = between / total.where(total > 0, 1)
    adjusted = (1 - (1 - share) * (n - 1) / (n - groups)) * (total > 0)
    return adjusted, total / (n - 1)


def head_factors(units: StoredUnits, levels: dict[str, Int64[Tensor, "n"]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How much of the variance of every component, and of every head, each factor explains.

    Returns components (layer, head, component, explained_variance_ratio, factor, share) and heads
    (layer, head, factor, share, null). A head's share is of its total variance. null: the largest share of
    a factor over 20 shuffles of its levels, among all heads.
    Raises StoreError if the extraction kept no coordinates.
    """
    spectra = units.head_pca()
    ratios, shape = spectra.explained_variance_ratio, spectra.eigenvalues.shape
    scores = torch.stack([units.head_scores(layer, head) for layer in range(shape[0]) for head in range(shape[1])], 1)
    flat = scores.flatten(1)
    components, heads = [], []
    for factor, own in levels.items():
        share = variance_shares(flat, own)[0].unflatten(0, shape)
        whole = (share * ratios).sum(-1)
        generator = torch.Generator().manual_seed(0)
        shuffled = [variance_shares(flat, own[torch.randperm(len(own), generator=generator)])[0] for _ in range(20)]
        null = max(float((one.unflatten(0, shape) * ratios).sum(-1).max()) for one in shuffled)
        for layer in range(shape[0]):
            for head in range(shape[1]):
                heads.append((layer, head, factor, float(whole[layer, head]), null))
                components += [
                    (layer, head, k, float(ratios[layer, head, k]), factor, float(share[layer, head, k]))
                    for k in range(shape[2])
                ]
    names = ["layer", "head", "component", "explained_variance_ratio", "factor", "share"]
    return (
        pd.DataFrame(components, columns=names),
        pd.DataFrame(heads, columns=["layer", "head", "factor", "share", "null"]),
    )


def specialisation(shares: pd.DataFrame) -> pd.DataFrame:
    """For each head the factor that drives it, and how far it is given to one factor alone.

    shares: as `head_factors` gives for heads. index: 1 less the entropy of the positive shares over
    that of equal ones: 0 where all factors explain alike, 1 where one explains all. driver: the factor with the
    largest share, or "none" where none is above its null; index is then missing.
    """
    rows = []
    for (layer, head), own in shares.groupby(["layer", "head"]):
        real = own["share"].where(own["share"] > own["null"], 0.0).to_numpy()
        if real.sum() <= 0:
            rows.append((layer, head, "none", 0.0, math.nan))
            continue
        parts = real / real.sum()
        entropy = -sum(p * math.log(p) for p in parts if p > 0)
        driver = own["factor"].iloc[int(real.argmax())]
        rows.append((layer, head, driver, float(real.max()), 1 - entropy / math.log(len(parts))))
    return pd.DataFrame(rows, columns=["layer", "head", "driver", "share", "index"])


def _bins(values: Tensor, bins: int) -> Tensor:
    return values.double().argsort().argsort() * bins // len(values)
