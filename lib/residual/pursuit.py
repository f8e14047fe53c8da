"""Sparse decompositions in the words of a dictionary: OMP, SOMP and TextSpan.

All three pick atoms (rows of the dictionary) one after another, and remove what they explain from
the signal. Their conventions are the same:

- Atoms keep their own length. If several score alike, to 1 part in 10^10, the first is picked.
- An atom that is zero, or lies in the span of those picked before (a duplicate), is never picked. One
  shorter than a millionth of the longest counts as zero: filtering leaves rounding in place of zeros.
- A pursuit ends before k when nothing is left to explain, or no atom is left to explain it. A remainder
  below a millionth of the signal's length counts as nothing.

TextSpan needs the covariance of the signal only, so a whole encoder is described from moments.

A signal along two of three atoms:

>>> import torch
>>> dictionary = torch.eye(3, dtype=torch.float64)
>>> found = omp(torch.tensor([0.0, 4.0, 3.0], dtype=torch.float64), dictionary, k=3)
>>> found.indices.tolist()  # the larger part first, and no third atom
[1, 2]
>>> [round(share, 2) for share in found.explained.tolist()]  # 16/25, and the rest
[0.64, 1.0]
>>> [round(weight, 6) for weight in found.weights.tolist()]
[4.0, 3.0]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from residual.spectrum import PCA, Moments, isometry, uncentred_pca

CRITERIA = ("l1", "l2", "variance")
NOTHING = 1e-12  # of the energy: a millionth of the length
TIE = 1e-10
NONE = -1  # in place of an atom, where the pursuit of one head among many ended before k


@dataclass(frozen=True)
class Pursuit:
    """The atoms that a pursuit picked, in order.

    indices: rows of the dictionary; -1 pads heads whose pursuit ended early.
    explained: share of the signal's energy that the atoms up to each one explain (from moments: of its variance).
    weights: coordinates of the signal over the picked atoms, by least squares; None from moments.
    """

    indices: Int64[Tensor, "... k"]
    explained: Float64[Tensor, "... k"]
    weights: Float64[Tensor, "... k"] | None = None

    def texts(self, dictionary: Sequence[str], *at: int) -> list[str]:
        """The descriptions picked (for one head, at its indices), "" in place of padding."""
        return [dictionary[i] if i >= 0 else "" for i in self.indices[at].tolist()]

    @staticmethod
    def stack(pursuits: list[Pursuit], shape: tuple[int, ...] | None = None) -> Pursuit:
        """Several as one, with leading axes of the given shape; short ones are padded with NONE."""
        k = max(one.indices.shape[-1] for one in pursuits)
        parts = zip(*(_padded(one, k) for one in pursuits), strict=True)
        indices, explained = (torch.stack(part) for part in parts)
        shape = indices.shape[:1] if shape is None else shape
        return Pursuit(indices.view(*shape, *indices.shape[1:]), explained.view(*shape, *explained.shape[1:]))


def omp(vector: Tensor, dictionary: Tensor, k: int) -> Pursuit:
    """Orthogonal matching pursuit of one vector [d] over a dictionary [t d], with at most k atoms; weights [k].

    Raises ValueError for shapes that do not fit, k < 1, NaN or infinity.
    Source: Pati, Rezaiifar & Krishnaprasad (1993); scikit-learn picks the same atoms.
    """
    if vector.ndim != 1:
        raise ValueError(f"omp takes one vector [d], not {list(vector.shape)}; somp takes many")
    result = somp(vector[None], dictionary, k, criterion="l2")
    return Pursuit(result.indices, result.explained, result.weights[0])


def somp(x: Tensor, dictionary: Tensor, k: int, criterion: str = "l1") -> Pursuit:
    """Simultaneous orthogonal matching pursuit of samples [n d] over a dictionary [t d]; weights [n k].

    criterion: of an atom's inner products with the residual, the sum of magnitudes ("l1", the paper's), the sum of
    squares ("l2") or the variance ("variance", TextSpan's). The samples are not centred here. Keeps a
    matrix [t n] in single precision; atoms are chosen in double.
    Raises ValueError as `omp`, and for an unknown criterion.
    Source: Tropp, Gilbert & Strauss (2006); Algorithm 2 of the paper.
    """
    basis = torch.eye(x.shape[-1], dtype=torch.float64, device=x.device)
    result = somp_in_basis(x.double(), basis, dictionary.to(x.device).double(), k, criterion)
    return Pursuit(result.indices, result.explained, _weights(x, dictionary, result))


def somp_in_basis(
    samples: Float64[Tensor, "n r"],
    basis: Float64[Tensor, "d r"],
    dictionary: Float64[Tensor, "t w"],
    k: int,
    criterion: str = "l1",
) -> Pursuit:
    """`somp` of samples @ basis.T, where the basis has orthonormal columns; without weights.

    Raises ValueError as `somp`.
    """
    _check(samples, dictionary, k, tuple(basis.shape))
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {list(CRITERIA)}, not {criterion!r}")
    remainder, energy = _Remainder(samples, basis, dictionary, criterion), samples.square().sum()
    picked, explained = [], []
    while len(picked) < k and (row := remainder.best_atom()) is not None:
        axis, scores = remainder.next_axis(row)
        before, gain = sum(explained[-1:]), scores.square().sum() / energy
        if not gain > NOTHING or not 1 - before > NOTHING:
            break
        picked.append(row)
        explained.append(before + gain)
        remainder.remove(row, axis, scores)
    if not picked:
        return Pursuit(torch.empty(0, dtype=torch.long, device=samples.device), energy.new_empty(0))
    return Pursuit(torch.stack(picked), torch.stack(explained))


def textspan(x: Tensor, dictionary: Tensor, k: int) -> Pursuit:
    """TextSpan of samples [n d] over a dictionary [t d]; weights [n k] over the atoms as they were given.

    Picks by the variance of inner products, and removes what is explained from the samples and from the
    dictionary both. `explained` is of the variance.
    Raises ValueError as `omp`, and with fewer than two samples.
    Source: Gandelsman et al. (2024); Algorithm 1 of the paper. Filter the dictionary first, as
    they do, with `filter_dictionary`.
    """
    _check(x, dictionary, k, (x.shape[-1], x.shape[-1]))
    result = textspan_from_moments(Moments.of(x), dictionary.to(x.device), k)
    return Pursuit(result.indices, result.explained, _weights(x, dictionary, result))


def textspan_from_moments(
    moments: Moments,
    dictionary: Float[Tensor, "t d"],
    k: int,
    frame: Float[Tensor, "... r d"] | None = None,
    constant: Float[Tensor, "d"] | None = None,
    rank: int | None = None,
) -> Pursuit:
    """TextSpan from the moments of one or many heads at once.

    frame, constant: the samples are c @ frame + constant, and the moments those of c, as in `pca_from_moments`.
    rank: filter the dictionary to the span of this many leading singular vectors of each head's samples, which are not
    centred for this. Raises ValueError as `omp`. Source of the filter: the code of Gandelsman et al. (2024).
    """
    covariance, dictionary = moments.covariance, dictionary.to(moments.mean)
    if frame is None:
        basis = torch.eye(covariance.shape[-1], dtype=torch.float64, device=covariance.device)
    else:
        basis, factor = isometry(frame)
        covariance = factor @ covariance @ factor.mT
    if basis.shape[-2] != dictionary.shape[1]:
        raise ValueError(f"the heads live in R^{basis.shape[-2]}, the dictionary in R^{dictionary.shape[1]}")
    shape = covariance.shape[:-2]
    parts = [basis.expand(*shape, *basis.shape[-2:]), *torch.linalg.eigh(covariance)]
    if rank is not None:
        parts.append(_leading(uncentred_pca(moments, frame, constant), rank))
    heads = zip(*(part.reshape(-1, *part.shape[len(shape) :]) for part in parts), strict=True)
    return Pursuit.stack([_textspan_of_spectrum(dictionary, k, *head) for head in heads], shape)


def _textspan_of_spectrum(
    dictionary: Tensor, k: int, basis: Tensor, eigenvalues: Tensor, vectors: Tensor, leading: Tensor | None = None
) -> Pursuit:
    """TextSpan of one head: SOMP of a square root of its covariance, which has the same inner products' variances."""
    root = eigenvalues.clamp(min=0).sqrt()[:, None] * vectors.mT
    words = dictionary if leading is None else filter_dictionary(dictionary, leading)
    return somp_in_basis(root, basis, words, k, "l2")


def filter_dictionary(dictionary: Float[Tensor, "t d"], components: Float[Tensor, "r d"]) -> Float[Tensor, "t d"]:
    """The part of every atom that lies in the span of orthonormal components (appendix A.2)."""
    return (dictionary @ components.mT.to(dictionary)) @ components.to(dictionary)


def _leading(spectrum: PCA, rank: int) -> Float[Tensor, "... r d"]:
    """The first `rank` components; those along which there is nothing, which are arbitrary, are zero."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    there = spectrum.eigenvalues > NOTHING * spectrum.eigenvalues[..., :1]
    return (spectrum.components * there[..., None])[..., :rank, :]


class _Remainder:
    """Samples and atoms of `somp_in_basis` without their parts along the atoms picked so far.

    The inner products [t n] of atoms and residual are kept in single precision, to find the atoms
    that may be best; these are scored again in double.
    """

    def __init__(self, samples: Tensor, basis: Tensor, dictionary: Tensor, criterion: str) -> None:
        self.samples, self.basis, self.dictionary, self.criterion = samples, basis, dictionary, criterion
        self.atoms = dictionary @ basis
        self.products = self.atoms.float() @ samples.float().T
        # Bound on what rounding to single precision does to a score; squares are compared by their roots.
        norms = samples.norm(dim=1)
        root = norms.sum() if criterion == "l1" else norms.norm()
        self.margin = 64 * torch.finfo(torch.float32).eps * self.atoms.norm(dim=1).max() * root
        self.left = self.length = dictionary.square().sum(1)  # squared, of atoms beside the picked axes, and whole
        self.along = self.atoms.new_empty(len(self.atoms), 0)  # atoms on the picked axes
        self.onto = self.atoms.new_empty(len(samples), 0)  # samples on the picked axes

    def best_atom(self) -> Tensor | None:
        free = (self.left > NOTHING * self.length) & (self.length > NOTHING * self.length.max())
        screened = self._score(self.products).double().masked_fill(~free, -torch.inf)
        rows = (screened >= screened.max() - self.margin).logical_and(free).nonzero()[:, 0]
        if len(rows) == 0:
            return None
        parts = (self.atoms[part] @ self.samples.T - self.along[part] @ self.onto.T for part in rows.split(256))
        return rows[_first_of_best(torch.cat([self._score(part) for part in parts]))]

    def next_axis(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """The dictionary [t] and the samples [n] along the part of an atom that is orthogonal to the picked axes."""
        atom, length = self.dictionary[row], self.left[row].sqrt()
        axis = (self.dictionary @ atom - self.along @ self.along[row]) / length
        return axis, (self.samples @ (atom @ self.basis) - self.onto @ self.along[row]) / length

    def remove(self, row: Tensor, axis: Tensor, scores: Tensor) -> None:
        self.products.addr_(axis.float(), scores.float(), alpha=-1)
        self.along = torch.cat([self.along, axis[:, None]], 1)
        self.onto = torch.cat([self.onto, scores[:, None]], 1)
        self.left = (self.left - axis.square()).clamp(min=0)
        self.left[row] = 0

    def _score(self, products: Tensor) -> Tensor:
        """Of inner products [t n]. Sums of squares, and a variance, are given by roots that rank the same."""
        if self.criterion == "variance":
            products = products - products.mean(1, keepdim=True)
        return torch.linalg.vector_norm(products, 1 if self.criterion == "l1" else 2, dim=1)


def _weights(x: Tensor, dictionary: Tensor, result: Pursuit) -> Float64[Tensor, "n k"]:
    """Samples over the picked atoms, by least squares."""
    chosen = dictionary.to(x.device)[result.indices].double()
    return torch.linalg.lstsq(chosen.T, x.double().T).solution.T


def _first_of_best(scores: Tensor) -> Tensor:
    best = scores.max(-1, keepdim=True).values
    return (scores >= best - TIE * best.abs()).int().argmax(-1)


def _padded(result: Pursuit, k: int) -> tuple[Tensor, Tensor]:
    indices, explained = result.indices, result.explained
    missing = (*indices.shape[:-1], k - indices.shape[-1])
    last = explained[..., -1:].expand(missing) if explained.shape[-1] else explained.new_zeros(missing)
    return torch.cat([indices, indices.new_full(missing, NONE)], -1), torch.cat([explained, last], -1)


def _check(x: Tensor, dictionary: Tensor, k: int, basis: tuple[int, ...]) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if not (x.ndim == dictionary.ndim == 2 and (dictionary.shape[1], x.shape[1]) == basis):
        raise ValueError(f"samples [n d] and a dictionary [t d], not {list(x.shape)} and {list(dictionary.shape)}")
    if len(x) == 0 or len(dictionary) == 0:
        raise ValueError(f"{len(x)} samples and {len(dictionary)} atoms: there must be at least one of each")
    for name, value in (("the samples", x), ("the dictionary", dictionary)):
        if not value.isfinite().all():
            raise ValueError(f"{name} hold NaN or infinity")
