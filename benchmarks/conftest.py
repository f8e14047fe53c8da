"""Prints how many times faster ours is than the other way, and keeps the table that the page *Running it* shows."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path

import pandas as pd
import torch


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
    path = config.getoption("table")
    if path and not config.getoption("keyword"):  # a part would leave the others out
        table = pd.DataFrame(rows, columns=["what", "against", "images", "seconds", "other_seconds"])
        table.to_csv(path, index=False, float_format="%.4g")
        path.with_suffix(".json").write_text(json.dumps(machine(), indent=2) + "\n")


def machine():
    """What the numbers were measured on."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    models = [line.partition(": ")[2] for line in lines if "model name" in line]
    facts = {
        "processor": " ".join(models[0].split()) if models else platform.machine(),
        "threads": torch.get_num_threads(),
    }
    facts |= {"torch": torch.__version__, "date": str(datetime.date.today())}
    return facts
