"""The paper's claims, from claims.yml, and their verdicts over results."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import yaml
from pandas.io.formats.style import Styler
from pydantic import BaseModel, ConfigDict

from edition.tables import styled

SUPPORTED, INCONCLUSIVE, NOT_SUPPORTED = "supported", "inconclusive", "not supported"
OUTCOMES = {"holds": SUPPORTED, "fails": NOT_SUPPORTED}
Verdict = Literal["supported", "inconclusive", "not supported"]
Interval = tuple[float, float]  # of 95 %
UNKNOWN = (float("nan"), float("nan"))
RESAMPLES = 500
BY_TASK: dict[str, Callable[[pd.DataFrame], float]] = {  # of accuracies, tasks in rows and methods in columns
    "chosen-keep": lambda t: min(t["U"].mean(), t["U|T"].mean()) / t["B"].mean(),
    "chance-does-not": lambda t: (t["U"] - t["R"]).mean(),
    "heads-carry": lambda t: t["H"].mean() / t["B"].mean(),
    "optimised-best": lambda t: (t["O"] - t["B"]).mean(),
    "most-where-low": lambda t: rank_correlation(t["O"] - t["B"], t["B"]),
    "rd-like-lin": lambda t: (t["RD"] - t["Lin"]).mean(),
    "rd-star-close": lambda t: (t["RD*"] - t["RD"]).mean(),
    "output-is-less": lambda t: (t["RD"] - t["RD_Y"]).mean(),
    "rd-near-tuned": lambda t: (t["FT"] - t["RD"]).median(),
    "lin-near-tuned": lambda t: (t["FT"] - t["Lin"]).median(),
}
COLUMNS = ("claim", "model", "statistic", "low", "high", "share", "verdict")


class Claim(BaseModel):
    """See claims.yml."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    section: str
    claim: str
    quote: str
    measured: str
    better: Literal["higher", "lower"]
    supported: float
    refuted: float
    because: str
    figure: str
    headline: bool = False
    largest_share: float = float("inf")

    def verdict(self, value: float, interval: Interval = UNKNOWN, share: float = float("nan")) -> Verdict:
        """Of a statistic, and of its interval if there is one: all of it must be on one side of the bound.

        share: of parameters with which it is reached; above `largest_share` the claim fails.
        """
        sign = 1 if self.better == "higher" else -1
        if share > self.largest_share:
            return NOT_SUPPORTED
        if not np.isfinite(value):
            return INCONCLUSIVE
        ends = [sign * end for end in (value, *interval) if np.isfinite(end)]
        if min(ends) >= sign * self.supported:
            return SUPPORTED
        return NOT_SUPPORTED if max(ends) < sign * self.refuted else INCONCLUSIVE


@functools.cache
def claims() -> dict[str, Claim]:
    """All claims, in the paper's order."""
    entries = yaml.safe_load(Path(__file__).with_suffix(".yml").read_text())
    return {name: Claim(**entry) for name, entry in entries.items()}


def check(
    claim: str, model: str, value: float, interval: Interval = UNKNOWN, share: float = float("nan")
) -> pd.DataFrame:
    """One row of the table of claims, COLUMNS; see `Claim.verdict`."""
    row = (claim, model, float(value), *interval, share, claims()[claim].verdict(float(value), interval, share))
    return pd.DataFrame([row], columns=list(COLUMNS))


def claim_table(rows: pd.DataFrame) -> Styler:
    """Rows of `check` as a reader sees them: the claim in words, the interval in brackets."""
    rows = rows.reset_index(drop=True)
    bounds = zip(rows["low"], rows["high"], strict=True)
    shown = pd.DataFrame({
        "model": rows["model"], "claim": [claims()[c].claim for c in rows["claim"]],
        "measured": [claims()[c].measured for c in rows["claim"]],
        "value": [f"{v:.2f}{_with_share([s])}" for v, s in zip(rows["statistic"], rows["share"], strict=True)],
        "95 %": [f"{low:.2f} to {high:.2f}" if np.isfinite(low) else "" for low, high in bounds],
        "verdict": rows["verdict"],
    })  # fmt: skip
    return styled(shown, index=False, wrap=True)


def found(rows: pd.DataFrame) -> str:
    """What rows of `check` say of trained encoders, beside random weights, in Markdown: a line for each claim."""
    is_random = rows["model"].str.endswith("@random")
    trained, untrained = rows[~is_random], rows[is_random]
    lines = []
    for name, of_claim in trained.groupby("claim", sort=False):
        claim, supported = claims()[name], int((of_claim["verdict"] == SUPPORTED).sum())
        refuted = int((of_claim["verdict"] == NOT_SUPPORTED).sum())
        values = _range(of_claim["statistic"]) + _with_share(of_claim["share"])
        if control := _range(untrained.loc[untrained["claim"] == name, "statistic"]):
            values += f"; with random weights: {control}"
        counts = f"**supported by {supported} of {len(of_claim)}**"
        if open_ := len(of_claim) - supported - refuted:
            counts += f", undecided for {open_}"
        lines.append(f"- {claim.claim} ({claim.measured}: {values}): {counts}.")
    return "\n".join(lines)


