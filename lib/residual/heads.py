"""Every head of a stored set: its dimensions, its descriptions, and the factors that its variance comes from."""

from __future__ import annotations

import json
import logging
from functools import partial
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from tqdm.auto import tqdm

from residual import dimension, spectrum, store
from residual.data.dataset import Factor
from residual.dimension import FEWEST, pca_dimension, subsampling_error, two_nn
from residual.files import write_bytes
from residual.pursuit import Pursuit, omp, somp_in_basis, textspan_from_moments
from residual.spectrum import Moments, isometry, pca_from_moments
from residual.store import Manifest, StoredUnits
from residual.tensors import cache_key

RANK = 80  # of the filter of TextSpan's dictionary, in the code of Gandelsman et al.
BINS = 8  # of equal count, for a factor that is a measure
PLACES = 4  # a side, for a position
log = logging.getLogger(__name__)


def head_dimensions(
    units: StoredUnits, *, share: float = 1.0, seed: int = 0, device: str | torch.device = "cpu", progress: bool = True
) -> pd.DataFrame:
    """L, N, their ratio and EVR1 of every head, in rows by layer and head (section 3.1).

    share: of the images, drawn at random, from which L and N are; the authors' code takes 50,000 of 80,000.
    `twonn_id_error` is N's standard error from random quarters of the images. device: where neighbours are found.
    Finished layers are cached in the units' folder.
    Raises StoreError if the extraction kept no coordinates, and ValueError for too few distinct images.
    """
    _check_count(units.manifest, share)
    spectra = units.head_pca()
    evr = spectra.explained_variance_ratio
    code = [Path(module.__file__).read_text() for module in (spectrum, dimension, store)]
    manifest = units.manifest
    key = cache_key(manifest.weights_hash, *(shard.sha256 for shard in manifest.shards), torch.__version__, *code)
    path = units.folder / f"dimensions-{share:g}-{seed}-{key}.json"
    rows = _finished(path)
    heads = list(product(*map(range, units.head_grid)))
    label = f"dimension of the heads of {units.manifest.encoder}"
    # The precision of the forward pass, whose rounding differs from batch to batch.
    estimate, images = partial(two_nn, precision=torch.float32), _random_rows(units.manifest.count, share, seed)
    for layer, head in tqdm(heads[len(rows) :], desc=label, unit="head", disable=not progress):
        samples, variances = units.head_coordinates(layer, head)[images].to(device), spectra.eigenvalues[layer, head]
        if share < 1:
            variances = pca_from_moments(Moments.of(samples)).eigenvalues
        linear, nonlinear = pca_dimension(variances), estimate(samples)
        error = subsampling_error(estimate, samples, seed=seed)
        rows.append((layer, head, linear, nonlinear, linear / nonlinear, float(evr[layer, head, 0]), error))
        if head == units.manifest.heads - 1:
            try:
                write_bytes(path, json.dumps(rows).encode())
            except OSError as reason:
                log.warning("cannot save dimensions; they will be computed again next time: %s", reason)
    names = ["layer", "head", "linear_id", "twonn_id", "ratio", "evr1", "twonn_id_error"]
    return pd.DataFrame(rows, columns=names)


def _finished(path: Path) -> list[tuple]:
    """Rows of layers that an earlier run finished."""
    try:
        return [tuple(row) for row in json.loads(path.read_text())]
    except (FileNotFoundError, ValueError):
        return []


def _random_rows(count: int, share: float, seed: int) -> Tensor | slice:
    if share == 1:
        return slice(None)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: round(share * count)].sort().values


def _check_count(manifest: Manifest, share: float) -> None:
    """Raises ValueError for a bad share, and where quarters of the images that are used would be too few for TwoNN."""
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], not {share}")
    if (used := round(share * manifest.count)) < 4 * FEWEST:
        raise ValueError(
            f"{used} images of {manifest.dataset}/{manifest.split} are used, and the dimensions need at least "
            f"{4 * FEWEST}: N's standard error comes from random quarters of the images, and TwoNN takes {FEWEST} "
            "distinct rows. Take more images, or another split"
        )


