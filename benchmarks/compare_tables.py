"""Compares every table of two runs: `python benchmarks/compare_tables.py OLD NEW`, two folders of _build/results.

Prints each table and column that differs, and the largest difference of a number. Rows may come in another order.
Seconds, and costs.csv, which holds times and memory, are left out. Exits with 1 where anything else differs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd


def differences(old: pd.DataFrame, new: pd.DataFrame) -> Iterator[tuple[str, float]]:
    """What differs, and by how much: infinity for shapes, names and texts."""
    if old.shape != new.shape or list(old.columns) != list(new.columns):
        yield f"{old.shape} {set(old.columns) ^ set(new.columns)} {new.shape}", float("inf")
        return
    for column in old.columns:
        if pd.api.types.is_numeric_dtype(old[column]) and not pd.api.types.is_bool_dtype(old[column]):
            if not (old[column].isna() == new[column].isna()).all():
                yield f"{column}: other values are missing", float("inf")
            elif (gap := (old[column] - new[column]).abs().max()) > 0:
                yield column, gap
        elif not old[column].equals(new[column]):
            yield column, float("inf")


def ordered(table: pd.DataFrame) -> pd.DataFrame:
    """Rows by their texts and whole numbers, seconds left out."""
    table = table.drop(columns="seconds", errors="ignore")
    keys = [name for name in table if not pd.api.types.is_float_dtype(table[name])]
    return table.sort_values(keys, ignore_index=True, kind="stable") if keys else table


def main() -> int:
    folders = [Path(argument) for argument in sys.argv[1:3]]
    names = [{path.name for path in folder.glob("*.csv")} - {"costs.csv"} for folder in folders]
    for name in sorted(names[0] ^ names[1]):
        print(f"{name}: in one run only")
    worst = float("inf") if names[0] - names[1] else 0.0
    for name in sorted(names[0] & names[1]):
        tables = (ordered(pd.read_csv(folder / name)) for folder in folders)
        for what, gap in differences(*tables):
            print(f"{name}, {what}: {gap:g}")
            worst = max(worst, gap)
    print(f"largest difference {worst:g}, of {len(names[0] & names[1])} tables")
    return int(worst > 0)


if __name__ == "__main__":
    sys.exit(main())