def verdict_grid(rows: pd.DataFrame) -> Styler:
    """Claims in rows and encoders in columns: the verdict (yes, ? or no), and the statistic."""
    signs = {SUPPORTED: "yes", INCONCLUSIVE: "?", NOT_SUPPORTED: "no"}
    cells = rows.assign(cell=[f"{signs[v]} {s:.2f}" for v, s in zip(rows["verdict"], rows["statistic"], strict=True)])
    grid = cells.pivot(index="claim", columns="model", values="cell").reindex(
        [claim for claim in claims() if claim in set(rows["claim"])], columns=list(dict.fromkeys(rows["model"]))
    )
    grid.index = [f"{claims()[claim].section}: {claims()[claim].claim}" for claim in grid.index]
    colours = {"yes": "#cfe3f3", "?": "#eeeeee", "no": "#f6dfc4", "": "none"}
    shown = styled(grid.rename_axis(columns=None).fillna(""))
    return shown.map(lambda cell: f"background: {colours[cell.partition(' ')[0]]}; color: black")


def published_statistics(tables: Callable[[str], pd.DataFrame]) -> dict[str, tuple[float, float]]:
    """The claims' statistics of the paper's own encoders, from its tables: the smallest and the largest of them.

    tables: `edition.results.published`. Some claims have no published table to compute them from.
    """
    values = _published_dimensions(tables("intrinsic_dimension").query("figure == 'fig2'")) | _published_accuracies(
        tables("unit_selection").rename(columns={"strategy": "method"}), tables("alignment")
    )
    svhn = tables("alignment").query("dataset == 'SVHN'").pivot(index="model", columns="method", values="accuracy")
    values["svhn-advantage"] = list(svhn["RD"] - svhn["Lin"])
    pairs = tables("encoder_correlation").query("model_a != model_b")
    values["order-agrees"] = list(pairs.groupby("model_a")["pearson"].mean())
    return {claim: (min(of_models), max(of_models)) for claim, of_models in values.items() if of_models}


def _published_accuracies(selection: pd.DataFrame, alignment: pd.DataFrame) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {claim: [] for claim in BY_TASK}
    rows = pd.concat([selection, alignment]).query("dataset != 'Average'")
    for _, of_model in rows.groupby("model"):
        table = of_model.pivot_table("accuracy", "dataset", "method", aggfunc="first")
        for claim, statistic in BY_TASK.items():
            with contextlib.suppress(KeyError):  # not every table has every method
                values[claim].append(float(statistic(table)))
    return values


def _published_dimensions(dimensions: pd.DataFrame) -> dict[str, list[float]]:
    """Heads are 64 wide."""
    measures = {
        "low-dimensional": lambda layers: layers["twonn_id"].max() / 64,
        "linear-rises": lambda layers: trend(layers["linear_id"].to_numpy()),
        "ratio-rises": lambda layers: trend(layers["ratio"].to_numpy()),
        "evr1-falls": lambda layers: trend(layers["evr1"].to_numpy()),
        "evr1-factor": lambda layers: layers["evr1"].iloc[0] / layers["evr1"].iloc[-1],
    }
    by_model = [layers.sort_values("layer") for _, layers in dimensions.groupby("model")]
    return {claim: [float(measure(layers)) for layers in by_model] for claim, measure in measures.items()}


def answers(rows: pd.DataFrame, published: dict[str, tuple[float, float]]) -> pd.DataFrame:
    """A row for each claim: what the paper's encoders, those with real weights, mini ones and random weights show.

    A claim that any random weights support is no evidence that training, or the paper, is right: `holds` is then "no
    evidence". Otherwise it says how many of the trained encoders support it. `outcome` is "holds" or "fails" where more
    than half of them say so, "undecided", or "no evidence".
    """
    kinds = np.select(
        [rows["model"].str.endswith("@random"), rows["model"].str.startswith("mini-")], ["random", "mini"], "real"
    )
    table = []
    for name, claim in claims().items():
        of_kind = {kind: rows[(rows["claim"] == name) & (kinds == kind)] for kind in ("real", "mini", "random")}
        if all(part.empty for part in of_kind.values()):
            continue
        trained = pd.concat([of_kind["real"], of_kind["mini"]])
        by_chance = (of_kind["random"]["verdict"] == SUPPORTED).any()
        holds = f"{(trained['verdict'] == SUPPORTED).sum()} of {len(trained)}"
        shown = {"section": claim.section, "claim": claim.claim, "the paper": _range(published.get(name, ()))}
        titles = {"real": "real weights", "mini": "mini encoders", "random": "random weights"}
        for kind, title in titles.items():
            shown[title] = _range(of_kind[kind]["statistic"]) + _with_share(of_kind[kind]["share"])
        shares = {word: (trained["verdict"] == verdict).mean() for word, verdict in OUTCOMES.items()}
        outcome = next((word for word, share in shares.items() if share > 0.5), "undecided")
        last = {"holds": holds, "outcome": outcome}
        table.append(shown | (dict.fromkeys(last, "no evidence") if by_chance else last))
    return pd.DataFrame(table)


