"""Every chapter of the profile `paper` on a hub of our own: its names and graph, with small sets and encoders."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from conftest import copy_project
from edition.pages import chapter_defaults, chapter_path, project_root
from hub_server import Hub
from miniature import WEIGHTS
from residual.data.catalogue import catalogue
from residual.encoders.names import PAPER
from test_hub import write_tar

ROOT = project_root()
STANDINS = {"BLIP-L": "mini-blip", "DINOv2-L": "mini-dinov2", "ViT-L": "mini-vit"}
# Splits of the hub's sets and their images, written down apart from the catalogue, which must agree.
LISTING = {
    "clip-benchmark/wds_imagenet1k": {"train": 1_281_167, "test": 50_000},
    "clip-benchmark/wds_vtab-cifar10": {"train": 45_000, "test": 10_000},
    "clip-benchmark/wds_vtab-cifar100": {"train": 45_000, "test": 10_000},
    "clip-benchmark/wds_imagenet_sketch": {"test": 50_889},
    "clip-benchmark/wds_cars": {"train": 8_144, "test": 8_041},
    "clip-benchmark/wds_mnist": {"train": 60_000, "test": 10_000},
    "clip-benchmark/wds_vtab-svhn": {"train": 65_931, "test": 26_032},
    "clip-benchmark/wds_vtab-eurosat": {"train": 16_200, "test": 5_400},
    "clip-benchmark/wds_vtab-resisc45": {"train": 18_900, "test": 6_300},
    "clip-benchmark/wds_vtab-dtd": {"train": 1_880, "test": 1_880},
    "clip-benchmark/wds_sun397": {"test": 108_754},
    "clip-benchmark/wds_gtsrb": {"train": 26_640, "test": 12_630},
    "flwrlabs/pacs": {"train": 9_991},
}
SIZES = {"images": 120, "reference_images": 150}
CLASSES = "red thing", "green thing", "blue thing"


def write_sets(folder: Path) -> dict[str, Path]:
    """A small set in the layout of the hub's for every set of the catalogue, one of them with a corrupt image."""
    found = {}
    names = {entry.repo: name for name, entry in catalogue().items()}
    for repo, splits in LISTING.items():
        own, name = folder / repo.replace("/", "--"), names[repo]
        found[repo] = own
        for split, count in (("train", 180), ("test", 75)):
            if split in splits:
                write_tar(own / split / "0.tar", count, broken=(7,) if name == "svhn" else ())
                (own / split / "nshards.txt").write_text("1\n")
        (own / "classnames.txt").write_text("\n".join(CLASSES))
        (own / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na drawing of a {c}.")
    return found


def rehearsal(profile: dict) -> dict:
    """The paper's profile with encoders that can be stood in for, fewer images, and bases that may be far off."""
    given = {chapter: dict(own) for chapter, own in profile.items()}  # anchors of the profile share theirs
    for chapter, own in given.items():
        own["profile"] = "rehearsal"
        if "encoders" in own:
            own["encoders"] = [name for name in own["encoders"] if name in STANDINS] or ["BLIP-L"]
        if "without_text" in own:
            own["without_text"] = [name for name in own["without_text"] if name in STANDINS][:1]
        own |= {name: size for name, size in SIZES.items() if name in own}
        if "tasks" in own:
            own["tasks"] = own["tasks"][:2]
        if "base_tolerance" in chapter_defaults(chapter_path(chapter)):
            own["base_tolerance"] = 1.0
        if "seeds" in own:
            own["seeds"] = 1
    small = {"profile": "rehearsal", "encoders": ["mini-openclip"], "controls": [], "tasks": ["digits"], "images": 100}
    given["data"] = small
    return given


def test_the_catalogue_says_what_the_hub_lists():
    assert {entry.repo for entry in catalogue().values()} == set(LISTING)
    for name, entry in catalogue().items():
        listed = LISTING[entry.repo]
        assert (entry.train, entry.test) == (listed.get("train", 0), listed.get("test", 0)), name


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A copy of the project, and the surroundings in which the hub is ours."""
    folder = tmp_path_factory.mktemp("rehearsal")
    project = copy_project(folder / "le projet")
    paper = yaml.safe_load((ROOT / "profiles/paper.yml").read_text())
    (project / "profiles/rehearsal.yml").write_text(yaml.safe_dump(rehearsal(paper)))
    repos = write_sets(folder / "sets") | {PAPER[name].id: WEIGHTS / own for name, own in STANDINS.items()}
    with Hub(repos).serving() as server:
        own = {"HF_ENDPOINT": server.address, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
        yield project, os.environ | own


def start(project: Path, env: dict[str, str], *, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "snakemake", "--nolock", "--rerun-incomplete", "--cores", "2"]
    command += ["--rerun-triggers", "mtime", "input", "--config", "profile=rehearsal", "units=1"]
    with log.open("w") as file:
        return subprocess.Popen(
            command, cwd=project, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def tables(project: Path) -> dict[str, pd.DataFrame]:
    """Every table of a run, less what took how long."""
    found = sorted((project / "_build/results/rehearsal").glob("*.csv"))
    read = {path.name: pd.read_csv(path).drop(columns="seconds", errors="ignore") for path in found}
    del read["costs.csv"]
    return read


@pytest.mark.slow
def test_the_papers_book_is_built_and_survives_kills_with_the_same_tables(served, tmp_path):
    project, env = served
    killed = tmp_path / "killed"
    shutil.copytree(project, killed, symlinks=True)
    assert start(project, env, log=tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()[-5000:]
    cells = tables(project)["reproduction.csv"]
    assert set(cells["chapter"]) == {"dimension", "similarity", "selection", "alignment"}
    assert set(cells["model"].dropna()) == set(STANDINS)
    page = (project / "_build/html/selection.html").read_text()
    assert "(+" in page or "(-" in page
    generator = random.Random(0)
    for _ in range(6):
        run = start(killed, env, log=tmp_path / "log")
        time.sleep(generator.uniform(15, 60))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    assert start(killed, env, log=tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()[-5000:]
    ours, theirs = tables(killed), tables(project)
    assert ours.keys() == theirs.keys()
    for name, table in theirs.items():
        pd.testing.assert_frame_equal(ours[name], table, check_exact=True, obj=name)
