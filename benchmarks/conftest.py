"""Prints, for each group, how many times faster ours is than the naive way."""

from __future__ import annotations


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, dict[str, float]] = {}
    for bench in getattr(session, "benchmarks", []):
        seconds = bench.stats.median / bench.extra_info.get("calls", 1)
        groups.setdefault(bench.group, {})["ours" if "ours" in bench.name else "naive"] = seconds
    if groups:
        terminalreporter.section("naive / ours, medians")
    for group, times in groups.items():
        if {"ours", "naive"} <= set(times):
            ratio, inverse = times["naive"] / times["ours"], times["ours"] / times["naive"]
            terminalreporter.write_line(f"{ratio:8.2f} times faster ({inverse:.3f} of its time)  {group}")
