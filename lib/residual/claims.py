"""The paper's claims as checks over results.

Each threshold was set before any result was seen, and says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import spearmanr

SUPPORTED, INCONCLUSIVE, NOT_SUPPORTED = "supported", "inconclusive", "not supported"
Verdict = Literal["supported", "inconclusive", "not supported"]
CLEAR, FAINT = 2.0, 1.0  # standard errors: about 95 % and 68 % of a normal distribution
STRONG, WEAK = 0.7, 0.3  # rank correlations: half of the variance of ranks, and less than a tenth


@dataclass(frozen=True)
class Check:
    statistic: float
    verdict: Verdict


def hunchback(values: np.ndarray, errors: np.ndarray) -> Check:
    """Whether values rise to a maximum between the first and the last layer, and fall after it.

    values, errors: one for each layer, with its standard error. The statistic is the smaller of
    rise and fall in standard errors: supported above 2, not supported below 1.
    """
    values, errors = _layers(values), _layers(errors)
    if not (errors > 0).all():
        raise ValueError(f"standard errors must be positive, not {errors.tolist()}")
    peak = int(values.argmax())
    rise, fall = ((values[peak] - values[end]) / np.hypot(errors[peak], errors[end]) for end in (0, -1))
    return Check(float(min(rise, fall)), _verdict(min(rise, fall), CLEAR, FAINT))


def trend(values: np.ndarray, direction: Literal["rises", "falls"]) -> Check:
    """Whether values rise (or fall) with depth. The statistic is Spearman's correlation with the layer.

    Supported at 0.7 in the direction claimed, not supported below 0.3.
    """
    values = _layers(values)
    statistic = 0.0 if np.ptp(values) == 0 else float(spearmanr(range(len(values)), values).statistic)
    return Check(statistic, _verdict(statistic if direction == "rises" else -statistic, STRONG, WEAK))


def _verdict(statistic: float, clear: float, faint: float) -> Verdict:
    if statistic >= clear:
        return SUPPORTED
    return INCONCLUSIVE if statistic >= faint else NOT_SUPPORTED


def _layers(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) < 3 or not np.isfinite(values).all():
        raise ValueError(f"a claim about depth needs finite values for at least 3 layers, not {values.tolist()}")
    return values
