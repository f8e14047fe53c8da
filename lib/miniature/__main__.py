"""`python -m miniature train NAME` and `card NAME`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from miniature import JOINED
from miniature.training.card import write_card
from miniature.training.joining import JoinRecipe, train_joined, write_joined_card
from miniature.training.recipes import RECIPES
from miniature.training.train import train
from residual.encoders.names import joining

KNOWN = f"one of {', '.join((*RECIPES, *JOINED))}, or a folder with joined.json"


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
    parser = argparse.ArgumentParser(prog="python -m miniature", description="Train the embedded encoders.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train", help="train one encoder; the same command resumes a stopped run")
    one.add_argument("name", type=_trainable, help=KNOWN)
    one.add_argument("--steps", type=int, help="instead of the recipe's")
    one.add_argument("--seed", type=int, help="instead of the recipe's")
    one.set_defaults(run=_train)
    one.add_argument("--out", type=Path, default=Path("_build/miniature"), help="parent of the encoder's folder")
    one.add_argument("--npm", type=Path, default=Path("_build/artwork/node_modules"), help="made by `make artwork`")
    one.add_argument("--threads", type=int, help="of a CPU; two runs with one each take less time than in turn")
    one.add_argument("--workers", type=int, default=0, help="processes that draw batches; 3 feed a GPU")
    one.add_argument("--device", default="cpu")
    card = commands.add_parser("card", help="measure a trained encoder on validation splits and write its card")
    card.add_argument("name", type=_trainable, help="as for train")
    card.add_argument("--out", type=Path, default=Path("_build/miniature"), help="parent of the encoder's folder")
    card.add_argument("--machine", default="a CPU", help="that it was trained on")
    card.set_defaults(run=_card)
    return parser


def _trainable(name: str) -> str:
    if name in RECIPES or joining(name):
        return name
    raise argparse.ArgumentTypeError(f"{name!r} is unknown; give {KNOWN}")


def _card(args: argparse.Namespace) -> None:
    folder = args.out / Path(args.name).name
    if args.name not in RECIPES:
        return write_joined_card(args.name, folder)
    return write_card(args.name, RECIPES[args.name], folder, args.machine)


def _train(args: argparse.Namespace) -> None:
    changes = {key: value for key in ("steps", "seed") if (value := getattr(args, key)) is not None}
    if args.name not in RECIPES:
        return train_joined(args.name, args.out / Path(args.name).name, JoinRecipe(**changes), device=args.device)
    recipe = dataclasses.replace(RECIPES[args.name], **changes)
    train(args.name, args.out / args.name, args.npm, recipe=recipe, device=args.device, workers=args.workers)


if __name__ == "__main__":
    sys.exit(main())
