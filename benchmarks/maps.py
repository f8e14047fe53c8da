"""How much the seed of a joined encoder's maps matters: `python benchmarks/maps.py FOLDER...`.

Each folder is as `python -m miniature train dinov2-minilm --seed 1 --out PARENT` leaves it. The chapter on alignment is
run with each and its random control, one training of every method, and their accuracies are written to maps.csv.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from edition.pages import chapter_path, project_root
from edition.run import checked_parameters, run_chapter


def accuracies(folder: Path) -> pd.DataFrame:
    seed = json.loads((folder / "recipe.json").read_text())["recipe"]["seed"]
    results, source = f"_build/results/maps-{seed}", chapter_path("alignment")
    given = {"encoders": [str(folder), f"{folder}@random"], "results": results, "seeds": 1}
    parameters = checked_parameters(source, given)
    run_chapter(source, parameters, project_root() / f"_build/reruns/maps-{seed}.ipynb")
    table = pd.read_csv(project_root() / results / "alignment.csv")
    towers = table["model"].map({str(folder): "trained", f"{folder}@random": "random"})
    columns = ["maps", "tower", "images", "dataset", "method", "accuracy"]
    return table.assign(maps=seed, tower=towers, images=parameters["images"])[columns]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=project_root() / "book/measured")
    args = parser.parse_args()
    tables = [accuracies(folder.resolve()) for folder in args.folders]
    pd.concat(tables).to_csv(args.out / "maps.csv", index=False, float_format="%.6g")
    print(f"wrote {args.out / 'maps.csv'}", file=sys.stderr)


if __name__ == "__main__":
    main()
