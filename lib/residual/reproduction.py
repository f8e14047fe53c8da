"""Ours beside theirs: cells of the paper's tables that this run has too."""

from __future__ import annotations

import pandas as pd

from residual.hub import catalogue

TOLERANCE = 0.02  # of an accuracy, beside two standard errors
BASE_TOLERANCE = 0.1  # of the base's, beyond which labels or preprocessing must be wrong


def published_name(dataset: str) -> str | None:
    """The name that a data set of the catalogue has in the paper's tables; None for others."""
    entry = catalogue().get(dataset.partition("@")[0])
    return entry.published if entry else None


def compare(ours: pd.DataFrame, theirs: pd.DataFrame, method: str) -> pd.DataFrame:
    """Cells that both have, with their difference and whether it is within tolerance.

    ours: columns model, dataset, `method`, accuracy, accuracy_se. theirs: published ones, columns table, model,
    dataset, `method`, accuracy. Tolerance is 0.02 and two standard errors of ours.
    """
    own = ours.assign(dataset=[published_name(name) for name in ours["dataset"]]).dropna(subset="dataset")
    keys = ["model", "dataset", method]
    both = theirs.merge(own[[*keys, "accuracy", "accuracy_se"]], on=keys, suffixes=("_published", ""))
    both["difference"] = both["accuracy"] - both["accuracy_published"]
    within = both["difference"].abs() <= TOLERANCE + 2 * both["accuracy_se"].fillna(0)
    return both.assign(verdict=within.map({True: "reproduced", False: "not reproduced"}))


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
