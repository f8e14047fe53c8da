"""Runs a chapter: `python -m edition.run dimension -p images 2000`."""

from __future__ import annotations

import argparse
import difflib
import subprocess
import sys
from pathlib import Path
from typing import Any

import jupytext
import papermill
import yaml
from nbclient.exceptions import DeadKernelError

from edition.pages import ParameterError, chapter_defaults, find_chapter, find_profile, project_root, read_profile
from edition.parameters import check_parameters
from edition.results import outputs
from residual.files import locked

EPILOG = """
Results go to the folder `results`, by default _build/results/rerun, and never change the book. `papermill` and `jupyter
nbconvert --execute` do the same with a notebook that `jupytext --to ipynb` made of the chapter.
"""


def checked_parameters(source: Path, given: dict[str, Any]) -> dict[str, Any]:
    """All parameters of a chapter, defaults included. Raises ParameterError for wrong values and unknown names."""
    defaults = chapter_defaults(source)
    if not defaults:
        raise ParameterError(f"{source.name} has no parameters, and nothing to run")
    if unknown := sorted(set(given) - set(defaults)):
        close = difflib.get_close_matches(unknown[0], defaults, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        raise ParameterError(f"{source.name} has no parameters {unknown}{hint} it has {sorted(defaults)}")
    check_parameters(**defaults | given)
    return defaults | given


def run_chapter(source: Path, parameters: dict[str, Any], out: Path, *, progress: bool = True) -> None:
    """Execute a chapter through papermill; its notebook, as far as it got, is `out`.

    Raises RuntimeError, with the cell and the error, where a cell fails or its process dies.
    """
    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_suffix(".draft.ipynb")  # of a run that was killed, the next one's takes the place
    with locked(out.with_suffix(".lock"), str(out)):
        jupytext.write(notebook, draft)
        options = {"cwd": str(project_root()), "kernel_name": "python3", "progress_bar": progress}
        options["extra_arguments"] = ["--IPKernelApp.log_level=CRITICAL"]  # cells tell their own errors
        try:
            papermill.execute_notebook(str(draft), str(out), parameters, **options)
        except papermill.PapermillExecutionError as error:
            told = f"{source.name} failed in cell {error.exec_count}: {error.ename}: {error.evalue}"
            raise RuntimeError(f"{told}\nthe notebook up to there is {out}") from error
        except DeadKernelError as error:
            raise RuntimeError(f"{source.name}: its process died, probably out of memory; see {out}") from error
        finally:
            draft.unlink()


def build_page(notebook: Path) -> Path:
    """The page of an executed notebook by itself, in _build/pages. Links to other pages are left as they are."""
    root, tool = project_root(), Path(sys.executable).with_name("jupyter-book")
    options = ["--quiet", "--config", str(root / "_config.yml"), "--path-output", str(root / "_build/pages")]
    done = subprocess.run([tool, "build", *options, notebook], capture_output=True, text=True, check=False)
    page = root / f"_build/pages/_build/_page/{notebook.stem}/html/{notebook.stem}.html"
    if done.returncode or not page.is_file():
        raise RuntimeError(f"the page of {notebook} could not be built: {done.stderr.strip()[-1000:]}")
    return page


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m edition.run", description="Run one chapter, with parameters of your own.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("chapter", help="a chapter's name or text, such as dimension or book/dimension.md")
    parser.add_argument("--profile", help="a file of parameters, or the name of one in profiles/, such as mini")
    parser.add_argument(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="one parameter, its value as YAML: -p images 2000 -p encoders '[mini-openclip, ViT-B-32]'",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="the executed notebook; by default in _build/reruns")
    parser.add_argument("--book", action="store_true", help="for the book: no progress bar, and no page of its own")
    return parser


def _value(name: str, text: str) -> Any:
    """A parameter's value from the command line, as YAML; an empty one is an empty text."""
    try:
        return yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise ParameterError(f"{name} = {text!r} is not YAML: {' '.join(str(error).split())}") from error


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        source = find_chapter(args.chapter)
        profile = find_profile(args.profile) if args.profile else None
        given = read_profile(profile, source.stem) if profile and chapter_defaults(source) else {}
        parameters = checked_parameters(source, given | {name: _value(name, text) for name, text in args.parameter})
        out = (args.out or project_root() / f"_build/reruns/{source.stem}.ipynb").absolute()
        run_chapter(source, parameters, out, progress=not args.book)
        if not args.book:
            results = project_root() / parameters["results"]
            print(f"notebook  {out}\npage      {build_page(out)}\nresults   {results}")
            for name in outputs(source.stem).folders:
                how = "; README.md, In a script, says how to use them" if name == "adapters" else ""
                print(f"{name:9s} {results / name}{how}")
    except KeyboardInterrupt:
        print("stopped. What was extracted and trained is kept: the same command goes on from there.", file=sys.stderr)
        return 130
    except (ParameterError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
