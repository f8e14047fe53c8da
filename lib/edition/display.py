"""What a build is doing, for people: one line for each chapter that runs, from files that its jobs write."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from edition.pages import chapters, project_root, read_cost


class Display:
    """Lines for chapters in progress, and one for each that ended. Without a terminal, or with CI set, plain lines.

    logs: the folder in which chapters write their progress. log: of the graph. failed: chapters that failed.
    """

    def __init__(self, profile: str, logs: Path, log: Path) -> None:
        self.runs, self.logs, self.log = project_root() / "_build/runs" / profile, logs, log
        self.console = Console(highlight=False, soft_wrap=True)
        self.plain = bool(os.environ.get("CI")) or not self.console.is_terminal
        text = TextColumn("{task.description:<16}"), BarColumn(24), TextColumn("{task.fields[state]}")
        self.progress = Progress(*text, console=self.console, transient=True, refresh_per_second=2, disable=self.plain)
        self.started = time.time()
        self.chapters = chapters()
        self.expected = {name: cost["seconds"] for name in self.chapters if (cost := read_cost(profile, name))}
        self.running: dict[str, tuple[float, TaskID]] = {}
        self.ended: set[str] = set()
        self.failed: list[str] = []
        self.steps, self.announced = "", False

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def update(self) -> None:
        """Look at the files, and show what changed."""
        for chapter in self.chapters:
            cells = self.logs / f"{chapter}.cells"
            if chapter not in self.ended and _written(cells) >= self.started:
                self._show(chapter, cells)
        told = self.log.read_text(errors="replace")
        if not self.announced and "Job stats:" in told and "\ntotal " in told:
            self._announce(told)
        steps = re.findall(r"(\d+ of \d+) steps", told)
        if steps and steps[-1] != self.steps and not self.running and not self.ended:
            self.steps = steps[-1]
            self._say(f"step {self.steps} done")

    def _announce(self, told: str) -> None:
        """What is to be done, and what an earlier run has left."""
        self.announced = True
        chapters = sum(map(int, re.findall(r"^(?:long_)?chapter +(\d+)", told, re.MULTILINE)))
        units = sum(map(int, re.findall(r"^unit +(\d+)", told, re.MULTILINE)))
        if chapters:
            left = len(self.chapters) - chapters
            self._say(f"{chapters} chapters to run" + f"; {left} are there from before" * bool(left))
        if units:
            self._say(f"{units} extractions to do; images that were encoded before are kept")

    def _show(self, chapter: str, cells: Path) -> None:
        if chapter not in self.running:
            self.running[chapter] = time.time(), self.progress.add_task(chapter, total=None, state="")
            if self.plain:
                self._say(f"{chapter:<16} started{self._about(chapter)}")
        began, task = self.running[chapter]
        seconds = time.time() - began
        failed = _written(self.runs / f"{chapter}.ipynb.failed") >= self.started
        if failed or _written(self.runs / f"{chapter}.cost.json") >= began - 1:
            self.ended.add(chapter)
            self.failed += [chapter] * failed
            self.progress.remove_task(task)
            self._say(f"{chapter:<16} {'failed' if failed else 'done'} after {clock(seconds)}")
            return
        done, total = _last_numbers(cells)
        doing = _last_line(cells.with_suffix(".doing"), since=began)
        state = f"{done} of {total} cells, {clock(seconds)}{self._about(chapter)}{doing and f'; {doing}'}"
        self.progress.update(task, completed=done, total=total or None, state=state)

    def _about(self, chapter: str) -> str:
        """How long it took the last time."""
        return f" of about {clock(self.expected[chapter])}" if chapter in self.expected else ""

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False)


def clock(seconds: float) -> str:
    """Minutes and seconds: "3:07"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def tail(path: Path, lines: int = 6) -> str:
    """A job's own error, or else the last lines of its log."""
    try:
        text = path.read_text(errors="replace").replace("\r", "\n")
    except OSError:
        return "there is no log"
    told = [line for line in text.splitlines() if line.strip()]
    errors = [number for number, line in enumerate(told) if line.startswith("error:")]
    if errors:
        return "\n".join(told[errors[-1] :][:lines])
    warned = [line for line in told if re.search(r"\b(WARNING|ERROR)\b", line)]  # of the book's pages
    return re.sub(r"\x1b\[[\d;]*m", "", "\n".join((warned or told)[-lines:]))


def _written(path: Path) -> float:
    return path.stat().st_mtime if path.is_file() else 0.0


def _last_numbers(cells: Path) -> tuple[int, int]:
    found = re.findall(r"(\d+) of (\d+)", cells.read_text(errors="replace"))
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)


def _last_line(path: Path, *, since: float) -> str:
    """What an extraction says of itself; "" where there is none."""
    if _written(path) < since:
        return ""
    return re.split(r"[\r\n]", path.read_text(errors="replace").strip())[-1].strip()[:70]
