"""A kernel that is forked from a process which has imported what it needs; see `edition.forkserver`."""

from __future__ import annotations

import json
import os
import sys
from socket import socket

MEMORY = "probably out of memory"  # why a process was killed


class ForkedKernel:
    """A forked process that waits to become a kernel; it has what Jupyter uses of a `Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, client: socket) -> None:
        """client: a connection of this process, which the kernel does not keep."""
        read, write = os.pipe()
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.close(write)
            client.close()
            _become_kernel(read)
            os._exit(0)
        os.close(read)
        self.orders = os.fdopen(write, "w")

    def launch(self, command: list[str], environment: dict[str, str], folder: str) -> None:
        """Let it become the kernel that this command, `python -m MODULE ...`, would be; it ends with this process."""
        arguments = [*command[2:], f"--IPKernelApp.parent_handle={os.getpid()}"]
        with self.orders:
            json.dump({"arguments": arguments, "environment": environment, "folder": folder}, self.orders)

    def poll(self, options: int = os.WNOHANG) -> int | None:
        """Its exit status; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, options)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def wait(self) -> int | None:
        return self.poll(0)

    def send_signal(self, sign: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sign)


def _become_kernel(orders: int) -> None:
    os.setsid()
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    with os.fdopen(orders) as file:
        text = file.read()
    if not text:  # its runner has ended without it
        return
    given = json.loads(text)
    adopt(given["folder"], given["environment"])
    sys.argv = given["arguments"]
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance()


def adopt(folder: str, environment: dict[str, str]) -> None:
    """Work in a folder, with an environment in place of this process's own."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)


kernel: ForkedKernel | None = None  # the one that was forked for this process's chapter, if any
