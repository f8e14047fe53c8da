"""The authors' code where it differs from the paper's text, or speaks where the text is silent: how it trains.

What it computes otherwise is beside what the text says, under `reading="code"`: U and U|T in `selection`. Its maps of
RD and RD_Y are computed on the page *Text and code*.
"""

from __future__ import annotations

from typing import Any

from residual.alignment import LinearAligner, ResiDual
from residual.training import FineTuned, Schedule

RATES = {"RD": 0.8, "RD*": 0.8, "O": 0.8, "RD_Y": 1e-3}  # of ResiDual, by the kind of its bases
LINEAR_RATE, TUNING_RATE = 1e-3, 1e-5
DIMENSION_SHARE = 5 / 8  # of the images that L and N are estimated from: 50,000 of 80,000


def training_options(aligner: LinearAligner | ResiDual | FineTuned, logit_scale: float, reading: str) -> dict[str, Any]:
    """Options of `fit` for an aligner.

    "text": cosines times the logit scale, a rate that is searched for, a warm-up. "code", its first release: inner
    products, fixed rates, no warm-up; fine-tuning in batches of 128 with gradients clipped at 1.
    """
    if reading == "text":
        return {"scale": logit_scale}
    if isinstance(aligner, FineTuned):
        return {"scale": None, "rate": TUNING_RATE, "schedule": Schedule(batch=128, warmup=0, clip=1.0)}
    rate = LINEAR_RATE if isinstance(aligner, LinearAligner) else RATES[aligner.bases.kind]
    return {"scale": None, "rate": rate, "schedule": Schedule(warmup=0)}


def start(reading: str) -> str:
    """Where the aligners of a reading start; see `ResiDual`."""
    return "neutral" if reading == "text" else "random"
