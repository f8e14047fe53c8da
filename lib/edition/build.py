"""Builds the book of a profile: `python -m edition.build mini`. Options it does not know are Snakemake's."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import yaml

from edition.check import told_faults
from edition.display import Display, tail
from edition.pages import ParameterError, chapters, find_profile, project_root
from edition.parameters import chapter_parameters

KEPT = "What was extracted, trained and run so far is kept: the same command goes on from there."
PATIENCE = 10  # seconds in which jobs may end by themselves after Ctrl-C


def check_profile(profile: Path) -> None:
    """Raises ParameterError, before any job, for wrong parameters of chapters, and for what cannot be had offline."""
    names = chapters()
    unknown = sorted(set(yaml.safe_load(profile.read_text()) or ()) - set(names))
    wrong: dict[str, list[str]] = {"there are no such chapters": unknown} if unknown else {}
    wanted: dict[tuple[str, str], None] = {}
    for chapter in names:
        try:
            wanted |= dict.fromkeys(_names(chapter_parameters(chapter, profile)))
        except ParameterError as error:
            wrong.setdefault(str(error), []).append(chapter)
    if wrong:
        lines = (f"{', '.join(where)}: {message}" for message, where in wrong.items())
        raise ParameterError(f"{profile} has wrong parameters:\n" + "\n".join(lines))
    if missing := _out_of_reach(list(wanted)):
        from residual.network import no_network

        listed = "\n".join(f"  {kind} {name}" for kind, name in missing)
        raise ParameterError(
            f"the profile {profile.stem} needs {len(missing)} downloads, and {no_network()}:\n{listed}\n"
            f"Connect, or run `python -m edition.plan {profile.stem} --download` where there is a network, and set "
            "HF_HOME to the cache that it fills."
        )


def _names(parameters: dict) -> Iterator[tuple[str, str]]:
    """Every encoder and data set of a chapter."""
    for key, kind in (("encoders", "encoder"), ("controls", "encoder"), ("tasks", "data set"), ("others", "data set")):
        yield from ((kind, name) for name in parameters.get(key, ()))
    if "dataset" in parameters:
        yield "data set", parameters["dataset"]


def _out_of_reach(wanted: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """What only a hub has, and no cache here, if no hub answers."""
    from residual.data.names import is_embedded
    from residual.encoders.names import needs_no_hub

    remote = [(kind, name) for kind, name in wanted if not (needs_no_hub if kind == "encoder" else is_embedded)(name)]
    if not remote:
        return []
    from edition.downloads import is_cached
    from residual.network import no_network

    return [(kind, name) for kind, name in remote if not is_cached(kind, name)] if no_network() else []


def _command(args: argparse.Namespace, profile: Path, more: list[str]) -> list[str]:
    root = project_root()
    command = [sys.executable, "-m", "snakemake", "--rerun-triggers", "mtime", "--nolock", "--rerun-incomplete"]
    if args.dry_run:
        command += ["--dry-run"]
    else:  # a lock that ends with its process, in place of Snakemake's, which a killed run would leave behind
        alone = Path(__file__).with_name("alone.py")
        command = [sys.executable, str(alone), str(root / "_build/.lock"), *command]
    command += ["units"] if args.units else []
    command += [] if any(word.startswith("--profile") for word in more) else ["--cores", str(args.cores or "all")]
    command += ["--resources", f"gpu={args.gpus}", "--config", f"profile={profile}"]
    command += [f"device={args.device}"] if args.device else []
    command += ["units=1"] if args.units else []
    return [*command, *more]


def build(args: argparse.Namespace, more: list[str]) -> int:
    """Run the graph with one line for each chapter; returns its exit status."""
    profile = find_profile(args.profile)
    check_profile(profile)
    if faults := told_faults():
        raise ParameterError("\n".join(["pages have faults:", *faults]))
    command = _command(args, profile, more)
    if args.dry_run:
        return subprocess.run(command, cwd=project_root(), check=False).returncode
    logs = project_root() / "_build/logs" / profile.stem
    logs.mkdir(parents=True, exist_ok=True)
    _check_alone()
    _forget_failures(profile.stem)
    log = logs / "snakemake.log"
    with log.open("w") as file, Display(profile.stem, logs, log) as display:
        process = subprocess.Popen(command, cwd=project_root(), stdout=file, stderr=file, start_new_session=True)
        try:
            while process.poll() is None:
                display.update()
                time.sleep(0.5)
        except KeyboardInterrupt:
            _stop(process)
            raise
        display.update()
    return _tell(process.returncode, log, logs, display, units=args.units)


def _check_alone() -> None:
    """Raises ParameterError while another run of this project holds its lock; see alone.py."""
    path = project_root() / "_build/.lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ParameterError(f"another run of this project is active here ({path} is locked)") from None


def _forget_failures(profile: str) -> None:
    """Let chapters that failed in an earlier run, or whose notebooks are damaged, run again."""
    for run in (project_root() / "_build/runs" / profile).glob("*.ipynb"):
        failed = run.with_name(f"{run.name}.failed")
        if failed.is_file() or not run.read_text(errors="replace").rstrip().endswith("}"):
            run.unlink()
            failed.unlink(missing_ok=True)


def _stop(process: subprocess.Popen) -> None:
    """End the run and all that it started, kernels too, which have sessions of their own."""
    started, limit = _family(process.pid), time.monotonic() + PATIENCE
    os.killpg(process.pid, signal.SIGINT)
    while (alive := [*filter(_is_alive, started)]) and time.monotonic() < limit:
        time.sleep(0.05)
    for one in {*alive, *(child for parent in alive for child in _family(parent.pid))}:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def _is_alive(process: psutil.Process) -> bool:
    """Whether it still runs, which a zombie does not: in containers that reap no orphans, one stays for good."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _family(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _tell(status: int, log: Path, logs: Path, display: Display, *, units: bool) -> int:
    """The last words of a run: where the book is, or what failed and where it is told."""
    text, html = log.read_text(errors="replace"), project_root() / "_build/html"
    if status == 0:
        print("All units are there." if units else f"Open {html / 'index.html'}")
        return 0
    told = [line for line in text.splitlines() if line.startswith("error:")]
    others = [project_root() / name for name in re.findall(r"log: (\S+) \(check", text)]
    told += [f"{tail(path)}\n  log: {path}" for path in others if path.is_file()]
    for chapter in display.failed:
        path = logs / f"{chapter}.log"
        told.append(f"{chapter}: {tail(path, 1)}\n  page: {html / f'{chapter}.html'}\n  log: {path}")
    print("\n".join(told or [tail(log, 15), f"  log: {log}"]), file=sys.stderr)
    return status


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m edition.build", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "profile", nargs="?", default="mini", help="a file of parameters, or the name of one in profiles/"
    )
    parser.add_argument("--device", help="where chapters compute, such as cuda")
    parser.add_argument("--gpus", type=int, default=1, help="how many jobs may use a GPU at once")
    parser.add_argument("--cores", type=int, help="of this machine; by default all")
    parser.add_argument("-n", "--dry-run", "--dryrun", action="store_true", help="say what would run, and why")
    parser.add_argument("--units", action="store_true", help="extract everything, and run no chapter")
    args, more = parser.parse_known_args(arguments)
    for sign in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(sign) != signal.SIG_IGN:  # as nohup has it
            signal.signal(sign, signal.default_int_handler)
    try:
        return build(args, more)
    except (ParameterError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped. {KEPT}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
