"""What each parameter of a chapter may be."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, ValidationError, create_model

from edition.pages import ParameterError, chapter_defaults, chapter_path, read_profile
from residual.data.names import SPLITS, split_task
from residual.encoders.names import PRECISIONS, check_name, missing_package


def _data_set(value: str) -> str:
    split_task(value)  # raises ValueError
    return value


def _distinct(values: list[str]) -> list[str]:
    if repeated := sorted({value for value in values if values.count(value) > 1}):
        raise ValueError(f"{repeated} repeat; name each once")
    return values


def _device(value: str) -> str:
    if value == "cpu":
        return value
    import torch  # takes seconds

    device = torch.device(value)  # raises RuntimeError for what is not a device
    if device.type == "cuda":  # counted without opening a context on it: another process may be the one that computes
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"there are {count} CUDA devices here; 'cpu' always works")
    else:
        torch.zeros(1, device=device).item()  # raises where nothing can be computed
    return value


def _dictionary(value: str) -> str:
    if value and not Path(value).expanduser().is_file():
        raise ValueError("there is no such file; give a text file with one description to a line, or '' for ours")
    return value


Encoder = Annotated[str, AfterValidator(check_name)]
DataSet = Annotated[str, AfterValidator(_data_set)]
LISTED = {"list_type": "; in a shell, -p encoders '[mini-clip, mini-vit]'"}  # what else to say about a kind of error
READINGS = ("text", "code")  # as in residual.selection, which imports torch
PARAMETERS: dict[str, Any] = {
    "profile": Annotated[str, StringConstraints(pattern=r"^[\w-]+$")],
    "results": Annotated[str, StringConstraints(min_length=1)],  # a folder
    "encoders": Annotated[list[Encoder], Field(min_length=1), AfterValidator(_distinct)],
    "controls": Annotated[list[Encoder], AfterValidator(_distinct)],
    "without_text": Annotated[list[Encoder], AfterValidator(_distinct)],
    "tasks": Annotated[list[DataSet], Field(min_length=1), AfterValidator(_distinct)],
    "finetune": list[Annotated[str, StringConstraints(pattern=r"^(all|\S.* on .*\S)$")]],  # "encoder on task"
    "dataset": DataSet,
    "reference_images": Annotated[int, Field(ge=128)],  # the code's reading takes five eighths of them for TwoNN
    "shipped_side": Annotated[int, Field(ge=56, le=518, multiple_of=14)],  # pixels; its patches have 14
    "others": Annotated[list[DataSet], AfterValidator(_distinct)],
    "split": Literal[SPLITS],
    "images": Annotated[int, Field(ge=100)],  # TwoNN needs enough in a quarter of them
    "set_images": Annotated[int, Field(ge=100)],
    "most_images": Annotated[int, Field(ge=500)],
    "batch": Annotated[int, Field(ge=1)],
    "seed": Annotated[int, Field(ge=0)],
    "seeds": Annotated[int, Field(ge=1)],  # how many
    "base_tolerance": Annotated[float, Field(gt=0, le=1)],
    "device": Annotated[str, AfterValidator(_device)],
    "precision": Literal[PRECISIONS],
    "reading": Literal[READINGS],
    "dictionary": Annotated[str, AfterValidator(_dictionary)],
}


def check_parameters(**values: Any) -> None:
    """Check the parameters of a chapter, before any work.

    Raises ParameterError that names every bad one, its value and what it may be.
    """
    if unknown := sorted(set(values) - set(PARAMETERS)):
        raise ParameterError(f"unknown parameters {unknown}; parameters are {', '.join(PARAMETERS)}")
    fields = {name: (PARAMETERS[name], ...) for name in values}
    try:
        create_model("Parameters", __config__=ConfigDict(strict=True), **fields).model_validate(values)
    except ValidationError as error:
        problems = [(p["loc"][0], p["msg"].removeprefix("Value error, ") + LISTED.get(p["type"], ""))
                    for p in error.errors()]  # fmt: skip
    except (RuntimeError, AssertionError) as error:  # of torch, about devices
        problems = [("device", str(error))]
    else:
        problems = _check_pairs(values)
    if problems:
        raise ParameterError("; ".join(f"{name} = {values[name]!r}: {message}" for name, message in problems))


def without_missing(values: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Parameters without the encoders whose packages are not installed, and which were left out.

    Raises ParameterError where no encoder is left.
    """
    named = {key: values[key] for key in ("encoders", "controls", "without_text") if key in values}
    missing = {name: command for names in named.values() for name in names if (command := missing_package(name))}
    left = {key: [name for name in names if name not in missing] for key, names in named.items()}
    if missing and not left.get("encoders"):
        commands = " and ".join(f"`{command}`" for command in dict.fromkeys(missing.values()))
        raise ParameterError(f"the weights of {list(missing)} are not installed; run {commands}")
    return values | left, ", ".join(missing)


def _check_pairs(values: dict[str, Any]) -> list[tuple[str, str]]:
    """A problem where an encoder is in two lists, or a pair to fine-tune not among the run's encoders and tasks."""
    for name in ("controls", "without_text"):
        if both := sorted(set(values.get("encoders", ())) & set(values.get(name, ()))):
            return [(name, f"{both} are among the encoders, too; name each once")]
    if not {"encoders", "tasks", "finetune"} <= set(values):
        return []
    pairs = {f"{name} on {task}" for name in values["encoders"] for task in values["tasks"]}
    wrong = sorted(set(values["finetune"]) - pairs - {"all"})
    message = f"{wrong} are not among this run's encoders and tasks; -p finetune '[]' fine-tunes none"
    return [("finetune", message)] if wrong else []


def chapter_parameters(chapter: str, profile: Path) -> dict[str, Any]:
    """What a chapter runs with in a profile, defaults included. Raises ParameterError for bad values."""
    values = chapter_defaults(chapter_path(chapter)) | read_profile(profile, chapter)
    check_parameters(**values)
    return without_missing(values)[0]


def namespace_parameters(chapter: str, namespace: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The parameters that a notebook's first cell has assigned, and what was left out; see `without_missing`.

    Raises ParameterError for bad and missing ones, and for those of papermill that the chapter does not have.
    """
    names = chapter_defaults(chapter_path(chapter))
    if missing := sorted(set(names) - set(namespace)):
        raise ParameterError(f"no parameters {missing}; the first cell of book/{chapter}.md assigns them")
    if strange := sorted(_injected(namespace.get("In", ())) - set(names)):
        raise ParameterError(f"{chapter} has no parameters {strange}; it has {sorted(names)}")
    check_parameters(**(given := {key: namespace[key] for key in names}))
    return without_missing(given)


def _injected(sources: Iterable[str]) -> set[str]:
    """The names that papermill's own cell of parameters assigned, among the cells that were run."""
    cells = (source for source in sources if source.startswith("# Parameters"))
    assigned = (statement for source in cells for statement in ast.parse(source).body)
    return {target.id for statement in assigned for target in getattr(statement, "targets", ())}
