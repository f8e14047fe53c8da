"""Runs a chapter with other parameters: `python -m residual.chapters book/dimension.md -p images 2000`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import jupytext
import nbformat
import pandas as pd
import papermill
import torch
import yaml
from nbclient.exceptions import DeadKernelError
from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, ValidationError, create_model
from torch import Tensor

from residual.alignment import Bases, coordinates
from residual.data import SPLITS, Dataset, load_dataset, split_task
from residual.devices import one_gpu
from residual.encoders import Encoder as LoadedEncoder
from residual.extraction import PRECISIONS, extract, extracted
from residual.sources import check_name
from residual.store import StoredUnits, locked

STARTED = time.monotonic()
LIBRARIES = ("residual", "torch", "open_clip_torch", "transformers", "scikit-learn", "numpy")
IN_MEMORY = 2 * 10**9  # bytes of coordinates, from which on they lie in files


def _one_of(options: tuple[str, ...]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in options:
            raise ValueError(f"choose from {', '.join(options)}")
        return value

    return AfterValidator(check)


def _data_set(value: str) -> str:
    split_task(value)  # raises ValueError
    return value


def _distinct(values: list[str]) -> list[str]:
    if repeated := sorted({value for value in values if values.count(value) > 1}):
        raise ValueError(f"{repeated} repeat; name each once")
    return values


def _device(value: str) -> str:
    device = torch.device(value)  # raises RuntimeError for what is no device
    if device.type == "cuda":  # told without a context on it: it may be another process that computes
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"there are {count} CUDA devices here; 'cpu' always works")
    else:
        torch.zeros(1, device=device).item()  # raises where nothing can be computed there
    return value


def _dictionary(value: str) -> str:
    if value and not Path(value).expanduser().is_file():
        raise ValueError("there is no such file; give a text file with one description to a line, or '' for our own")
    return value


Encoder = Annotated[str, AfterValidator(check_name)]
PARAMETERS: dict[str, Any] = {
    "profile": Annotated[str, StringConstraints(pattern=r"^[\w-]+$")],
    "encoders": Annotated[list[Encoder], Field(min_length=1), AfterValidator(_distinct)],
    "controls": Annotated[list[Encoder], AfterValidator(_distinct)],
    "tasks": Annotated[list[Annotated[str, AfterValidator(_data_set)]], Field(min_length=1), AfterValidator(_distinct)],
    "dataset": Annotated[str, AfterValidator(_data_set)],
    "split": Annotated[str, _one_of(SPLITS)],
    "images": Annotated[int, Field(ge=100)],  # a quarter of them must do for TwoNN
    "batch": Annotated[int, Field(ge=1)],
    "seed": Annotated[int, Field(ge=0)],
    "seeds": Annotated[int, Field(ge=1)],  # how many
    "finetune": list[Annotated[str, StringConstraints(pattern=r"^\S+ on \S+$")]],  # "encoder on task"
    "base_tolerance": Annotated[float, Field(gt=0, le=1)],
    "reference_images": Annotated[int, Field(ge=100)],
    "others": Annotated[list[Annotated[str, AfterValidator(_data_set)]], AfterValidator(_distinct)],
    "device": Annotated[str, AfterValidator(_device)],
    "precision": Annotated[str, _one_of(tuple(PRECISIONS))],
    "workers": Annotated[int, Field(ge=0)],
    "dictionary": Annotated[str, AfterValidator(_dictionary)],
}


class ParameterError(ValueError):
    """A chapter was given a parameter that is unknown or ill-typed."""


def check_parameters(**given: Any) -> None:
    """Check the parameters of a chapter, before any work.

    Raises ParameterError that names every bad one, its value and what it may be.
    """
    if unknown := sorted(set(given) - set(PARAMETERS)):
        raise ParameterError(f"unknown parameters {unknown}; parameters are {', '.join(PARAMETERS)}")
    fields = {name: (PARAMETERS[name], ...) for name in given}
    try:
        create_model("Parameters", __config__=ConfigDict(strict=True), **fields).model_validate(given)
    except (ValidationError, RuntimeError, AssertionError) as error:
        problems = error.errors() if isinstance(error, ValidationError) else [{"loc": ("device",), "msg": str(error)}]
        lines = [f"{p['loc'][0]} = {given[p['loc'][0]]!r}: {p['msg'].removeprefix('Value error, ')}" for p in problems]
        raise ParameterError("; ".join(lines)) from None


def project_root() -> Path:
    """The project's folder, from anywhere inside it. Raises FileNotFoundError outside."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "_toc.yml").is_file():
            return folder
    raise FileNotFoundError(f"{here} is not inside the project (no _toc.yml above it)")


