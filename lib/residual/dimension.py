"""Intrinsic dimension: linear (PCA) and nonlinear (TwoNN)."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from residual import spectrum, store
from residual.store import StoredUnits, write_bytes

FEWEST = 20  # distinct rows that TwoNN needs
log = logging.getLogger(__name__)


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
def two_nn(x: Float[Tensor, "n d"], *, keep: float = 0.9, block: int = 256) -> float:
    """Intrinsic dimension from the ratio of second to first neighbour distance.

    keep: fraction of the smallest ratios that is fitted, in (0, 1]. block: rows compared with
    all others at a time; memory is O(n * block). Runs on the device of x.
    Raises ValueError with fewer than 20 distinct rows, or with NaN. Duplicates are dropped.
    Source: Facco et al. (2017), section "The estimator"; section 3.1 of the paper.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must lie in (0, 1], not {keep}")
    x = torch.as_tensor(x)
    if x.ndim != 2 or x.shape[1] == 0 or not x.is_floating_point():
        raise ValueError(f"two_nn takes floating-point samples [n d], not {x.dtype} {list(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("two_nn: the samples hold NaN or infinity")
    first, second = _neighbour_distances(x, block) if len(x) >= FEWEST else (x.new_zeros(1), None)
    if (first == 0).any():
        x = torch.unique(x, dim=0)
        if len(x) < FEWEST:
            raise ValueError(f"two_nn needs at least {FEWEST} distinct rows, not {len(x)}")
        first, second = _neighbour_distances(x, block)
    ratios = (second / first).log().sort().values
    n = len(ratios)
    fitted = min(max(int(n * keep), 1), n - 1)  # at the last ratio the empirical distribution is 1, its log infinite
    ratios = ratios[:fitted]
    survival = -torch.log1p(-torch.arange(1, fitted + 1, dtype=torch.float64, device=x.device) / n)
    if ratios[-1] < 1e-12:
        raise ValueError("two_nn: every point has its two nearest neighbours at one distance, as on a grid")
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


def _neighbour_distances(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Distances to the first and second neighbour of every row, in double precision, up to one scale.

    Neighbours are found in single precision by |b|^2 - 2ab and their distances computed anew from
    differences. Rows whose neighbours are too close to be told apart like this are searched again in
    double precision, and those that are closer still by differences.
    """
    x = x.double()
    x = x / x.abs().max().clamp(min=torch.finfo(torch.float64).tiny)  # squares neither overflow nor vanish
    centred = x - x.mean(0)
    reach = centred.square().sum(1).max()
    centred = centred / reach.sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    everything = torch.arange(len(x), device=x.device)
    first, second = _exact(x, everything, _two_nearest(centred.float(), everything, block))
    searches = ((torch.float32, lambda rows: _two_nearest(centred, rows, block)),
                (torch.float64, lambda rows: _two_nearest_by_difference(x, rows, block)))  # fmt: skip
    for precision, search in searches:
        # A search errs by a few eps of the largest norm: below, a wrong pick could change a ratio by over 0.1 %.
        close = (first.square() < 2000 * 8 * torch.finfo(precision).eps * reach).nonzero()[:, 0]
        if len(close):
            first[close], second[close] = _exact(x, close, search(close))
    return first, second


def _two_nearest(x: Tensor, rows: Tensor, block: int) -> Tensor:
    """Indices [r 2] of the two rows of x nearest to each of the given rows, other than itself."""
    norms = x.square().sum(1)
    buffer = x.new_empty(min(block, len(rows)), len(x))  # one for all blocks, or the allocator keeps many
    found = []
    for part in rows.split(block):
        distances = torch.addmm(norms, x[part], x.T, alpha=-2, out=buffer[: len(part)])  # up to the part's own norm
        distances.scatter_(1, part[:, None], torch.inf)
        first = distances.argmin(1, keepdim=True)
        distances.scatter_(1, first, torch.inf)
        found.append(torch.cat([first, distances.argmin(1, keepdim=True)], 1))
    return torch.cat(found)


def _two_nearest_by_difference(x: Tensor, rows: Tensor, block: int) -> Tensor:
    found = []
    for part in rows.split(block):
        distances = torch.cdist(x[part], x, compute_mode="donot_use_mm_for_euclid_dist")
        distances.scatter_(1, part[:, None], torch.inf)
        found.append(distances.topk(2, largest=False).indices)
    return torch.cat(found)


def _exact(x: Tensor, rows: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
    distances = (x[rows][:, None] - x[neighbours]).norm(dim=2).sort(1).values
    return distances[:, 0], distances[:, 1]


def head_dimensions(
    units: StoredUnits, *, seed: int = 0, device: str | torch.device = "cpu", progress: bool = True
) -> pd.DataFrame:
    """L, N, their ratio and EVR1 of every head, in rows by layer and head (section 3.1).

    `twonn_id_error` is N's standard error from random quarters of the images. device: on which neighbours are found.
    Layers that are done are kept beside the units, and not computed again.
    Raises StoreError if the extraction kept no coordinates.
    """
    spectra = units.head_pca()
    evr = spectra.explained_variance_ratio
    kept = units.folder / f"dimensions-{seed}-{_recipe(units.manifest.sealed().seal)}.json"
    rows = _kept_rows(kept)
    heads = list(itertools.product(range(units.manifest.layers), range(units.manifest.heads)))
    label = f"dimension of the heads of {units.manifest.encoder}"
    for layer, head in tqdm(heads[len(rows) :], desc=label, unit="head", disable=not progress):
        samples = units.head_coordinates(layer, head).to(device)
        linear, nonlinear = pca_dimension(spectra.eigenvalues[layer, head]), two_nn(samples)
        error = subsampling_error(two_nn, samples, seed=seed)
        rows.append((layer, head, linear, nonlinear, linear / nonlinear, float(evr[layer, head, 0]), error))
        if head == units.manifest.heads - 1:
            _keep_rows(kept, rows)
    names = ["layer", "head", "linear_id", "twonn_id", "ratio", "evr1", "twonn_id_error"]
    return pd.DataFrame(rows, columns=names)


def _recipe(seal: str) -> str:
    """Changes with the units, and with the code that what is kept here comes from."""
    parts = (seal, torch.__version__, *map(inspect.getsource, (sys.modules[__name__], spectrum, store)))
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


def _kept_rows(path: Path) -> list[tuple]:
    try:
        kept = json.loads(path.read_text())
        whole = hashlib.sha256(json.dumps(kept["rows"]).encode()).hexdigest() == kept["sha256"]
        return [tuple(row) for row in kept["rows"]] if whole else []
    except (OSError, ValueError, KeyError, TypeError):
        return []  # nothing, or damaged: computed anew


def _keep_rows(path: Path, rows: list[tuple]) -> None:
    text = json.dumps(rows)
    try:
        write_bytes(path, json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "rows": rows}).encode())
    except OSError as error:
        log.warning("dimensions are not kept, and computed anew the next time: %s", error)


def layer_means(heads: pd.DataFrame) -> pd.DataFrame:
    """Means over the heads of each layer, and their standard errors in columns `..._se` (Fig. 2).

    The ratio is the mean of the heads' ratios, not the ratio of the means.
    """
    columns = ["linear_id", "twonn_id", "ratio", "evr1"]
    groups = heads.groupby("layer")[columns]
    return groups.mean().join(groups.sem().add_suffix("_se")).reset_index()
