"""The paper's claims, from claims.yml, and one rule that judges them by results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import yaml
from pandas.io.formats.style import Styler
from pydantic import BaseModel, ConfigDict

from edition.tables import styled

if TYPE_CHECKING:
    from torch import Tensor

HOLDS, FAILS, UNDECIDED, ANY, UNTESTABLE = (
    "holds", "fails", "undecided", "true of any such architecture", "untestable here",
)  # fmt: skip
OUTCOMES = (HOLDS, ANY, UNDECIDED, FAILS, UNTESTABLE)
ALONE = "without a control"  # the reason beside an outcome that none could change
RESAMPLES = 1000
NAN = float("nan")
Accuracies = dict[str, np.ndarray]  # of each method, and "chance": [... t], tasks last
BY_TASK: dict[str, Callable[[Accuracies], np.ndarray | np.floating]] = {
    "chosen-keep": lambda a: np.minimum(*(_gain(a, m).sum(-1) for m in ("U", "U|T"))) / _gain(a, "B").sum(-1),
    "chance-does-not": lambda a: (a["U"] - a["R"]).mean(-1),
    "heads-carry": lambda a: _gain(a, "H").sum(-1) / _gain(a, "B").sum(-1),
    "optimised-best": lambda a: (a["O"] - a["B"]).mean(-1),
    "most-where-low": lambda a: rank_correlation(a["O"] - a["B"], a["B"]),
    "rd-like-lin": lambda a: (a["RD"] - a["Lin"]).mean(-1),
    "rd-star-close": lambda a: (a["RD*"] - a["RD"]).mean(-1),
    "output-is-less": lambda a: (a["RD"] - a["RD_Y"]).mean(-1),
    "rd-harmless": lambda a: (a["RD"] - a["B"]).mean(-1),
    "svhn-advantage": lambda a: (a["RD"] - a["Lin"]).mean(-1),
    "rd-near-tuned": lambda a: (a["FT"] - a["RD"]).mean(-1),
    "lin-near-tuned": lambda a: (a["FT"] - a["Lin"]).mean(-1),
}


class Claim(BaseModel):
    """See claims.yml."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    section: str
    claim: str
    quote: str
    measured: str
    better: Literal["higher", "lower"]
    bound: float
    none: float
    because: str
    figure: str
    earlier: str
    headline: bool = False
    largest_share: float = float("inf")

    def reaches(self, value: float, interval: Sequence[float]) -> bool:
        """Whether a value is on the claim's side of the bound, and its whole interval on that side of `none`."""
        sign = 1 if self.better == "higher" else -1
        worst = np.nanmin(sign * np.array([value, *interval]))
        return bool(sign * value >= sign * self.bound and worst >= sign * self.none)

    def misses(self, value: float, interval: Sequence[float]) -> bool:
        """Whether the whole interval, or a value without one, is on the other side of the bound."""
        sign = 1 if self.better == "higher" else -1
        return bool(np.nanmax(sign * np.array([value, *interval])) < sign * self.bound)


class Estimate(NamedTuple):
    """A statistic, and its values when what it was computed from is resampled; none where that cannot be."""

    value: float
    draws: np.ndarray = np.empty(0)

    def interval(self) -> tuple[float, float]:
        """The percentile interval of 95 %, corrected for bias, with the value in it; NaN without draws.

        The correction is at most half a deviation: the full one covers the truth of noisy trends less often.
        Source: Efron (1981).
        """
        draws = self.draws[np.isfinite(self.draws)]
        if not len(draws):
            return NAN, NAN
        from scipy.stats import norm  # takes a second to import

        below = ((draws < self.value).mean() + (draws <= self.value).mean()) / 2
        shift = 2 * np.clip(norm.ppf(below), -0.5, 0.5)
        low, high = np.quantile(draws, norm.cdf(shift + norm.ppf([0.025, 0.975])))
        return float(min(low, self.value)), float(max(high, self.value))

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference; draws are paired where both were resampled in the same way."""
        both = len(self.draws) and len(other.draws)
        return Estimate(self.value - other.value, self.draws - other.draws if both else np.empty(0))


@functools.cache
def claims() -> dict[str, Claim]:
    """All claims, in the paper's order."""
    entries = yaml.safe_load(Path(__file__).with_suffix(".yml").read_text())
    return {name: Claim(**entry) for name, entry in entries.items()}