def published(name: str) -> pd.DataFrame:
    """A table of the paper's numbers, from book/published."""
    return pd.read_csv(project_root() / "book/published" / f"{name}.csv")


def save_results(table: pd.DataFrame, profile: str, name: str) -> Path:
    """Write a tidy table of this run to _build/results/<profile>/<name>.csv."""
    path = project_root() / "_build/results" / profile / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    table.to_csv(partial, index=False, float_format="%.6g")
    os.replace(partial, path)
    return path


def load_results(profile: str, name: str, *, chapter: str) -> pd.DataFrame:
    """A table that `save_results` of another chapter left. Raises FileNotFoundError that names the chapter to run."""
    path = project_root() / "_build/results" / profile / f"{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; run make chapter CHAPTER={chapter} PROFILE={profile} first, or make book")
    return pd.read_csv(path)


def stored(
    encoder: LoadedEncoder, data: Dataset, batch: int, precision: str, *, moments_only: bool = False
) -> StoredUnits:
    """The units of a data set, extracted by whichever chapter comes first.

    moments_only: coordinates are not needed; they are there only if another chapter wanted them.
    """
    options = {"root": project_root() / "_build/units", "batch": batch, "precision": precision}
    if moments_only and not extracted(encoder, data, coordinates="float32", **options):
        return extract(encoder, data, progress=False, **options)
    return extract(encoder, data, coordinates="float32", progress=False, **options)


@contextmanager
def residual_inputs(units: dict[str, StoredUnits], bases: Bases) -> Iterator[dict[str, Tensor]]:
    """`residual.alignment.coordinates` of every split. Above 2 GB they lie in half precision in files, while in use."""
    if 4 * bases.width * sum(own.manifest.count for own in units.values()) <= IN_MEMORY:
        yield {split: coordinates(own, bases) for split, own in units.items()}
        return
    manifest = next(iter(units.values())).manifest
    name = f"{Path(manifest.encoder).name}--{Path(manifest.dataset).name}--{bases.kind}".replace(":", "_")
    folder = project_root() / "_build/coordinates" / name
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{name}.lock"), str(folder)):
        yield {split: coordinates(own, bases, folder) for split, own in units.items()}
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left is used by the next one, and removed


def task_split(name: str, split: str, images: int, seed: int, *, balanced: bool = False) -> Dataset:
    """At most `images` of a data set; balanced: of each class as many as can be, else the first."""
    data = load_dataset(name, split, seed=seed)
    count = min(images, len(data))
    return data.balanced(count) if balanced else data.head(count)


