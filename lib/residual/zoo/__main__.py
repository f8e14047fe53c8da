"""`python -m residual.zoo train NAME`."""

from __future__ import annotations

import argparse
from pathlib import Path

from residual.zoo.train import train_clip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m residual.zoo", description="Train the embedded encoders.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train one encoder; the same command resumes a stopped run")
    train.add_argument("name", choices=["mini-openclip"])
    train.add_argument("--out", type=Path, default=Path("_build/zoo"), help="parent of the encoder's folder")
    train.add_argument("--npm", type=Path, default=Path("_build/artwork/node_modules"), help="made by `make artwork`")
    train.add_argument("--steps", type=int, default=3600)
    train.add_argument("--batch", type=int, default=256)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", default="cpu")
    args = parser.parse_args()
    train_clip(args.out / args.name, args.npm, steps=args.steps, batch=args.batch, seed=args.seed, device=args.device)


if __name__ == "__main__":
    main()
