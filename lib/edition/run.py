"""Runs a chapter with other parameters: `python -m edition.run book/dimension.md -p images 2000`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jupytext
import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError

from edition.devices import one_gpu
from edition.pages import ParameterError, chapter_defaults, project_root, read_profile
from edition.parameters import check_parameters
from residual.files import locked

MEMORY = "probably out of memory"


def run_chapter(source: Path, out: Path, parameters: dict[str, Any]) -> None:
    """Execute a chapter through papermill, and write the notebook with its outputs.

    Raises ParameterError before any work; papermill's PapermillExecutionError, with the
    notebook up to there in `out`, when a cell fails.
    """
    defaults = chapter_defaults(source)
    if unknown := sorted(set(parameters) - set(defaults)):
        raise ParameterError(f"{source.name} has no parameters {unknown}; it has {sorted(defaults) or 'none'}")
    check_parameters(**defaults | parameters)
    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=".draft-") as folder:
        draft = Path(folder) / out.name
        jupytext.write(notebook, draft)
        with locked(out.with_name(f".{out.name}.lock"), str(out)), one_gpu(parameters.get("device", "cpu")):
            try:
                papermill.execute_notebook(
                    str(draft), str(out), parameters, cwd=str(project_root()), progress_bar=True, kernel_name="python3"
                )
            finally:
                _fold_injected(out)


def _fold_injected(out: Path) -> None:
    """Fold the cell of parameters that papermill adds, like the one it stands for."""
    if out.is_file():
        notebook = nbformat.read(out, as_version=4)
        for cell in notebook.cells:
            if "injected-parameters" in cell.metadata.get("tags", ()):
                cell.metadata["tags"].append("hide-input")
        nbformat.write(notebook, out)


def write_death(out: Path) -> None:
    """Put an error on the page of a chapter whose process was killed, as its notebook holds none."""
    notebook = jupytext.read(out)
    text = f"the process of this chapter died before it finished, {MEMORY}"
    error = nbformat.v4.new_output("error", ename="DeadKernelError", evalue=text, traceback=[text])
    notebook.cells.insert(0, nbformat.v4.new_code_cell("", outputs=[error]))
    nbformat.write(notebook, out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m edition.run", description=run_chapter.__doc__.split("\n")[0])
    parser.add_argument("chapter", type=Path, help="a chapter's text, such as book/dimension.md")
    parser.add_argument("--profile", type=Path, help="a YAML file of parameters, such as profiles/mini.yml")
    parser.add_argument(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="one parameter, its value as YAML: -p images 2000 -p encoders '[mini-openclip, ViT-B-32]'",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="the executed notebook; default _build/runs/<chapter>.ipynb")
    args = parser.parse_args(arguments)
    out = args.out or Path("_build/runs") / f"{args.chapter.stem}.ipynb"
    try:
        parameters = read_profile(args.profile, args.chapter.stem) if args.profile else {}
        parameters |= {name: yaml.safe_load(value) if value else "" for name, value in args.parameter}
        run_chapter(args.chapter, out, parameters)
    except (ParameterError, OSError, yaml.YAMLError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DeadKernelError as error:
        write_death(out)
        print(f"error: {args.chapter}: {error}, {MEMORY}", file=sys.stderr)
        return 1
    except papermill.PapermillExecutionError as error:
        cell = f"{args.chapter} failed in cell {error.exec_count}: {error.ename}: {error.evalue}"
        print(f"error: {cell}\nthe notebook up to there is {out}", file=sys.stderr)
        return 1
    print(json.dumps({"chapter": args.chapter.stem, "notebook": str(out), "parameters": parameters}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
