"""Sparse decompositions of heads in the words of a dictionary: OMP, SOMP and TextSpan.

All three pick atoms (rows of the dictionary) one after another, and take what they explain out of
the signal. Their conventions are the same:

- Atoms are used as they are, at their own length. Of atoms that score alike, to 1 part in 10^10, the first is picked.
- An atom that is zero, or lies in the span of those picked before (a duplicate), is never picked. One
  shorter than a millionth of the longest counts as zero: filtering leaves rounding in place of zeros.
- A pursuit ends before k where nothing is left to explain, or nothing to explain it with. Below a
  millionth of the signal's length, what is left counts as nothing.

TextSpan needs the covariance of the signal only, so that a whole encoder is described from moments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from residual.spectrum import Moments, isometry
from residual.store import StoredUnits

CRITERIA = ("l1", "l2", "variance")
NOTHING = 1e-12  # of the energy: a millionth of the length
TIE = 1e-10
NONE = -1  # in place of an atom, where a pursuit of one head among many ended before k


@dataclass(frozen=True)
class Pursuit:
    """The atoms that a pursuit picked, in order.

    indices: rows of the dictionary; -1 fills up heads whose pursuit ended before others'.
    explained: share of the signal's energy that the atoms up to each one explain (from moments: of its variance).
    weights: coordinates of the signal over the picked atoms, by least squares; None from moments.
    """

    indices: Int64[Tensor, "... k"]
    explained: Float64[Tensor, "... k"]
    weights: Float64[Tensor, "... k"] | None = None


def omp(vector: Tensor, dictionary: Tensor, k: int) -> Pursuit:
    """Orthogonal matching pursuit of one vector [d] over a dictionary [t d], with at most k atoms; weights [k].

    Raises ValueError for shapes that do not fit, k < 1, NaN or infinity.
    Source: Pati, Rezaiifar & Krishnaprasad (1993); scikit-learn's picks are the same.
    """
    if vector.ndim != 1:
        raise ValueError(f"omp takes one vector [d], not {list(vector.shape)}; somp takes many")
    found = somp(vector[None], dictionary, k, criterion="l2")
    return Pursuit(found.indices, found.explained, found.weights[0])


def somp(x: Tensor, dictionary: Tensor, k: int, criterion: str = "l1") -> Pursuit:
    """Simultaneous orthogonal matching pursuit of samples [n d] over a dictionary [t d]; weights [n k].

    criterion: of an atom's inner products with the residual, the sum of magnitudes ("l1", the
    paper's), the sum of squares ("l2") or their variance ("variance", TextSpan's). The samples are
    not centred here. Keeps a matrix [t n] in single precision; picks are decided in double.
    Raises ValueError as `omp`, and for an unknown criterion.
    Source: Tropp, Gilbert & Strauss (2006); Algorithm 2 of the paper.
    """
    _check(x, dictionary, k)
    basis = torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
    picked, explained = _simultaneous(x.double(), basis, dictionary.to(x.device).double(), k, criterion)
    chosen = dictionary.to(x.device)[picked].double()
    return Pursuit(picked, explained, torch.linalg.lstsq(chosen.T, x.double().T).solution.T)


def textspan(x: Tensor, dictionary: Tensor, k: int) -> Pursuit:
    """TextSpan of samples [n d] over a dictionary [t d]; weights [n k] over the atoms as they were given.

    Picks by the variance of inner products, and takes what is explained out of the samples and of the
    dictionary both. `explained` is of the variance.
    Raises ValueError as `omp`, and with fewer than two samples.
    Source: Gandelsman et al. (2024); Algorithm 1 of the paper. Filter the dictionary first, as
    they do, with `filter_dictionary`.
    """
    _check(x, dictionary, k)
    found = textspan_from_moments(Moments.of(x), dictionary.to(x.device), k)
    chosen = dictionary.to(x.device)[found.indices].double()
    return Pursuit(found.indices, found.explained, torch.linalg.lstsq(chosen.T, x.double().T).solution.T)


def textspan_from_moments(
    moments: Moments,
    dictionary: Float[Tensor, "t d"],
    k: int,
    frame: Float[Tensor, "... r d"] | None = None,
    rank: int | None = None,
) -> Pursuit:
    """TextSpan from the moments of one or many heads at once.

    frame: the samples are c @ frame, and the moments those of c, as in `pca_from_moments`.
    rank: filter the dictionary to each head's leading components.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    covariance = moments.covariance
    dictionary = dictionary.to(covariance)
    if frame is None:
        basis = torch.eye(covariance.shape[-1], dtype=torch.float64, device=covariance.device)
    else:
        basis, factor = isometry(frame)
        covariance = factor @ covariance @ factor.mT
    if basis.shape[-2] != dictionary.shape[1]:
        raise ValueError(f"the heads live in R^{basis.shape[-2]}, the dictionary in R^{dictionary.shape[1]}")
    # All heads' bases side by side in one product: half the time of a batch of products.
    atoms = torch.tensordot(dictionary, basis, ([1], [-2])).movedim(0, -2)
    if rank is not None:
        spectrum = torch.linalg.eigh(covariance)
        leading = _varying(spectrum.eigenvectors.mT.flip(-2), spectrum.eigenvalues.flip(-1), rank)
        atoms = atoms @ leading.mT @ leading

    def products(rows: Tensor) -> Tensor:
        if rank is None:
            return dictionary[rows] @ dictionary.mT
        own = atoms.gather(-2, rows[..., None, None].expand(*rows.shape, 1, atoms.shape[-1]))
        return (atoms @ own.mT)[..., 0]

    lengths = dictionary.square().sum(1) if rank is None else atoms.square().sum(-1)
    return _deflate(covariance, atoms, lengths.expand(atoms.shape[:-1]), products, k)


