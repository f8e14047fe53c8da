"""`python -m zoo train NAME`, `card NAME`, `study NAME` and `measure FOLDER`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from zoo.card import write_card
from zoo.recipes import RECIPES
from zoo.studies import STUDIES, measure, study_recipe
from zoo.train import train


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m zoo", description="Train the embedded encoders.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train", help="train one encoder; the same command resumes a stopped run")
    one.add_argument("name", choices=RECIPES)
    one.add_argument("--steps", type=int, help="instead of the recipe's")
    one.add_argument("--seed", type=int, help="instead of the recipe's")
    one.add_argument("--keep", type=int, nargs="*", default=[], help="steps after which the encoder is kept too")
    one.set_defaults(run=_train)
    study = commands.add_parser("study", help="a short training with one thing changed, measured")
    study.add_argument("name", choices=STUDIES)
    study.set_defaults(run=_study)
    for command in (one, study):
        command.add_argument("--out", type=Path, default=Path("_build/zoo"), help="parent of the encoder's folder")
        command.add_argument(
            "--npm", type=Path, default=Path("_build/artwork/node_modules"), help="made by `make artwork`"
        )
        command.add_argument("--threads", type=int, help="of a CPU; two runs with one each take less time than in turn")
        command.add_argument("--workers", type=int, default=0, help="processes that draw batches; 3 feed a GPU")
    card = commands.add_parser("card", help="measure a trained encoder on validation splits and write its card")
    card.add_argument("name", choices=RECIPES)
    card.add_argument("--out", type=Path, default=Path("_build/zoo"), help="parent of the encoder's folder")
    card.add_argument("--machine", default="a CPU", help="that it was trained on")
    card.set_defaults(run=lambda args: write_card(args.name, RECIPES[args.name], args.out / args.name, args.machine))
    heads = commands.add_parser("measure", help="heads and accuracies of a trained encoder, as heads.csv and tasks.csv")
    heads.add_argument("folder", type=Path)
    heads.set_defaults(run=lambda args: _measure(args.folder, args.device))
    for command in (one, study, heads):
        command.add_argument("--device", default="cpu")
    return parser


def _train(args: argparse.Namespace) -> None:
    changes = {key: value for key in ("steps", "seed") if (value := getattr(args, key)) is not None}
    recipe = dataclasses.replace(RECIPES[args.name], **changes)
    options = {"device": args.device, "workers": args.workers, "keep": tuple(args.keep)}
    train(args.name, args.out / args.name, args.npm, recipe=recipe, **options)


def _study(args: argparse.Namespace) -> None:
    folder = args.out / args.name.replace(" ", "-")
    options = {"recipe": study_recipe(args.name), "device": args.device, "workers": args.workers}
    train("mini-openclip", folder, args.npm, **options)
    _measure(folder, args.device)


def _measure(folder: Path, device: str) -> None:
    for name, table in zip(("heads", "tasks"), measure(folder, device), strict=True):
        table.to_csv(folder / f"{name}.csv", index=False)


if __name__ == "__main__":
    sys.exit(main())
