"""Runs a chapter: `python -m edition.run dimension -p images 2000`."""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import yaml

from edition.pages import (
    BOOK,
    PROFILE,
    ParameterError,
    chapter_defaults,
    find_chapter,
    find_profile,
    forget_tables,
    project_root,
    read_profile,
    run_name,
)
from edition.parameters import check_parameters

KEPT = "What was extracted and trained so far is kept: the same command goes on from there."
EPILOG = """
Results of a run with other parameters than its profile's go to a folder of their own, named after what differs,
_build/results/mini--images-2000 for example, and never change the book. `papermill` and `jupyter nbconvert --execute`
do the same with a notebook that `jupytext --to ipynb` made of the chapter.
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


def run_chapter(
    source: Path, given: dict[str, Any], *, profile: Path | None = None, out: Path | None = None,
    cells: Path | None = None,
) -> tuple[Path, str]:  # fmt: skip
    """Execute a chapter with parameters that differ from its text's; returns its notebook and the name of the run.

    profile: the file that they come from, with which the name of the run compares them. out: where the notebook goes,
    by default _build/reruns/<name of the run>. cells: see `execute_chapter`; given for a run of the book.
    Raises ParameterError before any work, ChapterError when a cell fails.
    """
    parameters = checked_parameters(source, given)
    if profile:
        os.environ[PROFILE] = str(profile)
        if parameters.get("profile") != profile.stem:
            raise ParameterError(f"profile = {parameters['profile']!r} is not that of {profile}; leave it out")
    if cells:
        os.environ[BOOK] = "1"
    name = run_name(source, parameters)
    out = out or project_root() / "_build/reruns" / name / f"{source.stem}.ipynb"
    if cells:
        forget_tables(name, source.stem)
    from edition.execute import execute_chapter  # takes a second to import, with papermill

    execute_chapter(source, out, parameters, cells=cells)
    return out, name


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
    parser.add_argument("--cells", type=Path, help="a file for progress, in place of a bar and of a page")
    return parser


def _value(name: str, text: str) -> Any:
    """A parameter's value from the command line, as YAML; an empty one is an empty text."""
    try:
        return yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise ParameterError(f"{name} = {text!r} is not YAML: {' '.join(str(error).split())}") from error


def _carry_out(args: argparse.Namespace) -> None:
    source = find_chapter(args.chapter)
    profile = find_profile(args.profile) if args.profile else None
    given = read_profile(profile, source.stem) if profile and chapter_defaults(source) else {}
    given |= {name: _value(name, text) for name, text in args.parameter}
    out, name = run_chapter(source, given, profile=profile, out=args.out, cells=args.cells)
    if args.cells:
        return
    from edition.preview import build_page

    print(f"notebook  {out}\npage      {build_page(out)}")
    results = project_root() / "_build/results" / name
    print(f"results   {results if results.is_dir() else 'none: this chapter saves no tables'}")


def main(arguments: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _carry_out(_parser().parse_args(arguments))
    except KeyboardInterrupt:
        print(f"stopped. {KEPT}", file=sys.stderr)
        return 130
    except (ParameterError, OSError, yaml.YAMLError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # a chapter that failed, whose error says where
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