def textspan_heads(units: StoredUnits, dictionary: Float[Tensor, "t d"], k: int, rank: int | None = None) -> Pursuit:
    """TextSpan of every head, from moments: indices [l h k]. A layer at a time, for memory's sake."""
    layers = []
    for layer, frame in enumerate(units.frames.heads):
        own = Moments(units.heads.count, units.heads.mean[layer], units.heads.scatter[layer])
        layers.append(textspan_from_moments(own, dictionary, k, frame, rank))
    return _stack(layers)


def omp_heads(
    units: StoredUnits, dictionary: Float[Tensor, "t d"], k: int, component: int = 0, rank: int | None = None
) -> Pursuit:
    """OMP of one principal component of every head: indices [l h k] (OMP_1 and OMP_2 of section 3.2)."""
    spectra = units.head_pca()
    components = spectra.components
    if not 0 <= component < components.shape[-2]:
        raise ValueError(f"component must be from 0 to {components.shape[-2] - 1}, not {component}")
    found = []
    for own, variances in zip(components.flatten(0, 1), spectra.eigenvalues.flatten(0, 1), strict=True):
        words = dictionary.to(own)
        words = words if rank is None else filter_dictionary(words, _varying(own, variances, rank))
        found.append(omp(own[component], words, k))
    return _stack(found, components.shape[:2])


def somp_head(
    units: StoredUnits,
    layer: int,
    head: int,
    dictionary: Float[Tensor, "t d"],
    k: int,
    criterion: str = "l1",
    rank: int | None = None,
) -> Pursuit:
    """SOMP of one head, centred, in isometric coordinates; without weights.

    Raises StoreError if the extraction kept no coordinates.
    """
    basis, _ = isometry(units.frames.heads[layer, head])
    samples = units.head_coordinates(layer, head)
    samples = samples - samples.mean(0)
    words = dictionary.to(samples)
    if rank is not None:
        spectra = units.head_pca()
        words = filter_dictionary(
            words, _varying(spectra.components[layer, head], spectra.eigenvalues[layer, head], rank)
        )
    _check(samples, words @ basis, k)
    return Pursuit(*_simultaneous(samples, basis, words, k, criterion))


def somp_heads(
    units: StoredUnits, dictionary: Float[Tensor, "t d"], k: int, criterion: str = "l1", rank: int | None = None
) -> Pursuit:
    """`somp_head` of every head: indices [l h k]."""
    grid = units.frames.heads.shape[:2]
    found = [
        somp_head(units, layer, head, dictionary, k, criterion, rank) for layer, head in product(*map(range, grid))
    ]
    return _stack(found, grid)