def check(
    claim: str,
    model: str,
    estimate: Estimate | float = NAN,
    control: Estimate | None = None,
    *,
    share: float = NAN,
    untestable: str = "",
) -> dict[str, Any]:
    """A row of the table of claims: the statistic of an encoder beside its matched control's, and the outcome.

    share: of the parameters with which it is reached; above the claim's `largest_share` it fails. untestable: why the
    claim cannot be tested on this encoder. The rule is stated on the page *Does it hold?*.
    """
    rule, own = claims()[claim], estimate if isinstance(estimate, Estimate) else Estimate(float(estimate))
    interval = own.interval()
    row = {"claim": claim, "model": model, "statistic": float(own.value), "low": interval[0], "high": interval[1]}
    row |= dict.fromkeys(("control", "control_low", "control_high", "excess_low", "excess_high"), NAN)
    row |= {"share": share, "reason": untestable}
    if control is not None:
        row["control"], (row["control_low"], row["control_high"]) = float(control.value), control.interval()
        row["excess_low"], row["excess_high"] = excess = (own - control).interval()
    if untestable or not np.isfinite(own.value):
        return row | {"outcome": UNTESTABLE, "reason": untestable or "it cannot be computed"}
    if rule.misses(own.value, interval) or share > rule.largest_share:
        return row | {"outcome": FAILS}
    if not rule.reaches(own.value, interval):
        return row | {"outcome": UNDECIDED}
    if control is None or not np.isfinite(control.value):
        return row | {"outcome": HOLDS, "reason": ALONE}
    if rule.reaches(control.value, (row["control_low"], row["control_high"])):
        return row | {"outcome": ANY}
    apart = min(excess) > 0 if rule.better == "higher" else max(excess) < 0
    return row | {"outcome": HOLDS if apart or not np.isfinite(excess).all() else UNDECIDED}


def judged(estimates: dict[str, dict[str, Estimate]], **more: dict[tuple[str, str], Any]) -> pd.DataFrame:
    """Rows of `check` of every trained encoder: each claim's estimates by encoder, controls among them.

    more: arguments of `check`, each by claim and encoder.
    """
    rows = []
    for claim, by_model in estimates.items():
        for model in (name for name in by_model if not name.endswith("@random")):
            control = by_model.get(f"{model}@random")
            options = {name: values[claim, model] for name, values in more.items() if (claim, model) in values}
            rows.append(check(claim, model, by_model[model], control, **options))
    return pd.DataFrame(rows)


def claim_table(rows: pd.DataFrame) -> Styler:
    """Rows of `check` as a reader sees them, by claim, with its bound; intervals of 95 % are in brackets."""
    shown = []
    for name, part in rows.groupby("claim", sort=False):
        claim = claims()[name]
        than = "at least" if claim.better == "higher" else "at most"
        reasons = "".join(f". {reason[0].upper()}{reason[1:]}" for reason in dict.fromkeys(part["reason"]) if reason)
        for row in part.to_dict("records"):
            excess = row["statistic"] - row["control"], row["excess_low"], row["excess_high"]
            value = _with_interval(row["statistic"], row["low"], row["high"]) + _with_share([row["share"]])
            shown.append({
                "claim": f"{claim.claim} ({claim.measured}, {than} {claim.bound:g}){reasons}", "encoder": row["model"],
                "value": value, "random weights": _number(row["control"]), "difference": _with_interval(*excess),
                "outcome": row["outcome"],
            })  # fmt: skip
    return styled(pd.DataFrame(shown).set_index(["claim", "encoder"]), wrap=True)


def found(rows: pd.DataFrame) -> str:
    """What rows of `check` say, in Markdown: a line for each claim, with how many encoders have each outcome."""
    lines = []
    for name, part in rows.groupby("claim", sort=False):
        claim = claims()[name]
        values = span(part["statistic"]) + _with_share(part["share"])
        if control := span(part["control"]):
            values += f"; with random weights: {control}"
        outcome = part["outcome"].where(part["reason"] != ALONE, f"{HOLDS} {ALONE}")
        counts, words = outcome.value_counts(), (OUTCOMES[0], f"{HOLDS} {ALONE}", *OUTCOMES[1:])
        said = ", ".join(f"**{word}** for {counts[word]} of {len(part)}" for word in words if word in counts)
        reasons = "; ".join(dict.fromkeys(part.loc[part["outcome"] == UNTESTABLE, "reason"]))
        measured = f"{claim.measured}: {values}" if values else claim.measured
        lines.append(f"- {claim.claim} ({measured}): {said}{f' ({reasons})' if reasons else ''}.")
    return "\n".join(lines)


def span(values: Iterable[float]) -> str:
    """The smallest and the largest of some values, or one where they are equal; "" where there is none."""
    values = [value for value in values if np.isfinite(value)]
    ends = [_number(min(values)), _number(max(values))] if values else []
    return " to ".join(dict.fromkeys(ends))


def _number(value: float) -> str:
    return f"{value if abs(value) >= 0.005 else 0.0:.2f}" if np.isfinite(value) else ""


def _with_interval(value: float, low: float, high: float) -> str:
    return _number(value) + (f" ({_number(low)} to {_number(high)})" if np.isfinite(low) else "")


def _with_share(shares: Iterable[float]) -> str:
    share = span(shares)
    return f", with {share} of the parameters" if share else ""


