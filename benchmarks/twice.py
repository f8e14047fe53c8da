"""Counts the images that an encoder reads twice in a run, by their pixels: `python benchmarks/twice.py mini`."""

from __future__ import annotations

import argparse
from collections import Counter

from edition.inputs import Extraction, jobs
from edition.pages import find_profile


def repeated(wanted: list[Extraction]) -> tuple[int, Counter[str]]:
    """Images that an encoder reads, and of these how many an extraction before has read, by where they come."""
    first: dict[bytes, Extraction] = {}
    again: Counter[str] = Counter()
    for extraction in wanted:
        for image in extraction.data().images:
            before = first.setdefault(image.numpy().tobytes(), extraction)
            if before != extraction:
                again[f"of {extraction.dataset}/{extraction.split} in {before.dataset}/{before.split}"] += 1
    return sum(len(extraction.data()) for extraction in wanted), again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", help="a profile whose data sets are drawn")
    profile = find_profile(parser.parse_args().profile)
    wanted = jobs(profile)
    for encoder in dict.fromkeys(extraction.encoder for extraction in wanted):
        count, again = repeated([extraction for extraction in wanted if extraction.encoder == encoder])
        listed = "; ".join(f"{number} {places}" for places, number in again.items())
        print(f"{encoder}: {count:,} images, {again.total()} twice{': ' + listed if listed else ''}")


if __name__ == "__main__":
    main()
