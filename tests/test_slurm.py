"""The Slurm profile through Snakemake's own plugin: with stand-ins for Slurm's commands, and on a real one.

The real one is that of `tests/slurm_here.sh`, on this machine; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edition import build
from edition.inputs import jobs
from edition.pages import ParameterError
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

OFTEN = ("--slurm-init-seconds-before-status-checks", "5")


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
    made = list((project / "_build/units/jobs").iterdir())
    submitted = [json.loads(line) for line in (folder / "submitted").read_text().splitlines()]
    assert len(submitted) == len(made) > 5
    assert not any(word.startswith("--gpus") for words in submitted for word in words)
    assert all(load_units(path).manifest.complete for path in (project / "_build/units").glob("*--*"))
    made[0].unlink()
    target = str(made[0].relative_to(project))
    run = submit(project, env, target, "--config", "profile=few", "units=1", "device=cuda")
    while len(lines := (folder / "submitted").read_text().splitlines()) == len(submitted):
        assert run.poll() is None, run.communicate()[0][-3000:]
        time.sleep(1)
    os.killpg(run.pid, signal.SIGKILL)  # there is no GPU here
    run.communicate()
    last = json.loads(lines[-1])
    assert {"--gpus=1", "--cpus-per-task=8"} <= set(last)
    assert last[last.index("-p") + 1] == "gpu"


def test_slurm_is_asked_before_the_first_job(cluster, tmp_path, monkeypatch):
    folder, env = cluster
    monkeypatch.setenv("PATH", env["PATH"])
    refuses = '#!/bin/sh\necho "$@" > asked\necho "allocation failure: Invalid account" >&2\nexit 1\n'
    (folder / "bin/sbatch").write_text(refuses)
    monkeypatch.chdir(tmp_path)
    profile = Path(__file__).parents[1] / "profiles/slurm"
    with pytest.raises(
        ParameterError, match=r"refuses a job as .*--account=your-account .*: allocation failure: Invalid"
    ):
        build.check_slurm(["--profile", str(profile), "--dry-run"], "cuda")
    asked = Path("asked").read_text().split()
    assert {"--test-only", "--partition=gpu", "--mem=64000", "--gpus=1", "--cpus-per-task=8"} <= set(asked)
    build.check_slurm(["--cores", "2"], None)  # no cluster
    (folder / "bin/sbatch").unlink()
    monkeypatch.setenv("PATH", str(folder / "bin"))
    with pytest.raises(ParameterError, match="there is no sbatch here"):
        build.check_slurm([f"--profile={profile}"], None)


def slurm_is_here():
    if not shutil.which("sinfo"):
        return False
    return "here" in subprocess.run(["sinfo", "-h", "-p", "here"], capture_output=True, text=True, check=False).stdout


@pytest.fixture
def real(project):
    """A small project whose Slurm profile is for the one of tests/slurm_here.sh."""
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="needs pip install -e '.[cluster]'")
    config = project / "profiles/slurm/config.yaml"
    own = {
        "your-account": "here",
        "'gpu'": "'here'",
        "64000": "4000",
        "20000": "1500",
        "max-threads: 8": "max-threads: 1",
    }
    change(config, own)
    return project


def change(path, replaced):
    text = path.read_text()
    for theirs, ours in replaced.items():
        assert theirs in text
        text = text.replace(theirs, ours)
    path.write_text(text)


def units_of(project, count):
    """The targets of some extractions, and a command that submits them."""
    targets = [f"_build/units/jobs/{job.name}" for job in jobs(project / "profiles/few.yml")][:count]
    command = [sys.executable, "-m", "snakemake", *targets, "--nolock", "--rerun-incomplete", "--jobs", "2"]
    return targets, [*command, "--profile", "profiles/slurm", *OFTEN, "--config", "profile=few", "units=1"]


def wait_for(condition, run, log):
    """Until a condition holds, while a run goes on."""
    end = time.monotonic() + 300
    while not (found := condition(log.read_text())):
        assert run.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(1)
    return found


@pytest.mark.skipif(not slurm_is_here(), reason="needs the Slurm of tests/slurm_here.sh")
def test_on_a_real_slurm_a_cancelled_job_is_noticed_and_a_killed_run_resumed(real):
    (targets, command), log = units_of(real, 4), real / "log"
    with log.open("w") as out:
        run = subprocess.Popen(command, cwd=real, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    first = wait_for(lambda text: re.findall(r"SLURM jobid (\d+)", text), run, log)[0]
    subprocess.run(["scancel", first], check=True)
    wait_for(lambda text: f"SLURM-job '{first}' failed, SLURM status is: 'CANCELLED'" in text, run, log)
    wait_for(lambda text: "Finished jobid" in text, run, log)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    subprocess.run(["scancel", "--account=here"], check=True)
    left = [target for target in targets if not (real / target).is_file()]
    done = subprocess.run(command, cwd=real, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert len(re.findall(r"SLURM jobid \d+", done.stdout + done.stderr)) == len(left) < len(targets)


@pytest.mark.skipif(not slurm_is_here(), reason="needs the Slurm of tests/slurm_here.sh")
def test_on_a_real_slurm_a_job_that_fails_or_lacks_memory_is_named_and_tried_again_while_its_controller_restarts(real):
    shell = "OMP_NUM_THREADS={threads} {PYTHON} -m edition.inputs"
    change(real / "Snakefile", {shell: f"test -e failed-once || (touch failed-once; exit 1); {shell}"})
    change(real / "profiles/slurm/config.yaml", {"1500 * attempt": "300 * attempt ** 2"})
    (targets, command), log = units_of(real, 2), real / "log"
    with log.open("w") as out:
        run = subprocess.Popen(command, cwd=real, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    wait_for(lambda text: re.findall(r"SLURM jobid (\d+)", text)[1:], run, log)
    subprocess.run(["scontrol", "shutdown", "slurmctld"], check=True)
    time.sleep(20)
    subprocess.run(["/usr/sbin/slurmctld"], check=True)
    assert run.wait(600) == 0, log.read_text()[-3000:]
    told, logs = log.read_text(), "".join(path.read_text() for path in (real / ".snakemake/slurm_logs").rglob("*.log"))
    assert (real / "failed-once").is_file()
    assert "exceeded memory limit" in logs
    failed = re.findall(r"Error in rule unit:\n    message: SLURM-job '\d+' failed.*\n.*\n    output: (\S+)", told)
    assert set(failed) == set(targets), told[-3000:]
    assert all((real / target).is_file() for target in targets)


@pytest.mark.skipif(not slurm_is_here(), reason="needs the Slurm of tests/slurm_here.sh")
def test_on_a_real_slurm_a_chapter_that_is_killed_is_named_and_the_others_go_on(real):
    command = [sys.executable, "-m", "edition.build", "few", "--profile", "profiles/slurm", *OFTEN]
    log = real / "log"
    with log.open("w") as out:
        run = subprocess.Popen(command, cwd=real, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    job = wait_for(lambda text: re.findall(r"SLURM jobid (\d+) .*/rule_(\w+)/", text), run, log)[0]
    subprocess.run(["scancel", job[0]], check=True)
    assert run.wait(900) != 0
    assert re.search(
        rf"Error in rule {job[1]}:.*SLURM-job '{job[0]}' failed, SLURM status is: 'CANCELLED'",
        log.read_text(),
        re.DOTALL,
    )
    done = subprocess.run(command, cwd=real, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert f"chapter {job[1]}" in done.stdout + done.stderr


@pytest.mark.skipif(not slurm_is_here(), reason="needs the Slurm of tests/slurm_here.sh")
@pytest.mark.parametrize(
    ("ours", "wrong"), [("slurm_account: \"'here'", "slurm_account: \"'nobody'"), ("mem_mb: 4000", "mem_mb: 999000")]
)
def test_a_real_slurm_refuses_before_the_first_job(real, ours, wrong):
    config = real / "profiles/slurm/config.yaml"
    assert ours in config.read_text()
    config.write_text(config.read_text().replace(ours, wrong, 1))
    command = [sys.executable, "-m", "edition.build", "few", "--units", "--profile", "profiles/slurm"]
    done = subprocess.run(command, cwd=real, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: Slurm refuses a job as .*: allocation failure: .*\n", done.stderr)
