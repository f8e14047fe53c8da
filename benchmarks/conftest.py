"""Prints how many times faster ours is than the other way, and keeps the table that the page *Speed* shows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd


def pytest_addoption(parser):
    parser.addoption("--table", type=Path, help="a CSV file for all comparisons")


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    if not (benchmarks := getattr(session, "benchmarks", [])):
        return
    terminalreporter.section("the other way over ours, medians")
    rows = []
    for bench in benchmarks:
        about = bench.extra_info
        ours, other = bench.stats.median / about["calls"], about["naive"]
        rows.append((about["what"], about["against"], about["images"], ours, other))
        seconds = f"{other:9.4f} s / {ours:9.4f} s"
        images = f", n = {about['images']:,}" * bool(about["images"])
        terminalreporter.write_line(
            f"{other / ours:8.2f} ({ours / other:.3f} of the time)  {seconds}  "
            f"{about['what']}{images}, against {about['against']}"
        )
    if path := config.getoption("table"):
        names = ["what", "against", "images", "seconds", "other_seconds"]
        pd.DataFrame(rows, columns=names).to_csv(path, index=False, float_format="%.4g")
