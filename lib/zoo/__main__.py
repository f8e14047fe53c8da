"""`python -m zoo train NAME`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from zoo.card import write_card
from zoo.recipes import RECIPES
from zoo.train import train


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zoo", description="Train the embedded encoders.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train", help="train one encoder; the same command resumes a stopped run")
    one.add_argument("name", choices=RECIPES)
    one.add_argument("--out", type=Path, default=Path("_build/zoo"), help="parent of the encoder's folder")
    one.add_argument("--npm", type=Path, default=Path("_build/artwork/node_modules"), help="made by `make artwork`")
    one.add_argument("--steps", type=int, help="instead of the recipe's")
    one.add_argument("--seed", type=int, help="instead of the recipe's")
    one.add_argument("--device", default="cpu")
    one.add_argument("--threads", type=int, help="of a CPU; two runs with one each take less time than in turn")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    changes = {key: value for key in ("steps", "seed") if (value := getattr(args, key)) is not None}
    recipe = dataclasses.replace(RECIPES[args.name], **changes)
    try:
        train(args.name, args.out / args.name, args.npm, recipe=recipe, device=args.device)
        write_card(args.name, recipe, args.out / args.name)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
