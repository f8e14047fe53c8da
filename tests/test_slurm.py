"""The Slurm profile through Snakemake's own plugin, with stand-ins for Slurm's commands that run jobs here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from residual import load_units

SBATCH = """#!{python}
import json, os, pathlib, subprocess, sys, time
if "--version" in sys.argv:
    sys.exit(print("slurm 23.02"))
job, folder = str(time.time_ns() % 10**9), pathlib.Path({folder!r})
with open(folder / "submitted", "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
command = next(word.partition("=")[2] for word in sys.argv if word.startswith("--wrap="))
state = folder / ("state." + job)
state.write_text("RUNNING")
script = command + f"\\nif [ $? = 0 ]; then echo COMPLETED; else echo FAILED; fi > {{state}}"
quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
subprocess.Popen(["bash", "-c", script], env=os.environ | dict(SLURM_JOB_ID=job, SLURM_CPUS_PER_TASK="1"), **quiet)
print(job)
"""
SACCT = """#!{python}
import pathlib
for path in pathlib.Path({folder!r}).glob("state.*"):
    print(path.suffix[1:] + "|" + path.read_text().strip())
"""
SRUN = """#!{python}
import subprocess, sys
words = sys.argv[1:]
while words and words[0].startswith("-"):  # options with their values, if these stand apart
    alone = "=" in words[0] or words[0].startswith("-n") or words[0] == "--quit-on-interrupt"
    words = words[1 if alone else 2 :]
sys.exit(subprocess.call(words if len(words) > 1 else words[0], shell=len(words) == 1))
"""


@pytest.fixture
def cluster(tmp_path):
    """The folder of what was submitted, and the surroundings in which Slurm's commands are ours."""
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="needs pip install -e '.[cluster]'")
    programs = {"sbatch": SBATCH, "sacct": SACCT, "srun": SRUN}
    programs |= dict.fromkeys(("squeue", "scancel", "sinfo", "scontrol", "sacctmgr", "sshare"), "#!/bin/sh\nexit 0\n")
    for name, text in programs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.format(python=sys.executable, folder=str(tmp_path)))
        path.chmod(0o755)
    return tmp_path, os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def submit(folder: Path, env: dict[str, str], *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "snakemake", "--nolock", "--profile", "profiles/slurm", "--jobs", "2", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(command, cwd=folder, env=env, **pipes)


@pytest.mark.slow
def test_jobs_are_submitted_run_and_given_a_gpu_where_they_want_one(project, cluster):
    folder, env = cluster
    run = submit(project, env, "units", "--config", "profile=few", "units=1")
    told = run.communicate()[0]
    assert run.returncode == 0, told[-3000:]
    jobs = list((project / "_build/units/jobs").iterdir())
    submitted = [json.loads(line) for line in (folder / "submitted").read_text().splitlines()]
    assert len(submitted) == len(jobs) > 5
    assert not any(word.startswith("--gpus") for words in submitted for word in words)
    assert all(load_units(path).manifest.complete for path in (project / "_build/units").glob("*--*"))
    jobs[0].unlink()
    target = str(jobs[0].relative_to(project))
    run = submit(project, env, target, "--config", "profile=few", "units=1", "device=cuda")
    while len(lines := (folder / "submitted").read_text().splitlines()) == len(submitted):
        assert run.poll() is None, run.communicate()[0][-3000:]
        time.sleep(1)
    os.killpg(run.pid, signal.SIGKILL)  # there is no GPU here
    run.communicate()
    last = json.loads(lines[-1])
    assert {"--gpus=1", "--cpus-per-task=8"} <= set(last)
    assert last[last.index("-p") + 1] == "gpu"
