"""Jobs as forks of one process that has imported what they need, so that a run pays for imports once.

`python -m edition.forkserver run CHAPTER ...` is `python -m edition.run CHAPTER ...`, and `plan` likewise: in a fork
where the Snakefile has started a server, and by itself elsewhere, as on another node of a cluster. The client, which is
this process, imports next to nothing. The server imports when the first client asks, and computes nothing, since
neither threads of OpenMP nor a GPU in use survive a fork. It forks a runner for each client, and a runner of a chapter
forks the kernel that it will talk to.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable
from tempfile import TemporaryDirectory

from edition import forked_kernel
from edition.forked_kernel import adopt

ADDRESS = "RESIDUAL_FORKSERVER"  # in the environment: the server's socket
IMPORTS = (  # of runners, then of kernels
    "edition.run", "edition.plan", "edition.execute", "papermill.execute",
    "ipykernel.kernelapp", "edition.alignment_rows", "edition.explorer", "edition.playground",
    "residual.encoders.from_open_clip", "residual.encoders.from_transformers", "residual.data.hub.read",
    "scipy.stats", "seaborn", "sklearn.datasets", "sklearn.model_selection", "sklearn.neighbors",
    "torchvision.transforms.functional", "torchvision.utils",
)  # fmt: skip
INLINE = "module://matplotlib_inline.backend_inline"  # kernels' backend, which matplotlib asks for when it is imported
INTERRUPTED, KILLED = 130, 137  # the status of a process that Ctrl-C ended, and of one that was killed

_kept: list[object] = []  # until this process ends


def start_server(threads: int) -> None:
    """Start a server for what this process runs; it ends with this process. threads: of OpenMP, in every job."""
    folder = TemporaryDirectory(prefix="residual-")
    os.environ[ADDRESS] = address = f"{folder.name}/forks"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    read, write = os.pipe()  # the server reads the end of this process
    command = [sys.executable, "-c", f"from edition.forkserver import serve; serve({listener.fileno()})"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MPLBACKEND": INLINE}
    subprocess.Popen(command, stdin=read, pass_fds=[listener.fileno()], env=environment)
    os.close(read)
    _kept.extend((folder, listener, write))


def serve(listener: int) -> None:
    """Fork for each client, until the process that started this one ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C, which reaches the clients too
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that no zombies stay
    server = socket.socket(fileno=listener)
    while server in select.select([server, 0], [], [])[0]:
        client, _ = server.accept()
        for name in IMPORTS:
            importlib.import_module(name)
        gc.freeze()  # no fork looks through what was imported, which would copy it
        if os.fork() == 0:
            server.close()
            sys.exit(_run(client))
        client.close()


def _run(client: socket.socket) -> int:
    """In a fork: do a client's job with the client's files, folder and environment; returns the exit status."""
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
    threading.Thread(target=_stop_without, args=[client], daemon=True).start()
    status = 1
    try:
        status = _main_of(program)(arguments)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(BrokenPipeError):
            client.sendall(str(status).encode())
    return status


def _stop_without(client: socket.socket) -> None:
    """Stop this process when its client ends."""
    client.recv(1)
    os.kill(os.getpid(), signal.SIGTERM)


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
        request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
        socket.send_fds(server, [b"-"], [0, 1, 2])
        server.sendall(json.dumps(request).encode() + b"\n")
        try:
            answer = server.recv(16)
        except KeyboardInterrupt:
            server.shutdown(socket.SHUT_WR)  # which stops the runner
            return int(server.recv(16) or INTERRUPTED)
    if not answer:
        print(f"error: the process of edition.{arguments[0]} died, probably out of memory", file=sys.stderr)
    return int(answer or KILLED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
