"""Values of a map that its page shows under the pointer."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes

MARK = "values-"  # begins the name of a panel that carries its values


def carry_values(ax: Axes, values: Iterable[Sequence[str]], rows: Iterable[str], columns: Iterable[str]) -> None:
    """Let a panel carry its values, row by row from the top, and their names; see `edition.sphinx_values`."""
    names = [*map(str, rows)], [*map(str, columns)]
    text = json.dumps({"rows": names[0], "columns": names[1], "values": [list(row) for row in values]})
    ax.patch.set_gid(MARK + base64.urlsafe_b64encode(text.encode()).decode().rstrip("="))
