"""Prints how many times faster ours is than the naive way."""

from __future__ import annotations


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    if not (benchmarks := getattr(session, "benchmarks", [])):
        return
    terminalreporter.section("naive over ours, medians")
    for bench in benchmarks:
        ours, naive = bench.stats.median / bench.extra_info["calls"], bench.extra_info["naive"]
        seconds = f"{naive:9.4f} s / {ours:9.4f} s"
        terminalreporter.write_line(
            f"{naive / ours:8.2f} ({ours / naive:.3f} of the time)  {seconds}  {bench.extra_info['what']}"
        )
