"""What sets.yml says of the embedded data sets, which needs neither torch nor a drawing."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml


@functools.cache
def entries() -> dict[str, dict[str, Any]]:
    """The embedded data sets by name: the fields of `Entry`, without how they are built."""
    return yaml.safe_load(Path(__file__).with_name("sets.yml").read_text())["sets"]
