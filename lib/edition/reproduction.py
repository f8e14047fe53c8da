"""Ours beside theirs: cells of the paper's tables that this run has too, with a verdict for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from IPython.display import Markdown
from pandas.io.formats.style import Styler

from residual.catalogue import catalogue

# By how much a cell may differ, absolute and relative, beside two standard errors of ours. The paper rounds to two
# digits, and leaves open which 80,000 images it took and how TwoNN treats outliers.
TOLERANCES = {
    "accuracy": (0.02, 0.0),
    "linear_id": (0.5, 0.02),
    "twonn_id": (0.5, 0.05),
    "ratio": (0.05, 0.05),
    "evr1": (0.02, 0.0),
    "z": (0.2, 0.0),
    "pearson": (0.02, 0.0),
    "rank": (1.0, 0.0),  # of a data set among thirteen: neighbours may change places
}
BASE_TOLERANCE = 0.1  # of the base's accuracy, beyond which labels or preprocessing must be wrong
PAPER_IMAGES = 80_000  # of ImageNet
FEW = "too few images"
COLUMNS = ["quantity", "published", "ours", "difference", "tolerance", "verdict"]
EMPTY = "*This run has none of these cells: they are of the paper's encoders on its data sets* ({doc}`scale`)."


def published_name(dataset: str) -> str | None:
    """The name that a data set has in the paper's tables; None for one that is not of the paper."""
    own = dataset.partition("@")[0]
    entry = catalogue().get(own)
    return entry.published if entry else "Random" if own == "random" else None


def compare(
    ours: pd.DataFrame,
    theirs: pd.DataFrame,
    keys: Sequence[str],
    quantities: Sequence[str],
    *,
    reference: str | None = None,
    images: int = PAPER_IMAGES,
) -> pd.DataFrame:
    """Cells that both tables have, in rows by `keys` and quantity, with their difference and a verdict.

    "reproduced" within the tolerance, "not reproduced" beyond it, "too few images" where it is within mostly for the
    width of our own error.
    ours: columns of keys, quantities and, where known, `<quantity>_se`; its data sets have our names. theirs: a
    published table. reference: the data set that units were taken on, where it is no key; only ImageNet is the paper's.
    images: how many of it; with fewer than the paper's, a cell is not judged.
    """
    if reference is not None and published_name(reference) != "ImageNet":
        ours = ours.iloc[:0]
    if "dataset" in keys:
        ours = ours.assign(dataset=[published_name(name) for name in ours["dataset"]]).dropna(subset="dataset")
    both = theirs.merge(ours, on=list(keys), suffixes=("_published", ""))
    parts = [pd.DataFrame(columns=[*keys, *COLUMNS])]
    for quantity in quantities:
        absolute, relative = TOLERANCES[quantity]
        cell = both[[*keys]].assign(quantity=quantity, published=both[f"{quantity}_published"], ours=both[quantity])
        errors = 2 * both[f"{quantity}_se"].fillna(0) if f"{quantity}_se" in both else 0.0
        cell["difference"] = cell["ours"] - cell["published"]
        allowed = absolute + relative * cell["published"].abs()
        cell["tolerance"] = allowed + errors
        within = cell["difference"].abs() <= cell["tolerance"] + 1e-9
        verdict = np.where(within, np.where(errors > 2 * allowed, FEW, "reproduced"), "not reproduced")
        parts.append(cell.assign(verdict=FEW if images < PAPER_IMAGES else verdict))
    filled = [part for part in parts if len(part)]
    return pd.concat(filled, ignore_index=True) if filled else parts[0]


def ranks(means: pd.DataFrame) -> pd.DataFrame:
    """Places of the paper's thirteen data sets by falling value, from 1; none unless all are there.

    means: data sets in rows, models in columns.
    """
    own = means.loc[[name for name in means.index if published_name(name)]].rename_axis("dataset")
    own = own if len(own) == len(catalogue()) else own.iloc[:0]
    return own.rank(ascending=False).reset_index().melt("dataset", var_name="model", value_name="rank")


def beside(cells: pd.DataFrame, rows: Sequence[str], columns: Sequence[str]) -> Styler | Markdown:
    """What `compare` gave as a table: ours, the difference to the published, and x or ? as `compare` judges."""
    if cells.empty:
        return Markdown(EMPTY)
    shown = [
        f"{own:.2f} ({difference:+.2f})" + {"not reproduced": " x", FEW: " ?"}.get(verdict, "")
        for own, difference, verdict in cells[["ours", "difference", "verdict"]].itertuples(index=False)
    ]
    wide = cells.assign(shown=shown).pivot(index=list(rows), columns=list(columns), values="shown").fillna("")
    return wide.style.map(lambda text: "font-weight: bold" if text.endswith("x") else "")


def tally(cells: pd.DataFrame) -> str:
    """How many cells are reproduced, in a sentence."""
    return f"{(cells['verdict'] == 'reproduced').sum()} of {len(cells)} cells are within tolerance."


def check_base(
    model: str, dataset: str, accuracy: float, theirs: pd.DataFrame, *, tolerance: float = BASE_TOLERANCE
) -> None:
    """Hold the zero-shot accuracy of a known encoder on a known set against the published one, before any training.

    theirs: published/unit_selection.csv. Other encoders and sets pass. Raises ValueError where it is farther off
    than `tolerance`: then class names and labels do not match, or images are not preprocessed as the encoder wants.
    """
    own = theirs[(theirs["model"] == model) & (theirs["dataset"] == published_name(dataset))]
    own = own.loc[own["strategy"] == "B", "accuracy"]
    if own.empty or abs(accuracy - own.iloc[0]) <= tolerance:
        return
    raise ValueError(
        f"{model} on {dataset}: zero-shot accuracy is {accuracy:.3f}, published {own.iloc[0]:.2f}. So far off, class "
        "names and labels are in different orders, or images are preprocessed wrongly: nothing after it would mean "
        "anything. Look at classnames.txt of the set, its revision and the encoder's weights; or set base_tolerance "
        "to go on."
    )