def by_heads(statistic: Callable[[np.ndarray], float], heads: np.ndarray, *, seed: int = 0) -> Estimate:
    """A statistic of heads, each layer's heads resampled. heads: [l h], or [l h s] with a head's own in the last axes.

    Source: Efron (1979).
    """
    heads = _by_depth(heads)
    generator = np.random.default_rng(seed)
    drawn = generator.integers(heads.shape[1], size=(RESAMPLES, *heads.shape[:2]))
    layers = np.arange(len(heads))[:, None]
    return Estimate(float(statistic(heads)), np.array([statistic(heads[layers, columns]) for columns in drawn]))


def by_tasks(
    statistic: Callable[[Accuracies], np.ndarray | np.floating],
    tasks: Sequence[dict[str, np.ndarray | float]],
    *,
    seed: int = 0,
) -> Estimate:
    """A statistic of accuracies, with tasks, their test images and trainings resampled, in this order.

    tasks: of each, by method, whether every test image is right in every training [s n]; where that is not known, the
    accuracy of every training [s], whose images are resampled apart; a number, such as "chance", is kept.
    The same seed resamples another encoder's results on the same tasks in the same way. Below three tasks, they are
    kept, and images and trainings alone are resampled; where there is nothing to resample, there are no draws.
    """
    generator = np.random.default_rng(seed)
    drawn = {method: np.empty((RESAMPLES, len(tasks))) for method in tasks[0]}
    whole = {method: np.array([np.mean(task[method]) for task in tasks]) for method in drawn}
    for place, task in enumerate(tasks):
        count = next((right.shape[1] for right in task.values() if np.ndim(right) == 2), 1)
        images = generator.multinomial(count, np.full(count, 1 / count), RESAMPLES)
        for method, right in task.items():
            if np.ndim(right) == 0:
                drawn[method][:, place] = right
                continue
            trainings = generator.multinomial(len(right), np.full(len(right), 1 / len(right)), RESAMPLES)
            apart = right.ndim == 1
            found = generator.binomial(count, right, (RESAMPLES, len(right))) if apart else images @ right.T
            drawn[method][:, place] = (found * trainings).sum(1) / (len(right) * count)
    if len(tasks) >= 3:
        chosen = generator.integers(len(tasks), size=(RESAMPLES, len(tasks)))
        drawn = {method: np.take_along_axis(values, chosen, 1) for method, values in drawn.items()}
    fixed = len(tasks) < 3 and all(np.ndim(right) == 0 for task in tasks for right in task.values())
    with np.errstate(divide="ignore", invalid="ignore"):
        return Estimate(float(statistic(whole)), np.empty(0) if fixed else np.asarray(statistic(drawn)))


def hit_letters(right: Tensor) -> list[str]:
    """Which images are right, of [n] or [s n]: a text for each training, with "y" or "n" for each image."""
    return ["".join("ny"[hit] for hit in training) for training in right.int().reshape(-1, right.shape[-1]).tolist()]


def hunchback(heads: np.ndarray) -> float:
    """The smaller of the rise of layer means to their maximum and the fall after it, over the maximum; [l] or [l h]."""
    values = _by_depth(heads)
    values = values.reshape(len(values), -1).mean(1)
    return float((values.max() - max(values[0], values[-1])) / values.max())


def trend(heads: np.ndarray) -> float:
    """Spearman's correlation of layer means with depth; heads: [l] or [l h]. Zero where nothing changes."""
    values = _by_depth(heads)
    values = values.reshape(len(values), -1).mean(1)
    return 0.0 if np.ptp(values) == 0 else float(rank_correlation(np.arange(len(values)), values))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray | np.floating:
    """Spearman's, along the last axis; NaN for a constant. SciPy's takes no batches, and tests each."""
    from scipy.stats import rankdata  # takes a second to import

    a, b = (rankdata(part, axis=-1) for part in (a, b))
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


def _gain(accuracies: Accuracies, method: str) -> np.ndarray:
    """Over chance."""
    return accuracies[method] - accuracies["chance"]


def _by_depth(heads: np.ndarray) -> np.ndarray:
    heads = np.asarray(heads, dtype=float)
    if heads.ndim < 1 or len(heads) < 3 or not np.isfinite(heads).all():
        raise ValueError(f"a claim about depth needs finite values for at least 3 layers, not {heads.tolist()}")
    return heads


def quarter(layers: int) -> int:
    """Layers in a quarter, at least one."""
    return max(1, layers // 4)


def standing_out(heads: np.ndarray) -> np.ndarray:
    """Which heads [h s] differ from their column's median, either way, by over twice its scaled median deviation."""
    centred = abs(heads - np.median(heads, 0))
    return centred > 2 * 1.4826 * np.median(centred, 0)  # scaled to a standard deviation, were they normal
