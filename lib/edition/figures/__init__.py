"""Every plot of the book. Each returns the matplotlib axes it drew."""

import matplotlib.pyplot as plt

from edition.figures.accuracy import accuracy_dots, by_layer, by_share, frontier, radar, training_curves
from edition.figures.dimension import dimension_curves, dimension_heatmaps
from edition.figures.heads import (
    agreement_grids,
    chosen_rows,
    correlations,
    factor_rows,
    gain_rows,
    overlap_grids,
    sampling_curves,
    similarity_rows,
    unit_norms,
)  # fmt: skip
from edition.figures.pictures import captioned, dataset_sheet, idea, residual_block
from edition.figures.speed import growth, speed_ratios

plt.rcParams["text.parse_math"] = False  # a dollar in the name of a folder or a class is a dollar

__all__ = [
    "accuracy_dots", "agreement_grids", "by_layer", "by_share", "captioned", "chosen_rows", "correlations",
    "dataset_sheet", "dimension_curves", "dimension_heatmaps", "factor_rows", "frontier", "gain_rows", "growth", "idea",
    "overlap_grids", "radar", "residual_block", "sampling_curves", "similarity_rows", "speed_ratios", "training_curves",
    "unit_norms",
]  # fmt: skip