def task_parts(task: str, images: int, seed: int) -> dict[str, tuple[Dataset, Tensor]]:
    """Every split of a task: its data set, at most `images` of it (half of that for validation), and the task's labels.

    Tasks of one data set have their images in common. Training images are balanced over its classes.
    Raises ValueError where a class has no training image.
    """
    own, factor = split_task(task)
    parts = {}
    for split in SPLITS:
        data = task_split(own, split, images // 2 if split == "validation" else images, seed, balanced=split == "train")
        parts[split] = data, data.factors[factor].values if factor else data.labels
    data, labels = parts["train"]
    count = len(data.factors[factor].names if factor else data.classes)
    if missing := count - len(labels.unique()):
        raise ValueError(f"images = {images}: {missing} of {count} classes of {task} have no training image; take more")
    return parts


def task_units(
    encoder: LoadedEncoder,
    task: str,
    images: int,
    seed: int,
    batch: int,
    precision: str,
    *,
    splits: tuple[str, ...] = SPLITS,
) -> tuple[dict[str, StoredUnits], dict[str, Tensor]]:
    """Units and labels of every split of a task; see `task_parts` and `stored`."""
    parts = task_parts(task, images, seed)
    units = {split: stored(encoder, parts[split][0], batch, precision) for split in splits}
    return units, {split: parts[split][1] for split in splits}


def run_card(**facts: Any) -> pd.DataFrame:
    """What a reader needs to repeat a run: parameters, commit, versions, machine, seconds."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=project_root(), capture_output=True, text=True, check=False
    )
    rows = {name: ", ".join(value) if isinstance(value, list) else value for name, value in facts.items()}
    rows["commit"] = commit.stdout.strip() or "not a git checkout"
    rows["Python"] = platform.python_version()
    rows |= {library: version(library) for library in LIBRARIES}
    rows["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    rows["seconds"] = round(time.monotonic() - STARTED)
    return pd.DataFrame({"value": {name: str(value) for name, value in rows.items()}})


def run_chapter(source: Path, out: Path, parameters: dict[str, Any]) -> None:
    """Execute a chapter through papermill, and write the notebook with its outputs.

    Raises ParameterError before any work; papermill's PapermillExecutionError, with the
    notebook up to there in `out`, when a cell fails.
    """
    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=".draft-") as folder:
        draft = Path(folder) / out.name
        jupytext.write(notebook, draft)
        known = papermill.inspect_notebook(str(draft))
        if unknown := sorted(set(parameters) - set(known)):
            raise ParameterError(f"{source.name} has no parameters {unknown}; it has {sorted(known) or 'none'}")
        check_parameters(**parameters)
        with locked(out.with_name(f".{out.name}.lock"), str(out)), one_gpu(parameters.get("device", "cpu")):
            papermill.execute_notebook(
                str(draft), str(out), parameters, cwd=str(project_root()), progress_bar=True, kernel_name="python3"
            )


def tell_death(out: Path) -> None:
    """Say on the page of a chapter whose process was killed that it was: the notebook itself holds no error."""
    notebook = jupytext.read(out)
    text = "the process of this chapter died before its end, most likely for want of memory"
    error = nbformat.v4.new_output("error", ename="DeadKernelError", evalue=text, traceback=[text])
    notebook.cells.insert(0, nbformat.v4.new_code_cell("", outputs=[error]))
    nbformat.write(notebook, out)


def read_profile(path: Path, chapter: str) -> dict[str, Any]:
    """The parameters of a chapter in a profile. Raises ParameterError for a file that is none."""
    profile = yaml.safe_load(path.read_text())
    own = (profile.get(chapter) or {}) if isinstance(profile, dict) else None
    if not isinstance(own, dict):
        raise ParameterError(f"{path} is no profile: it must map chapters to parameters")
    return own


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m residual.chapters", description=run_chapter.__doc__.split("\n")[0])
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
        parameters |= {name: yaml.safe_load(value) for name, value in args.parameter}
        run_chapter(args.chapter, out, parameters)
    except (ParameterError, OSError, yaml.YAMLError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DeadKernelError as error:
        tell_death(out)
        print(f"error: {args.chapter}: {error}, most likely for want of memory", file=sys.stderr)
        return 1
    except papermill.PapermillExecutionError as error:
        print(
            f"error: {args.chapter} failed in cell {error.exec_count}: {error.ename}: {error.evalue}", file=sys.stderr
        )
        print(f"the notebook up to there is {out}", file=sys.stderr)
        return 1
    print(json.dumps({"chapter": args.chapter.stem, "notebook": str(out), "parameters": parameters}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