def agreement(
    textspan: Int64[Tensor, "h k"], other: Int64[Tensor, "m j"], encodings: Float[Tensor, "t d"]
) -> Float64[Tensor, "h m"]:
    """Z of each head's TextSpan descriptions with each other set of descriptions, with its sign.

    The mean cosine similarity between two sets, less that between the first set and the whole
    dictionary, over the standard deviation of the latter. The paper shows its magnitude. NaN for an empty set.
    Source: section 3.2.
    """
    unit = torch.nn.functional.normalize(encodings.to(textspan.device).double(), dim=1)
    scores = []
    for own in textspan:
        cosines = unit[own[own >= 0]] @ unit.T
        mean, spread = cosines.mean(), cosines.std()
        scores.append(torch.stack([(cosines[:, picked[picked >= 0]].mean() - mean) / spread for picked in other]))
    return torch.stack(scores)


def filter_dictionary(dictionary: Float[Tensor, "t d"], components: Float[Tensor, "r d"]) -> Float[Tensor, "t d"]:
    """The part of every atom that lies in the span of orthonormal components (appendix A.2)."""
    return (dictionary @ components.mT.to(dictionary)) @ components.to(dictionary)


def _varying(components: Tensor, eigenvalues: Tensor, rank: int) -> Tensor:
    """The leading components; those along which nothing varies, which are arbitrary, are zero."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    varies = eigenvalues > NOTHING * eigenvalues[..., :1]
    return (components * varies[..., None])[..., :rank, :]


def _simultaneous(samples: Tensor, basis: Tensor, dictionary: Tensor, k: int, criterion: str) -> tuple[Tensor, Tensor]:
    """SOMP of samples @ basis.T, with samples [n r] and orthonormal columns of basis [d r].

    The inner products [t n] of atoms and residual are kept in single precision, to find the atoms
    that may be best; these are scored again in double.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {list(CRITERIA)}, not {criterion!r}")
    atoms = dictionary @ basis
    energy = samples.square().sum()
    products = atoms.float() @ samples.float().T
    # Bound on what rounding to single precision does to a score of l1; the others' are compared by their roots.
    lengths = samples.norm(dim=1)
    root = {"l1": lengths.sum(), "l2": lengths.norm(), "variance": lengths.norm() / max(1, len(samples) - 1) ** 0.5}
    margin = 64 * torch.finfo(torch.float32).eps * atoms.norm(dim=1).max() * root[criterion]
    left = length = dictionary.square().sum(1)
    along, onto = atoms.new_empty(len(atoms), 0), atoms.new_empty(len(samples), 0)  # atoms and samples on picked axes
    picked, explained = [], []
    while len(picked) < k:
        free = (left > NOTHING * length) & (length > NOTHING * length.max())
        screened = _score(products, criterion).double().masked_fill(~free, -torch.inf)
        rows = (screened >= screened.max() - margin).logical_and(free).nonzero()[:, 0]
        if len(rows) == 0:
            break
        exact = torch.cat(
            [_score(atoms[part] @ samples.T - along[part] @ onto.T, criterion) for part in rows.split(256)]
        )
        row = rows[_first_of_best(exact)]
        axis = (dictionary @ dictionary[row] - along @ along[row]) / left[row].sqrt()
        direction = dictionary[row] @ basis
        share = samples @ direction - onto @ along[row]
        share = share / left[row].sqrt()
        rest = 1 - sum(explained[-1:])
        gain = share.square().sum() / energy
        if not gain > NOTHING or not rest > NOTHING:
            break
        picked.append(row)
        explained.append(sum(explained[-1:]) + gain)
        products.addr_(axis.float(), share.float(), alpha=-1)
        along, onto = torch.cat([along, axis[:, None]], 1), torch.cat([onto, share[:, None]], 1)
        left = (left - axis.square()).clamp(min=0)
        left[row] = 0
    if not picked:
        return torch.empty(0, dtype=torch.long, device=samples.device), energy.new_empty(0)
    return torch.stack(picked), torch.stack(explained)


def _score(products: Tensor, criterion: str) -> Tensor:
    """Of inner products [t n]. Squares are given by their roots, which rank the same."""
    if criterion == "variance":
        return products.std(1) if products.shape[1] > 1 else products.new_zeros(len(products))
    return torch.linalg.vector_norm(products, 1 if criterion == "l1" else 2, dim=1)