def _range(values: Iterable[float]) -> str:
    values = [value for value in values if np.isfinite(value)]
    if not values:
        return ""
    low, high = (f"{end + 0.0 if abs(end) >= 0.005 else 0.0:.2f}" for end in (min(values), max(values)))  # no -0.00
    return low if low == high else f"{low} to {high}"


def _with_share(shares: Iterable[float]) -> str:
    share = _range(shares)
    return f", with {share} of the parameters" if share else ""


def bootstrap(statistic: Callable[[np.ndarray], float], heads: np.ndarray, *, seed: int = 0) -> tuple[float, Interval]:
    """A statistic of heads, and its percentile interval of 95 % from resampling each layer's heads.

    heads: [l h], or [l h s] with what belongs to one head in the last axes. Source: Efron (1979).
    """
    heads = _by_depth(heads)
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES):
        columns = generator.integers(heads.shape[1], size=heads.shape[:2])
        drawn.append(statistic(heads[np.arange(len(heads))[:, None], columns]))
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(statistic(heads)), (float(low), float(high))


def bootstrap_rows(
    statistic: Callable[[pd.DataFrame], float], table: pd.DataFrame, *, seed: int = 0
) -> tuple[float, Interval]:
    """A statistic of a table, and its percentile interval of 95 % from resampling the rows, if there are three."""
    if len(table) < 3:
        return float(statistic(table)), UNKNOWN
    generator = np.random.default_rng(seed)
    rows = generator.integers(len(table), size=(RESAMPLES, len(table)))
    low, high = np.nanpercentile([statistic(table.iloc[drawn]) for drawn in rows], [2.5, 97.5])
    return float(statistic(table)), (float(low), float(high))


def jackknife(statistic: Callable[[np.ndarray], float], count: int, *, groups: int = 20) -> float:
    """Standard error of a statistic of the rows that are kept of `count`: one group at a time is left out."""
    rows = np.arange(count)
    values = np.array([statistic(rows[rows % groups != group]) for group in range(groups)])
    return float(((groups - 1) * values.var()) ** 0.5)


def hunchback(heads: np.ndarray) -> float:
    """The smaller of the rise to the maximum and the fall after it, of layer means of [l h], in standard errors."""
    heads = _by_depth(heads)
    values, errors = heads.mean(1), heads.std(1, ddof=1) / heads.shape[1] ** 0.5
    peak = int(values.argmax())
    gaps = [(values[peak] - values[end], np.hypot(errors[peak], errors[end])) for end in (0, -1)]
    return float(min(gap / error if error > 0 else 0.0 for gap, error in gaps))


def trend(heads: np.ndarray) -> float:
    """Spearman's correlation of layer means with depth; heads: [l] or [l h]. Zero where nothing changes."""
    values = _by_depth(heads)
    values = values.reshape(len(values), -1).mean(1)
    return 0.0 if np.ptp(values) == 0 else rank_correlation(np.arange(len(values)), values)


def rank_correlation(a: np.ndarray | pd.Series, b: np.ndarray | pd.Series) -> float:
    """Spearman's, as SciPy computes it but without its test, which takes most of the time; NaN for a constant."""
    from scipy.stats import rankdata  # takes a second to import

    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def _by_depth(heads: np.ndarray) -> np.ndarray:
    heads = np.asarray(heads, dtype=float)
    if heads.ndim < 1 or len(heads) < 3 or not np.isfinite(heads).all():
        raise ValueError(f"a claim about depth needs finite values for at least 3 layers, not {heads.tolist()}")
    return heads


def quarter(layers: int) -> int:
    """Layers in a quarter, at least one."""
    return max(1, layers // 4)


def standing_out(heads: np.ndarray) -> np.ndarray:
    """Which heads [h s] exceed the median of their column by over twice its scaled median deviation."""
    centred = heads - np.median(heads, 0)
    spread = 1.4826 * np.median(abs(centred), 0)  # a standard deviation, if they were normal
    return centred > 2 * spread