def textspan_heads(units: StoredUnits, dictionary: Float[Tensor, "t d"], k: int, rank: int | None = RANK) -> Pursuit:
    """TextSpan of every head, from moments: indices [l h k]. Memory is that of one layer.

    rank: of the filter of the dictionary; None filters nothing. Source: appendix A.2, and `textspan_from_moments`.
    """
    moments, frames, constant = units.head_moments, units.frames.head_frames, units.frames.head_constant
    return Pursuit.stack([
        textspan_from_moments(moments[layer], dictionary, k, frame, constant, rank)
        for layer, frame in enumerate(frames)
    ])  # fmt: skip


def omp_heads(units: StoredUnits, dictionary: Float[Tensor, "t d"], k: int, component: int = 0) -> Pursuit:
    """OMP of one principal component of every head: indices [l h k] (OMP_1 and OMP_2 of section 3.2).

    A component without variance, whose direction means nothing, has no sentences.
    """
    spectra = units.head_pca()
    components = spectra.components * (spectra.eigenvalues > 0)[..., None]
    if not 0 <= component < (count := components.shape[-2]):
        raise ValueError(f"component must be from 0 to {count - 1}, not {component}")
    pursuits = [omp(vectors[component], dictionary.to(vectors), k) for vectors in components.flatten(0, 1)]
    return Pursuit.stack(pursuits, units.head_grid)


def somp_head(
    units: StoredUnits, layer: int, head: int, dictionary: Float[Tensor, "t d"], k: int, criterion: str = "l1"
) -> Pursuit:
    """SOMP of one head, centred, in isometric coordinates; without weights (Fig. 4b).

    Raises StoreError if the extraction kept no coordinates, ValueError for an unknown criterion.
    """
    basis, _ = isometry(units.frames.head_frames[layer, head])
    samples = units.head_coordinates(layer, head)
    return somp_in_basis(samples - samples.mean(0), basis, dictionary.to(samples), k, criterion)


def factor_levels(factors: dict[str, Factor], names: dict[str, tuple[str, ...]]) -> dict[str, Int64[Tensor, "n"]]:
    """Each image's level of every factor, as an index.

    names: factor -> the columns of `factors` that make it up: {"position": ("x", "y")}. Named values
    are levels already; measures are cut into bins of equal count; of two columns, every pair is a level.
    Raises KeyError for an unknown column.
    """
    levels = {}
    for name, columns in names.items():
        level = torch.zeros_like(factors[columns[0]].values, dtype=torch.long)
        for column in columns:
            factor, bins = factors[column], BINS if len(columns) == 1 else PLACES
            values = factor.values.long() if factor.names else _bins(factor.values, bins)
            level = level * (int(values.max()) + 1) + values
        levels[name] = level.unique(return_inverse=True)[1]
    return levels


def variance_shares(
    values: Float[Tensor, "n k"], level: Int64[Tensor, "n"]
) -> tuple[Float64[Tensor, "k"], Float64[Tensor, "k"]]:
    """Share of each column's variance that lies between the levels of a factor, and the columns' variances.

    The share is epsilon squared: the correlation ratio, corrected for what as many random levels explain on average.
    Without an effect it is about 0, and may be negative. Zero for a column that does not vary.
    Source: Kelley (1935).
    """
    n, groups = len(values), int(level.max()) + 1
    if len(level) != n or n <= groups:
        raise ValueError(f"{n} values for {len(level)} labels of {groups} levels")
    centred = values.double() - values.double().mean(0)
    total = centred.square().sum(0)
    one_hot = torch.nn.functional.one_hot(level, groups).to(centred)
    between = ((one_hot.T @ centred).square() / one_hot.sum(0).clamp(min=1)[:, None]).sum(0)
    share = between / total.where(total > 0, 1)
    return (1 - (1 - share) * (n - 1) / (n - groups)) * (total > 0), total / (n - 1)


def _bins(values: Tensor, bins: int) -> Tensor:
    return values.double().argsort().argsort() * bins // len(values)
