"""The paper's claims as checks over results.

`CLAIMS` holds, for every claim, what is measured, from where on it counts as supported or as not
supported, and why there. Each was written down before its results were seen, but for some; the page of claims
says which, and where their bounds come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler
from scipy.stats import spearmanr

SUPPORTED, INCONCLUSIVE, NOT_SUPPORTED = "supported", "inconclusive", "not supported"
Verdict = Literal["supported", "inconclusive", "not supported"]
RESAMPLES = 500
COLUMNS = ("claim", "model", "statistic", "low", "high", "verdict")


@dataclass(frozen=True)
class Claim:
    """says: the paper's claim, in our words. supported, refuted: bounds on the statistic; the claim is
    supported from the first on, not supported beyond the second, and inconclusive between."""

    section: str
    says: str
    statistic: str
    supported: float
    refuted: float
    reason: str
    page: str  # chapter and label of its figure

    def verdict(self, value: float) -> Verdict:
        sign = -1 if self.supported < self.refuted else 1  # where they are equal, more is better
        if not np.isfinite(value):
            return INCONCLUSIVE
        if sign * value >= sign * self.supported:
            return SUPPORTED
        return NOT_SUPPORTED if sign * value < sign * self.refuted else INCONCLUSIVE


_RANKS = "Half of the variance of ranks, and less than a tenth"
CLAIMS = {
    "low-dimensional": Claim(
        "3.1", "Heads have fewer dimensions than the room they have",
        "largest N of a layer over the head's width",
        0.6, 0.8, "The largest of the published tables is 0.54", "dimension:fig-dimension-ours",
    ),
    "hunched": Claim(
        "3.1", "The nonlinear dimension rises with depth, and falls again",
        "smaller of N's rise and fall, in standard errors",
        2.0, 1.0, "About 95 % and 68 % of a normal distribution", "dimension:fig-dimension-curves",
    ),
    "linear-rises": Claim(
        "3.1", "The linear dimension rises with depth",
        "Spearman's correlation of L with the layer",
        0.7, 0.3, _RANKS, "dimension:fig-dimension-curves",
    ),
    "ratio-rises": Claim(
        "3.1", "Heads grow more curved: the ratio rises with depth",
        "Spearman's correlation of L/N with the layer",
        0.7, 0.3, _RANKS, "dimension:fig-dimension-curves",
    ),
    "evr1-falls": Claim(
        "3.1", "The first component's share falls with depth",
        "Spearman's correlation of EVR1 with the layer",
        -0.7, -0.3, _RANKS, "dimension:fig-dimension-curves",
    ),
    "evr1-factor": Claim(
        "3.1", "The first component's share falls from a half to a tenth",
        "EVR1 of the first layer over that of the last",
        3.0, 1.5, "The published encoders fall by 3.9 and more; rounded down, and half of that",
        "dimension:fig-dimension-ours",
    ),
    "textspan-is-somp": Claim(
        "A.2", "TextSpan is SOMP with another criterion",
        "share of heads with the same atoms and residual",
        1.0, 1.0, "It is a theorem: one head that differs refutes it, or the code", "pursuit:tab-pursuit-equal",
    ),
    "components-speak": Claim(
        "3.2", "The first component says what the head says",
        "mean signed Z of TextSpan and OMP1, less that of mismatched heads",
        0.5, 0.0, "Half a standard deviation is a medium effect (Cohen); none is none", "semantics:fig-agreement-1",
    ),
    "some-heads-only": Claim(
        "3.2", "In some heads one component tells nearly all, in others it does not",
        "share of heads whose Z is above 95 % of mismatched pairs (0.05 by chance)",
        0.15, 0.05, "Three times chance, and chance", "semantics:fig-agreement-1",
    ),
    "similarity-falls": Claim(
        "3.3", "Heads are less alike across data sets with depth",
        "Spearman's correlation of mean similarity with the layer",
        -0.7, -0.3, _RANKS, "similarity:fig-similarity",
    ),
    "early-alike": Claim(
        "3.3", "Heads of the first layers are almost the same on all data sets",
        "mean similarity in the first quarter of layers",
        0.8, 0.6, "A similarity of 0.8 leaves a third of the squared spectrum unmatched", "similarity:fig-similarity",
    ),
    "late-differ": Claim(
        "3.3", "Heads of the last layers are not",
        "mean similarity in the first quarter less that in the last",
        0.2, 0.05, "A fifth of the scale, and the size of the sampling error", "similarity:fig-similarity",
    ),
    "order-agrees": Claim(
        "3.3", "Data sets come in the same order in every encoder",
        "mean Pearson correlation with the other encoders",
        0.9, 0.7, "The lowest published correlation is 0.91; half of the variance", "similarity:fig-correlation",
    ),
    "few-stand-out": Claim(
        "3.3", "In late layers a few heads stand out on each data set",
        "heads of the last quarter, per data set, above the median by over twice the scaled median deviation",
        1.0, 0.5, "At least one a data set, and one in every other", "similarity:fig-similarity",
    ),
    "shared-first": Claim(
        "3.3", "Data sets that share classes with the reference come first",
        "share of pairs in which a set with the reference's classes is above one without",
        0.9, 0.7, "One pair in ten may be wrong; chance is a half", "similarity:tab-order",
    ),
    "pair-alike": Claim(
        "3.3", "Data sets of one structure and content have the same profile across heads",
        "Pearson correlation, over heads, of the similarities of the sets in the roles of CIFAR-10 and CIFAR-100",
        0.9, 0.7, "The paper calls them almost identical; half of the variance", "similarity:fig-similarity",
    ),
    "written-numbers": Claim(
        "3.3", "Sets of written numbers share a head that stands out",
        "heads of the last quarter that stand out both on the set in the role of MNIST and of SVHN",
        1.0, 1.0, "There is one, or there is not", "similarity:fig-similarity",
    ),
    "chosen-keep": Claim(
        "4.1", "A twentieth of the heads, chosen without labels, does nearly what the model does",
        "lower of the mean accuracies of U and U|T, over that of B",
        0.9, 0.7, "The published means of five encoders are 0.90 and more", "selection:tab-selection",
    ),
    "chance-does-not": Claim(
        "4.1", "As many heads taken at random do not",
        "mean accuracy of U less that of R",
        0.2, 0.05, "The published means differ by 0.30 and more", "selection:tab-selection",
    ),
    "heads-carry": Claim(
        "4.1", "Most of the alignment comes from heads, about nine tenths",
        "mean accuracy of H over that of B",
        0.8, 0.6, "The lowest published mean is 0.80 of B's", "selection:tab-selection",
    ),
    "optimised-best": Claim(
        "4.1", "With optimised weights, heads alone beat the whole model",
        "mean accuracy of O less that of B",
        0.05, 0.0, "The smallest published gain is 0.10, halved", "selection:tab-selection",
    ),
    "most-where-low": Claim(
        "4.1", "They gain most where the model is poor",
        "Spearman's correlation, over tasks, of O less B with B",
        -0.7, -0.3, _RANKS, "selection:tab-selection",
    ),
    "rd-like-lin": Claim(
        "4.2", "RD is as good as a linear map of the output",
        "mean accuracy of RD less that of Lin",
        -0.01, -0.03, "The published means differ by -0.01 to 0.02", "alignment:tab-alignment",
    ),
    "rd-star-close": Claim(
        "4.2", "RD* does nearly what RD does",
        "mean accuracy of RD* less that of RD",
        -0.02, -0.05, "The published means differ by -0.02 at most", "alignment:tab-alignment",
    ),
    "rd-star-small": Claim(
        "4.2", "with a third of its parameters",
        "parameters of RD* over those of RD",
        0.4, 0.6, "The published ones are from 0.27 to 0.33", "alignment:tab-alignment",
    ),
    "output-is-less": Claim(
        "4.2", "Scaling the components of the output does less",
        "mean accuracy of RD less that of RD_Y",
        0.05, 0.0, "The smallest published gap is 0.07", "alignment:tab-alignment",
    ),
    "rd-harmless": Claim(
        "4.2", "Where the model is good already, RD does no harm",
        "smallest of RD less B, of the tasks where B is 0.7 or more",
        -0.02, -0.05, "Two standard errors of 1,000 images are 0.03", "alignment:tab-alignment",
    ),
    "lin-near-tuned": Claim(
        "4.2", "A linear map of the output does nearly what fine-tuning does",
        "mean accuracy of fine-tuning less that of Lin, where this run fine-tuned",
        0.05, 0.1, "Our reading of the paper's Fig. 5; it gives no numbers", "alignment:fig-radar",
    ),
    "needs-carriers": Claim(
        "5", "Where no unit carries the task, RD fails",
        "accuracy of RD on a task of two equal classes that depend on two factors' parity, less a half",
        0.1, 0.2, "Two standard errors above chance, thrice; and one class in five won", "alignment:tab-parity",
    ),
}  # fmt: skip


def check(claim: str, model: str, value: float, interval: tuple[float, float] = (np.nan, np.nan)) -> pd.DataFrame:
    """One row of the table of claims, COLUMNS. interval: of 95 %, by bootstrap where there is one."""
    row = (claim, model, float(value), *interval, CLAIMS[claim].verdict(float(value)))
    return pd.DataFrame([row], columns=list(COLUMNS))


def claim_table(rows: pd.DataFrame) -> Styler:
    """Rows of `check` as a reader sees them: the claim in words, the interval in brackets."""
    rows = rows.reset_index(drop=True)
    bounds = zip(rows["low"], rows["high"], strict=True)
    shown = pd.DataFrame({
        "model": rows["model"], "claim": [CLAIMS[c].says for c in rows["claim"]],
        "measured": [CLAIMS[c].statistic for c in rows["claim"]], "value": rows["statistic"].map("{:.2f}".format),
        "95 %": [f"{low:.2f} to {high:.2f}" if np.isfinite(low) else "" for low, high in bounds],
        "verdict": rows["verdict"],
    })  # fmt: skip
    return shown.style.hide(axis="index").set_properties(**{"white-space": "normal"})


def verdict_grid(rows: pd.DataFrame) -> Styler:
    """Claims in rows and encoders in columns: the verdict (yes, ? or no), and the statistic."""
    signs = {SUPPORTED: "yes", INCONCLUSIVE: "?", NOT_SUPPORTED: "no"}
    cells = rows.assign(cell=[f"{signs[v]} {s:.2f}" for v, s in zip(rows["verdict"], rows["statistic"], strict=True)])
    grid = cells.pivot(index="claim", columns="model", values="cell").reindex(
        [claim for claim in CLAIMS if claim in set(rows["claim"])], columns=list(dict.fromkeys(rows["model"]))
    )
    grid.index = [f"{CLAIMS[claim].section}: {CLAIMS[claim].says}" for claim in grid.index]
    colours = {"yes": "#cfe3f3", "?": "#eeeeee", "no": "#f6dfc4", "": "none"}
    shown = grid.rename_axis(columns=None).fillna("").style
    return shown.map(lambda cell: f"background: {colours[cell.partition(' ')[0]]}; color: black")


def bootstrap(
    statistic: Callable[[np.ndarray], float], heads: np.ndarray, *, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """A statistic of heads, and its percentile interval of 95 % from drawing each layer's heads anew.

    heads: [l h], or [l h s] with all that belongs to a head in its last axes. Source: Efron (1979).
    """
    heads = _depth(heads)
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES):
        columns = generator.integers(heads.shape[1], size=heads.shape[:2])
        drawn.append(statistic(heads[np.arange(len(heads))[:, None], columns]))
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(statistic(heads)), (float(low), float(high))


def bootstrap_rows(
    statistic: Callable[[pd.DataFrame], float], table: pd.DataFrame, *, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """A statistic of a table, and its percentile interval of 95 % from drawing the rows anew; NaN below three rows."""
    if len(table) < 3:
        return float(statistic(table)), (float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    rows = generator.integers(len(table), size=(RESAMPLES, len(table)))
    low, high = np.nanpercentile([statistic(table.iloc[drawn]) for drawn in rows], [2.5, 97.5])
    return float(statistic(table)), (float(low), float(high))


def hunchback(heads: np.ndarray) -> float:
    """The smaller of the rise to the maximum and the fall after it, of layer means of [l h], in standard errors."""
    heads = _depth(heads)
    values, errors = heads.mean(1), heads.std(1, ddof=1) / heads.shape[1] ** 0.5
    peak = int(values.argmax())
    gaps = [(values[peak] - values[end], np.hypot(errors[peak], errors[end])) for end in (0, -1)]
    return float(min(gap / error if error > 0 else 0.0 for gap, error in gaps))


def trend(heads: np.ndarray) -> float:
    """Spearman's correlation of layer means with depth; heads: [l] or [l h]. Zero where nothing changes."""
    values = _depth(heads)
    values = values.reshape(len(values), -1).mean(1)
    return 0.0 if np.ptp(values) == 0 else float(spearmanr(range(len(values)), values).statistic)


def _depth(heads: np.ndarray) -> np.ndarray:
    heads = np.asarray(heads, dtype=float)
    if heads.ndim < 1 or len(heads) < 3 or not np.isfinite(heads).all():
        raise ValueError(f"a claim about depth needs finite values for at least 3 layers, not {heads.tolist()}")
    return heads