def _deflate(
    covariance: Float64[Tensor, "... r r"],
    atoms: Float64[Tensor, "... t r"],
    lengths: Float64[Tensor, "... t"],
    products: Callable[[Tensor], Tensor],
    k: int,
) -> Pursuit:
    """TextSpan of many heads: the dictionary is made orthogonal to every picked atom.

    atoms: projected on each head's basis. lengths: squared, in the dictionary's own space.
    products: inner products [... t] of all atoms with one for each head.
    """
    scores = ((atoms @ covariance) * atoms).sum(-1)
    total = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    left, done = lengths, torch.zeros_like(total)
    along = atoms.new_empty(*atoms.shape[:-1], 0)  # atoms on the picked axes
    axes = atoms.new_empty(*atoms.shape[:-2], 0, atoms.shape[-1])
    indices, explained = [], []
    while len(indices) < k:
        free = (left > NOTHING * lengths) & (lengths > NOTHING * lengths.amax(-1, keepdim=True))
        row = _first_of_best(scores.masked_fill(~free, -1))
        length = left.gather(-1, row[..., None])[..., 0]
        own = atoms.gather(-2, row[..., None, None].expand(*row.shape, 1, atoms.shape[-1]))
        before = along.gather(-2, row[..., None, None].expand(*row.shape, 1, along.shape[-1]))
        unit = length.clamp(min=torch.finfo(torch.float64).tiny).sqrt()[..., None]
        axis = (own - before @ axes)[..., 0, :] / unit
        onto = (products(row) - (along @ before.mT)[..., 0]) / unit
        turned = (covariance @ axis[..., None])[..., 0]
        gain = (axis * turned).sum(-1)
        live = free.any(-1) & (gain > NOTHING * total) & (total - done > NOTHING * total)
        if not live.any():
            break
        axis, onto, gain = axis * live[..., None], onto * live[..., None], gain * live
        mixed = (atoms @ turned[..., None])[..., 0] - (along @ (axes @ turned[..., None]))[..., 0]
        scores = (scores - 2 * onto * mixed + onto.square() * gain[..., None]).where(live[..., None], scores)
        left = (left - onto.square()).clamp(min=0)
        left = left.scatter(-1, row[..., None], left.gather(-1, row[..., None]).where(~live[..., None], 0))
        along, axes = torch.cat([along, onto[..., None]], -1), torch.cat([axes, axis[..., None, :]], -2)
        done = done + gain
        indices.append(row.where(live, NONE))
        explained.append(done / total.where(total > 0, 1))
    if not indices:
        empty = (*total.shape, 0)
        return Pursuit(torch.empty(empty, dtype=torch.long, device=total.device), total.new_empty(empty))
    return Pursuit(torch.stack(indices, -1), torch.stack(explained, -1))


def _first_of_best(scores: Tensor) -> Tensor:
    best = scores.max(-1, keepdim=True).values
    return (scores >= best - TIE * best.abs()).int().argmax(-1)


def _stack(found: list[Pursuit], shape: tuple[int, ...] | None = None) -> Pursuit:
    """Of equal shape but for k; where some end early, the others' k stands and NONE fills up."""
    longest = max(one.indices.shape[-1] for one in found)
    parts = zip(*(_pad(one.indices, one.explained, longest) for one in found), strict=True)
    indices, explained = (torch.stack(part) for part in parts)
    shape = shape or indices.shape[:1]
    return Pursuit(indices.unflatten(0, shape), explained.unflatten(0, shape))


def _pad(indices: Tensor, explained: Tensor, k: int) -> tuple[Tensor, Tensor]:
    missing = (*indices.shape[:-1], k - indices.shape[-1])
    last = explained[..., -1:].expand(missing) if explained.shape[-1] else explained.new_zeros(missing)
    return torch.cat([indices, indices.new_full(missing, NONE)], -1), torch.cat([explained, last], -1)


def _check(x: Tensor, dictionary: Tensor, k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if x.ndim != 2 or dictionary.ndim != 2 or x.shape[1] != dictionary.shape[1]:
        raise ValueError(f"samples [n d] and a dictionary [t d], not {list(x.shape)} and {list(dictionary.shape)}")
    if len(x) == 0 or len(dictionary) == 0:
        raise ValueError(f"{len(x)} samples and {len(dictionary)} atoms: there must be at least one of each")
    for name, value in (("the samples", x), ("the dictionary", dictionary)):
        if not value.isfinite().all():
            raise ValueError(f"{name} hold NaN or infinity")
