"""Values of a map that its page shows under the pointer."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # not when pages are built
    import pandas as pd
    from matplotlib.axes import Axes

MARK = "values-"  # begins the name of a panel that carries its values


def carry_values(ax: Axes, grid: pd.DataFrame, show: Callable[[float], str] = "{:.2f}".format) -> None:
    """Let a panel carry the values that it draws, as `show` writes them, with their names: `edition.sphinx_values`."""
    values = [[show(value) for value in row] for row in grid.to_numpy()]
    text = json.dumps({"rows": [*map(str, grid.index)], "columns": [*map(str, grid.columns)], "values": values})
    ax.patch.set_gid(MARK + base64.urlsafe_b64encode(text.encode()).decode().rstrip("="))
