"""Executes a chapter through papermill, with its progress in a file and its cost beside its results."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jupytext
import nbformat
import papermill
from jupyter_client import AsyncKernelManager
from nbclient.exceptions import DeadKernelError

from edition import forked_kernel
from edition.devices import one_gpu
from edition.forked_kernel import MEMORY
from edition.pages import DOING, project_root
from residual.files import locked, write_bytes

WIDGET = "application/vnd.jupyter.widget-view+json"
CELLS = "{n_fmt} of {total_fmt}\n"  # a line of the file of progress


class ChapterError(RuntimeError):
    """A chapter failed in a cell, or its process was killed; the notebook holds all up to there."""


class LocalKernel(AsyncKernelManager):
    """A kernel that is talked to through sockets in a folder, not over the network."""

    folder: str  # short, as paths of sockets are limited to about 100 characters

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.transport, self.ip = "ipc", f"{self.folder}/kernel"

    async def _async_launch_kernel(self, command: list[str], **options: Any) -> None:
        """Launch the kernel as a process of its own, or let the one that was forked for it become it."""
        forked, local = forked_kernel.kernel, self.provisioner
        if forked is None:
            await super()._async_launch_kernel(command, **options)
            return
        forked.launch(command, options.get("env", dict(os.environ)), str(options.get("cwd") or os.getcwd()))
        local.process, local.pid, local.pgid = forked, forked.pid, forked.pid
        self._reconcile_connection_info(local.connection_info)


def execute_chapter(source: Path, out: Path, parameters: dict[str, Any], *, cells: Path | None = None) -> None:
    """Execute a chapter, and write the notebook with its outputs.

    parameters: checked before. cells: a file that gets a line of progress for each cell; by default progress is a bar.
    Raises ChapterError, with the notebook up to there in `out`.
    """
    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".cost.json").unlink(missing_ok=True)  # of an earlier run
    started = time.monotonic()
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(dir=out.parent, prefix=".draft-"))
        stack.enter_context(locked(out.with_name(f".{out.name}.lock"), str(out)))
        stack.enter_context(one_gpu(parameters.get("device", "cpu")))
        LocalKernel.folder = stack.enter_context(TemporaryDirectory(prefix="residual-"))
        os.environ["JUPYTER_RUNTIME_DIR"] = LocalKernel.folder
        jupytext.write(notebook, draft := Path(folder) / out.name)
        bar: bool | dict[str, Any] = True
        if cells:
            cells.parent.mkdir(parents=True, exist_ok=True)
            os.environ[DOING] = str(cells.with_suffix(".doing").absolute())
            bar = {"file": stack.enter_context(cells.open("w")), "bar_format": CELLS, "mininterval": 0}
        options = {"cwd": str(project_root()), "kernel_name": "python3", "kernel_manager_class": LocalKernel}
        options["shutdown_kernel"] = "immediate"  # all is written, and to end by itself may take a kernel seconds
        try:
            papermill.execute_notebook(str(draft), str(out), parameters, progress_bar=bar, **options)
        except papermill.PapermillExecutionError as error:
            raise ChapterError(
                f"{source} failed in cell {error.exec_count}: {error.ename}: {error.evalue}\n"
                f"the notebook up to there is {out}"
            ) from error
        except DeadKernelError as error:
            _write_death(out)
            raise ChapterError(f"{source}: {error}, {MEMORY}") from error
        finally:
            _tidy(out)
    _write_cost(out, len(notebook.cells), time.monotonic() - started)


def _write_cost(out: Path, cells: int, seconds: float) -> None:
    """Seconds and memory of a chapter, beside its notebook."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes in ru_maxrss
    cost = {"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime, "bytes": used.ru_maxrss * unit}
    write_bytes(out.with_suffix(".cost.json"), json.dumps(cost | {"cells": cells}).encode())


def _tidy(out: Path) -> None:
    """Remove progress bars, which are widgets, for which a page would ask another host for scripts."""
    if not out.is_file():
        return
    notebook = nbformat.read(out, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", ())]
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, out)


def _write_death(out: Path) -> None:
    """Put an error on the page of a chapter whose process was killed, as its notebook holds none."""
    notebook = jupytext.read(out)
    text = f"the process of this chapter died before it finished, {MEMORY}"
    error = nbformat.v4.new_output("error", ename="DeadKernelError", evalue=text, traceback=[text])
    notebook.cells.insert(0, nbformat.v4.new_code_cell("", outputs=[error]))
    nbformat.write(notebook, out)
