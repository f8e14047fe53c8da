"""Builds the book of a profile: `python -m edition.build mini`. Options it does not know are Snakemake's."""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import yaml

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


def check_slurm(words: list[str], device: str | None) -> None:
    """Raises ParameterError, with Slurm's own reason, where it would refuse the jobs that a profile describes."""
    given = [after for word, after in pairwise([*words, ""]) if word == "--profile"]
    given += [word.partition("=")[2] for word in words if word.startswith("--profile=")]
    file = Path(*given) / "config.yaml" if given else None
    config = yaml.safe_load(file.read_text()) if file and file.is_file() else {}
    if config.get("executor") != "slurm":
        return
    if not find_spec("snakemake_executor_plugin_slurm"):
        raise ParameterError("Snakemake's plugin for Slurm is not installed; run pip install -e '.[cluster]'")
    if not shutil.which("sbatch"):
        raise ParameterError("there is no sbatch here; run this on a machine that submits to the cluster")
    asked = {key: str(value).strip("'\"") for key, value in config.get("default-resources", {}).items()}
    options = {"account": asked.get("slurm_account"), "partition": asked.get("slurm_partition")}
    options |= {"mem": asked.get("mem_mb"), "time": asked.get("runtime"), "gpus": "1" if device else None}
    options["cpus-per-task"] = str(config.get("max-threads", 1))
    described = [f"--{name}={value}" for name, value in options.items() if value]
    done = subprocess.run(
        ["sbatch", "--test-only", *described, "--wrap=true"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ParameterError(
            f"Slurm refuses a job as {file} describes it, {' '.join(described)}: {' '.join(done.stderr.split())}"
        )


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
        check_slurm(more, args.device)
        lock(project_root() / "_build/.lock")
    except (ParameterError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    targets = ["units"] if args.units else []  # before the options, some of which take all words that follow
    command = [sys.executable, "-m", "snakemake", *targets, "--nolock", "--rerun-incomplete", "--keep-going"]
    command += ["--quiet", "host", "reason", "--rerun-triggers", "mtime", "input"]
    here = not any(word.startswith("--profile") for word in more)  # a cluster counts its cores and GPUs itself
    command += ["--resources", "gpu=1"] if here else []
    command += ["--cores", "all"] if here else []  # an own --cores follows
    command += [*more, "--config", f"profile={profile}", *([f"device={args.device}"] if args.device else ())]
    os.chdir(project_root())
    os.execv(sys.executable, command + (["units=1"] if args.units else []))


if __name__ == "__main__":
    sys.exit(main())
