"""Cells of the paper's tables that this run has too: the difference, and a verdict for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from IPython.display import HTML
from pandas.io.formats.style import Styler

from edition.results import published
from edition.tables import styled
from miniature import NOISE
from residual.data.catalogue import catalogue

if TYPE_CHECKING:
    from torch import Tensor

    from residual.encoders.encoder import Encoder
    from residual.store import StoredUnits

# How much a cell may differ, absolute and relative, in addition to two standard errors of ours. The paper rounds to two
# digits, and does not say which 80,000 images it took or how TwoNN treats outliers.
TOLERANCES = {
    "accuracy": (0.02, 0.0),
    "linear_id": (0.5, 0.02),
    "twonn_id": (0.5, 0.05),
    "ratio": (0.05, 0.05),
    "evr1": (0.02, 0.0),
    "z": (0.2, 0.0),
    "pearson": (0.02, 0.0),
    "rank": (1.0, 0.0),  # of a data set among thirteen: neighbours may swap
}
BASE_TOLERANCE = 0.1  # of the base's accuracy, beyond which labels or preprocessing must be wrong
PAPER_IMAGES = 80_000  # of ImageNet
ENOUGH = 0.99 * PAPER_IMAGES  # a few images of a copy may be damaged
FEW = "too few images"
COLUMNS = ["quantity", "published", "ours", "difference", "tolerance", "verdict"]
LEGEND = (
    "Cells that this run has too: ours, and in brackets the difference to the published value; x beyond the "
    "tolerance, ? with too few images to judge."
)


def published_name(dataset: str) -> str | None:
    """The name of a data set in the paper's tables; None for one that is not in the paper."""
    base = dataset.partition("@")[0]
    entry = catalogue().get(base)
    return entry.published if entry else "Random" if base in NOISE.values() else None


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

    Verdicts are "reproduced" within the tolerance, "not reproduced" beyond it, and "too few images" where only the
    width of our own error brings a cell within it.
    ours: columns of keys, quantities and, where known, `<quantity>_se`, with our names of data sets. theirs: a
    published table. reference: the data set of the units, where it is not a key; the paper's is ImageNet.
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
        parts.append(cell.assign(verdict=FEW if images < ENOUGH else verdict))
    filled = [part for part in parts if len(part)]
    return pd.concat(filled, ignore_index=True) if filled else parts[0]


def ranks(means: pd.DataFrame) -> pd.DataFrame:
    """Ranks of the paper's thirteen data sets by falling value, from 1; an empty table unless all are present.

    means: data sets in rows, models in columns.
    """
    papers = means.loc[[name for name in means.index if published_name(name)]].rename_axis("dataset")
    papers = papers if len(papers) == len(catalogue()) else papers.iloc[:0]
    return papers.rank(ascending=False).reset_index().melt("dataset", var_name="model", value_name="rank")


def beside(cells: pd.DataFrame, rows: Sequence[str], columns: Sequence[str]) -> Styler | HTML:
    """A table of `compare`'s cells: ours, the difference to the published, x if not reproduced, ? if not judged.

    Nothing where there is no cell: the page *Does it hold?* says so once for all.
    """
    if cells.empty:
        return HTML("<!-- no cell of the paper's -->")  # an empty one would show its class's name
    shown = [
        f"{ours:.2f} ({difference:+.2f})" + {"not reproduced": " x", FEW: " ?"}.get(verdict, "")
        for ours, difference, verdict in cells[["ours", "difference", "verdict"]].itertuples(index=False)
    ]
    wide = cells.assign(shown=shown).pivot(index=list(rows), columns=list(columns), values="shown").fillna("")
    return styled(wide).map(lambda text: "font-weight: bold" if text.endswith("x") else "").set_caption(LEGEND)


def tally(cells: pd.DataFrame) -> str:
    """A sentence on how many cells are reproduced."""
    return f"{(cells['verdict'] == 'reproduced').sum()} of {len(cells)} cells are within tolerance."


def check_base(
    model: str,
    dataset: str,
    accuracy: float,
    theirs: pd.DataFrame,
    *,
    prompts: Sequence[str] = (),
    tolerance: float = BASE_TOLERANCE,
) -> None:
    """Compare the zero-shot accuracy of a known encoder on a known set with the published one, before any training.

    theirs: published/unit_selection.csv. prompts: of which the message shows some. Other encoders and sets pass. Raises
    ValueError where it is further off than `tolerance`: then class names and labels do not match, images are not
    preprocessed as the encoder expects, or the prompts are other ones.
    """
    cells = theirs[(theirs["model"] == model) & (theirs["dataset"] == published_name(dataset))]
    cells = cells.loc[cells["strategy"] == "B", "accuracy"]
    if cells.empty or abs(accuracy - cells.iloc[0]) <= tolerance:
        return
    raise ValueError(
        f"{model} on {dataset}: zero-shot accuracy is {accuracy:.3f}, published {cells.iloc[0]:.2f}. A difference this "
        "large means that class names and labels are in different orders, or that images are preprocessed wrongly. "
        f"Or prompts are other ones: here {len(prompts)}, such as {list(prompts[:3])}. Public evaluations of CLIP-B "
        'differ by 0.2 on SVHN between names as words ("zero") and figures. '
        "Check classnames.txt of the set, its revision and the encoder's weights; or raise base_tolerance to go on."
    )


def reads_words(encoder: Encoder) -> bool:
    """Whether an encoder's words were trained: it has a text tower, and not one with random weights.

    A reader that was joined to a random vision tower is itself trained.
    """
    return encoder.reads_text and (not encoder.name.endswith("@random") or encoder.unmapped() is not None)


def task_classes(
    encoder: Encoder, task: str, units: dict[str, StoredUnits], labels: dict[str, Tensor], parameters: dict[str, Any]
) -> Tensor:
    """A direction for each class of a task [c d]: of its texts, or, for an encoder without `reads_words`, class means.

    units, labels: of every split. Raises ValueError as `check_base`.
    """
    from residual import load_dataset
    from residual.selection import class_encodings, class_means, zero_shot_accuracy

    named = load_dataset(task, "test", seed=parameters["seed"])
    if reads_words(encoder):
        classes = class_encodings(encoder, named)
    else:
        classes = class_means(units["train"].outputs(), labels["train"], len(named.classes))
    accuracy, _ = zero_shot_accuracy(units["test"].outputs(), classes, labels["test"])
    facts = {"prompts": named.prompts(), "tolerance": parameters["base_tolerance"]}
    check_base(encoder.name, task, accuracy, published("unit_selection"), **facts)
    return classes
