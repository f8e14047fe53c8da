"""A fork does a job as a process of its own would, and ends with whoever asked for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import nbformat
import psutil
import pytest

from edition.forkserver import ADDRESS
from edition.run import KEPT

PAGE = """# Forked

```{code-cell} ipython3
:tags: [parameters]

profile: str = "few"
seed: int = 0
```

```{code-cell} ipython3
import os
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt

from edition.chapter import Chapter

run = Chapter("forked", globals())
```

```{code-cell} ipython3
plt.plot([seed, 1]);
```

```{code-cell} ipython3
print(Path.cwd().name, os.environ["MARK"], Path(sys.argv[0]).stem, plt.get_backend())
```

```{code-cell} ipython3
Path("pids").write_text(f"{os.getpid()} {os.getppid()}")
while Path("wait").exists():
    time.sleep(0.1)
```
"""
START = f"""
import os, sys
from edition.forkserver import start_server
start_server(1)
print(os.environ["{ADDRESS}"], flush=True)
sys.stdin.read()
"""
PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

SERVER = os.environ.get(ADDRESS, "")  # that conftest.py started

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the Snakefile starts a server on Linux alone")


@pytest.fixture
def folder(project: Path) -> Path:
    (project / "book/forked.md").write_text(PAGE)
    return project


def client(folder: Path, address: str, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "edition.forkserver", "run", "book/forked.md", "--cells", "cells", "--out", *more]
    environment = os.environ | {ADDRESS: address, "MARK": "ours"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def until(holds: Callable[[], object], seconds: float = 120) -> bool:
    limit = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < limit:
        time.sleep(0.05)
    return bool(found)


def waiting(folder: Path, address: str) -> tuple[subprocess.Popen, list[int]]:
    """A client whose chapter waits in its last cell, and the processes of its kernel and its runner."""
    (folder / "wait").touch()
    run = client(folder, address, "out.ipynb")
    assert until(lambda: (folder / "pids").is_file() and (folder / "pids").read_text())
    return run, [int(pid) for pid in (folder / "pids").read_text().split()]


def ended(pids: list[int]) -> bool:
    return until(lambda: not any(map(alive, pids)))


def alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_a_fork_runs_a_chapter_as_a_process_of_its_own_would(folder):
    def outputs(address: str, name: str) -> list:
        run = client(folder, address, name, "-p", "seed", "3")
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
        assert (folder / name).with_suffix(".cost.json").is_file()
        return [cell.get("outputs") for cell in nbformat.read(folder / name, as_version=4).cells]

    forked = outputs(SERVER, "forked.ipynb")
    assert forked == outputs("", "alone.ipynb")
    assert "image/svg+xml" in forked[-3][0]["data"]
    assert forked[-2][0]["text"].startswith(f"{folder.name} ours ipykernel_launcher")


def test_bad_parameters_are_told_by_the_client(folder):
    run = client(folder, SERVER, "out.ipynb", "-p", "seed", "-1")
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 2
    assert errors.startswith("error: seed = -1: ")


@pytest.mark.parametrize(("sign", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGKILL, -9)])
def test_a_chapter_ends_with_its_client(folder, sign, status):
    run, pids = waiting(folder, SERVER)
    assert pids[1] != run.pid  # a fork, not the client
    run.send_signal(sign)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == status
    assert ended(pids)
    if sign == signal.SIGINT:
        assert errors.strip().endswith(f"stopped. {KEPT}")


def test_a_runner_that_is_killed_is_told_and_takes_its_kernel_along(folder):
    run, (kernel, runner) = waiting(folder, SERVER)
    os.kill(runner, signal.SIGKILL)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 137
    assert "error: the process of edition.run died, probably out of memory\n" in errors
    assert ended([kernel, runner])


def test_options_that_are_none_are_refused_as_elsewhere(folder):
    run = client(folder, SERVER, "out.ipynb", "--none")
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 2
    assert "unrecognized arguments: --none" in errors


@pytest.mark.parametrize("killed", ["server", "starter"])
def test_without_a_server_chapters_run_by_themselves(folder, killed):
    with subprocess.Popen([sys.executable, "-c", START], **PIPES) as starter:
        address = starter.stdout.readline().strip()
        (forks,) = psutil.Process(starter.pid).children()
        os.kill(forks.pid if killed == "server" else starter.pid, signal.SIGKILL)
        assert ended([forks.pid])
        run = client(folder, address, "out.ipynb")
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
        starter.stdin.close()
