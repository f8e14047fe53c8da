"""Axes as several figures have them."""

from __future__ import annotations

from matplotlib.axis import Axis


def plain_numbers(axis: Axis) -> None:
    """Show the whole numbers of a logarithmic axis as they are, not as powers, whose formulas would not be read."""
    axis.set_major_formatter("{x:,.0f}")
    axis.set_minor_formatter("")
