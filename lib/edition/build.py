"""Builds the book of a profile: `python -m edition.build mini`. Options it does not know are Snakemake's."""

from __future__ import annotations

import argparse
import fcntl
import os
import sys

from edition.downloads import check_within_reach, needed
from edition.pages import ParameterError, chapters, find_profile, project_root, read_chapters
from edition.parameters import chapter_parameters


def check_profile(profile: os.PathLike[str]) -> None:
    """Raises ParameterError, before any job, for wrong parameters of chapters, and for what cannot be had offline."""
    names = chapters()
    unknown = sorted(set(read_chapters(profile)) - set(names))
    wrong: dict[str, list[str]] = {"there are no such chapters": unknown} if unknown else {}
    remote: list[tuple[str, str]] = []
    for chapter in names:
        try:
            remote += needed(chapter_parameters(chapter, profile))
        except ParameterError as error:
            wrong.setdefault(str(error), []).append(chapter)
    if wrong:
        lines = (f"{', '.join(where)}: {message}" for message, where in wrong.items())
        raise ParameterError(f"{profile} has wrong parameters:\n" + "\n".join(lines))
    check_within_reach(profile.stem, remote)


def lock(path: os.PathLike[str]) -> None:
    """Hold a lock until this process ends, however it ends, and whatever it becomes.

    Raises ParameterError, with the process, where another run holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(file, 20).decode() or "unknown"
        raise ParameterError(
            f"another run of this project is active here, process {owner}; wait for it, or stop it with kill {owner}"
        ) from None
    os.ftruncate(file, 0)
    os.write(file, str(os.getpid()).encode())
    os.set_inheritable(file, True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m edition.build", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "profile", nargs="?", default="mini", help="a file of parameters, or the name of one in profiles/"
    )
    parser.add_argument("--device", help="where chapters compute, such as cuda")
    parser.add_argument("--units", action="store_true", help="extract everything, and run no chapter")
    args, more = parser.parse_known_args(arguments)
    try:
        profile = find_profile(args.profile)
        check_profile(profile)
        lock(project_root() / "_build/.lock")
    except (ParameterError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "snakemake", "--nolock", "--rerun-incomplete", "--keep-going"]
    command += ["--quiet", "host", "reason", "--rerun-triggers", "mtime", "input"]
    here = not any(word.startswith("--profile") for word in more)  # a cluster counts its cores and GPUs itself
    command += ["--resources", "gpu=1"] if here else []
    command += ["--cores", "all"] if here else []  # an own --cores follows
    command += ["units"] if args.units else []
    command += [*more, "--config", f"profile={profile}", *([f"device={args.device}"] if args.device else ())]
    os.chdir(project_root())
    os.execv(sys.executable, command + (["units=1"] if args.units else []))


if __name__ == "__main__":
    sys.exit(main())
