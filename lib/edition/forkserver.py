"""Jobs as forks of one process that has imported what they need, so that a run pays for imports once.

`python -m edition.forkserver run CHAPTER ...` is `python -m edition.run CHAPTER ...`, and `plan` likewise: in a fork
where the Snakefile has started a server, and by itself elsewhere, as on another node of a cluster. The client, which is
this process, imports next to nothing. The server imports when the first client asks, and computes nothing, since
neither threads of OpenMP nor a GPU in use survive a fork. It forks a runner for each client, and a runner of a chapter
forks the kernel that it will talk to.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from tempfile import TemporaryDirectory

from edition import forked_kernel
from edition.forked_kernel import adopt

ADDRESS = "RESIDUAL_FORKSERVER"  # in the environment: the server's socket
SHARED = "RESIDUAL_SHARED_FORKS"  # in the environment: that server serves what Snakemake starts as well, for the tests
IMPORTS = (  # of runners, then of kernels
    "edition.run", "edition.plan", "edition.execute", "papermill.execute",
    "ipykernel.kernelapp", "edition.alignment_rows", "edition.explorer", "edition.playground",
    "residual.encoders.from_open_clip", "residual.encoders.from_transformers", "residual.data.hub.read",
    "scipy.stats", "seaborn", "sklearn.datasets", "sklearn.model_selection", "sklearn.neighbors",
    "torchvision.transforms.functional", "torchvision.utils",
)  # fmt: skip
INLINE = "module://matplotlib_inline.backend_inline"  # kernels' backend, which matplotlib asks for when it is imported
THREADS = [f"{library}_NUM_THREADS" for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")]  # read by imports as well
PATIENCE = 5  # seconds in which a process that is stopped may end
INTERRUPTED, KILLED = 130, 137  # the status of a process that Ctrl-C ended, and of one that was killed

_kept: list[object] = []  # until this process ends


def start_server(threads: int) -> None:
    """Start a server for what this process runs; it ends with this process. threads: of every job."""
    folder = TemporaryDirectory(prefix="residual-")
    os.environ[ADDRESS] = address = f"{folder.name}/forks"
    read, write = os.pipe()  # where the server sees that this process has ended
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        command = [sys.executable, "-c", f"from edition.forkserver import serve; serve({listener.fileno()})"]
        environment = os.environ | dict.fromkeys(THREADS, str(threads)) | {"MPLBACKEND": INLINE}
        server = subprocess.Popen(command, stdin=read, pass_fds=[listener.fileno()], env=environment)
    os.close(read)
    _kept.extend((folder, write, server))


def serve(listener: int) -> None:
    """Fork for each client, until the process that started this one ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the clients, which stop their runners
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that no zombies stay
    server = socket.socket(fileno=listener)
    while server in select.select([server, 0], [], [])[0]:
        client, _ = server.accept()
        gc.disable()  # imports leave next to no garbage, and looking for it takes an eighth of their time
        for name in IMPORTS:
            importlib.import_module(name)
        gc.freeze()  # or the garbage collector of every fork touches, and so copies, what was imported
        gc.enable()
        sys.stdout.flush(), sys.stderr.flush()
        if os.fork() == 0:
            server.close()
            _run(client)
        client.close()


def _run(client: socket.socket) -> None:
    """In a fork: do a client's job with the client's files, folder and environment, tell its exit status, and end.

    It ends at once: what the imports have left to be done at the end of a process is the server's.
    """
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, *_ = socket.recv_fds(client, 1, 3)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    request = json.loads(client.makefile().readline())
    adopt(request["folder"], request["environment"])
    program, *arguments = request["arguments"]
    if program == "run":
        forked_kernel.kernel = forked_kernel.ForkedKernel(client)
    threading.Thread(target=_stop_with, args=[client], daemon=True).start()
    try:
        status = _main_of(program)(arguments)
    except SystemExit as end:  # of argparse
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(OSError):
        sys.stdout.flush(), sys.stderr.flush()
    with suppress(BrokenPipeError):
        client.sendall(str(status).encode())
    os._exit(status)


def _stop_with(client: socket.socket) -> None:
    """Stop this process when its client ends; again after a while, as an interrupt in a callback may get lost."""
    client.recv(1)
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)


def _main_of(program: str) -> Callable[[list[str]], int]:
    return importlib.import_module(f"edition.{program}").main


def main(arguments: list[str]) -> int:
    """Do a job in a fork of the server, or in this process if there is no server; returns the exit status.

    arguments: "run" or "plan", and what that takes.
    """
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(os.environ.get(ADDRESS, ""))
        except OSError:
            return _main_of(arguments[0])(arguments[1:])
        status = _ask(server, arguments)
    if status is None:
        print(f"error: the process of edition.{arguments[0]} died, {forked_kernel.MEMORY}", file=sys.stderr)
    return KILLED if status is None else status


def _ask(server: socket.socket, arguments: list[str]) -> int | None:
    """The exit status of a fork that does a job for this process; None if it was killed."""
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    try:
        socket.send_fds(server, [b"-"], [0, 1, 2])
        server.sendall(json.dumps(request).encode() + b"\n")
        answer = server.recv(16)
    except KeyboardInterrupt:
        server.shutdown(socket.SHUT_WR)  # which stops the runner
        return int(server.recv(16) or INTERRUPTED)
    except ConnectionError:  # the server died
        return None
    return int(answer) if answer else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
