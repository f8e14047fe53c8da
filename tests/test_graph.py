"""The plan tells what the chapters extract, and the graph survives kills and failures."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import pandas as pd
import pytest
import torch
import yaml
from huggingface_hub import constants
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import residual
from conftest import small_project
from edition import build, downloads, inputs, plan
from edition.chapter import Chapter
from edition.inputs import Extraction, encoder_for, jobs, jobs_by_chapter
from edition.pages import after, chapters, project_root
from edition.parameters import chapter_parameters
from edition.plan import main
from edition.results import outputs
from residual import load_encoder, load_units, trace
from residual.data.hub import DataError
from residual.store import read_manifest

ROOT = project_root()
SNAKEMAKE = [sys.executable, "-m", "snakemake", "--cores", "2", "--nolock", "--rerun-incomplete", "--keep-going"]
SNAKEMAKE += ["--rerun-triggers", "mtime", "input"]


def snake(folder, *targets, config=("profile=few", "units=1"), options=()):
    command = [*SNAKEMAKE, *options, "--config", *config, "--", *targets]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def moments(folder: Path) -> dict[str, list]:
    found = {}
    for path in folder.glob("*--*"):
        units = load_units(path)
        found[path.name] = [
            getattr(units, name).scatter for name in ("head_moments", "block_moments", "output_moments")
        ]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A project whose small profile is extracted, job by job."""
    folder = small_project(tmp_path_factory.mktemp("whole") / "project")
    with contextlib.chdir(folder):
        for job in jobs(folder / "profiles/few.yml"):
            assert inputs.main([str(folder / "profiles/few.yml"), job.name]) == 0
    return folder


def test_the_paper_is_planned_offline_with_every_job(capsys, monkeypatch):
    monkeypatch.setattr(plan, "encoder_cost", lambda *name: plan.Cost(1e11, 900, 100, 10**6, 10**8, 50.0, 1e6))
    assert main(["paper", "--tflops", "50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    extracted = [row for row in found["jobs"] if row["what"] == "extraction"]
    images = {row["job"]: row["images"] for row in extracted}
    assert len(images) == len(extracted) == len(jobs(ROOT / "profiles/paper.yml"))
    (reference,) = (row for row in extracted if row["job"].startswith("OpenCLIP-L--imagenet--"))
    (two_nn,) = (r for r in found["jobs"] if (r["what"], r["encoder"]) == ("TwoNN", "OpenCLIP-L"))
    assert two_nn["hours"] == pytest.approx(80_000**2 * 50 / 50e12 / 3600)
    assert reference["images"] == 80_000
    assert reference["hours"] == pytest.approx(80_000 * 1e11 / 50e12 / 3600)
    assert reference["bytes"] == 80_000 * 1000 + 20 * 10**6
    assert found["downloads"]["imagenet"]["gated"]
    assert main(["paper", "--tflops", "50"]) == 0
    assert "imagenet" in (shown := capsys.readouterr().out)
    assert f"{len(images)} extractions, 0 of them there" in shown
    assert re.search(r"IT DOES NOT FIT, [\d,]+ GB more are needed|it fits", shown)


@pytest.mark.parametrize("text", ["a: [1\n  b: }\n", "5\n", "dimension: 5\n"])
@pytest.mark.parametrize("command", [main, build.main])
def test_what_is_no_profile_is_refused_in_one_line(text, command, tmp_path, capsys):
    (tmp_path / "wrong.yml").write_text(text)
    assert command([str(tmp_path / "wrong.yml")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {tmp_path}/wrong.yml is not a profile: ")
    assert told.count("\n") == 1


@pytest.mark.parametrize("module", ["run dimension", "build", "plan mini", "inputs mini job"])
def test_outside_the_project_commands_refuse_in_one_line(module, tmp_path):
    command = [sys.executable, "-m", *f"edition.{module}".split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        done.stderr == f"error: {tmp_path} is not inside the project; go there, or give papermill its folder by --cwd\n"
    )


def test_every_training_is_counted_and_a_chapter_that_ran_is_done(inside, capsys):
    """One for each encoder, task and seed; tasks of one set count apart, and encoders without text once each."""
    own = {
        "encoders": ["mini-clip"],
        "without_text": ["mini-vit"],
        "tasks": ["shapes-shape", "shapes-colour", "digits"],
    }
    own |= {"dataset": "digits", "reference_images": 130, "images": 100, "seeds": 2}
    (inside / "profiles/own.yml").write_text(yaml.safe_dump({"alignment": own}))
    rows = plan.analysis("alignment", inside / "profiles/own.yml")
    assert [(row["what"], row["encoder"]) for row in rows] == [("trainings", "mini-clip")] * 3 + [
        ("trainings", "mini-vit")
    ]
    assert rows[0]["flops"] == 4 * 30 * 2 * 100 * plan.encoder_cost("mini-clip", 112).step
    assert rows[3]["flops"] == 4 * 30 * 100 * plan.encoder_cost("mini-vit", 112).step
    assert not any(row["done"] for row in rows)
    (inside / "_build/runs/own").mkdir(parents=True)
    (inside / "_build/runs/own/alignment.ipynb").touch()
    assert all(row["done"] for row in plan.analysis("alignment", inside / "profiles/own.yml"))


def test_without_sizes_there_is_no_verdict(capsys, monkeypatch):
    monkeypatch.setattr(plan, "encoder_cost", lambda *name: None)
    assert main(["tiny"]) == 0
    told = capsys.readouterr().out
    assert "disk: at least 0.0 GB" in told
    assert "it fits" not in told


def test_hours_are_those_of_a_card_that_was_measured_or_of_none(capsys, monkeypatch):
    monkeypatch.setattr(plan, "encoder_cost", lambda *name: plan.Cost(1e11, 900, 100, 10**6, 10**8, 50.0, 1e6))
    assert main(["tiny", "--gpu", "h100", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["jobs"][0]
    measured = pd.read_csv(ROOT / "book/measured/gpu.csv").query("variant == 'traced' and precision == 'float32'")
    speed = measured.set_index("encoder")["share_of_peak"]["ViT-L/14"] * 702e12
    assert row["hours"] == pytest.approx(row["images"] * 1e11 / speed / 3600)
    assert main(["tiny", "--gpu", "abacus"]) == 2
    assert "no card 'abacus' was measured, only NVIDIA H100" in capsys.readouterr().err
    assert main(["tiny"]) == 0
    assert "without hours, as neither --gpu nor --tflops is given" in capsys.readouterr().out


def test_what_is_there_already_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    rest = "test", 100, False, True, 0, 128
    own = [Extraction("BLIP-L", "mnist", *rest), Extraction("CLIP-B", "org/x", *rest)]
    weights = {"BLIP-L": 10, "CLIP-B": 20}
    assert not any(found["there"] for found in downloads.downloads(own, weights).values())
    (tmp_path / "hub/models--timm--vit_base_patch16_clip_224.openai/snapshots/a").mkdir(parents=True)
    (tmp_path / "hub/models--timm--vit_base_patch16_clip_224.openai/snapshots/a/weights").write_text("")
    (tmp_path / "datasets/org___x/default/0.0.0").mkdir(parents=True)
    (tmp_path / "datasets/org___x/default/0.0.0/dataset_info.json").write_text("")
    tars = tmp_path / "hub/datasets--clip-benchmark--wds_mnist"
    (tars / "snapshots/a/test").mkdir(parents=True)
    (tars / "snapshots/a/test/0.tar").write_text("")
    assert downloads.downloads(own, weights)["mnist"]["there"]
    (tars / "blobs").mkdir()
    (tars / "blobs/b.incomplete").write_text("")
    found = downloads.downloads(own, weights)
    assert {name: one["there"] for name, one in found.items()} == {
        "BLIP-L": False, "CLIP-B": True, "mnist": False, "org/x": True,
    }  # fmt: skip
    assert found["mnist"]["kept"] == 2 * found["mnist"]["bytes"]
    assert found["org/x"]["bytes"] is None


def test_encoders_without_text_are_needed_too():
    own = {"encoders": ["mini-clip"], "without_text": ["DINOv2-S"], "tasks": ["digits"], "dataset": "reference"}
    assert list(downloads.needed(own)) == [("encoder", "DINOv2-S")]


def test_downloads_are_tried_once_each_and_failures_told_together(monkeypatch, capsys):
    asked = []

    def fetch(*names, **_):
        asked.append(names)
        if names[0] in ("imagenet", "CLIP-L"):
            raise DataError("ask for access")

    monkeypatch.setattr(residual, "load_dataset", fetch)
    monkeypatch.setattr(residual, "load_encoder", fetch)
    assert main(["paper", "--download"]) == 2
    told = capsys.readouterr().err
    assert told.count("imagenet: ask for access") == told.count("CLIP-L: ask for access") == 1
    assert len(asked) == len(set(asked))
    assert {("svhn", "test"), ("OpenCLIP-L",)} <= set(asked)


def test_a_dry_run_lists_every_job_of_the_paper(project):
    done = snake(project, "units", config=("profile=paper",), options=("--dry-run",))
    assert done.returncode == 0, done.stderr
    listed = done.stdout + done.stderr
    count = next(int(line.split()[1]) for line in listed.splitlines() if line.startswith("unit "))
    assert count == len(jobs(ROOT / "profiles/paper.yml"))


def test_costs_are_those_of_the_encoder():
    cost = plan.encoder_cost("OpenCLIP-B", 112)
    # ViT-B/16 is 17.6 GMAC; the last of 12 blocks computes the class token alone, but for its keys and values.
    assert cost.flops == pytest.approx(2 * 17.6e9 * (11 + 1 / 6) / 12, rel=0.05)
    assert (cost.coordinates, cost.outputs) == (4 * (144 * 66 + 13 * 512), 4 * 512)


@pytest.mark.parametrize("name", ["mini-openclip", "mini-clip", "mini-blip", "mini-dinov2", "mini-vit"])
def test_operations_are_those_that_pytorch_counts(name):
    encoder, counted = load_encoder(name, False), []
    pixels = torch.zeros(2, 3, *encoder.tower.image_size)
    for images in (1, 2):  # a trace's fixed part, the frames of heads, is not an image's
        with (
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):  # it does not count fused attention
            trace(encoder, pixels[:images])
        counted.append(counter.get_total_flops())
    assert plan.encoder_cost(name, 112).flops == pytest.approx(counted[1] - counted[0], rel=1e-3)
    assert plan.encoder_cost(name, 112).weights == 4 * sum(p.numel() for p in encoder.model.parameters())


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (main, ["none"], "no profile none; give one of"),
        (inputs.main, ["tiny", "x"], "tiny has no job 'x'; make plan lists them"),
    ],
)
def test_a_wrong_plan_or_job_is_refused(capsys, program, arguments, message):
    assert program(arguments) == 2
    assert message in capsys.readouterr().err


def test_jobs_are_named_apart_and_tell_their_number_of_images():
    job = Extraction("mini-clip", "digits", "test", 100, False, True, 0, 128)
    assert job.count() == 100
    assert job.name.startswith("mini-clip--digits--test--100--coordinates--")
    assert Extraction("a", "org/name", "test", 100, False, True, 0, 128).count() is None
    names = [job.name for job in jobs(ROOT / "profiles/mini.yml")]
    assert len(set(names)) == len(names)


def test_chapters_find_every_unit_that_the_jobs_made(whole, monkeypatch):
    """What jobs extract is what the chapters read, or they would do it again."""
    monkeypatch.chdir(whole)
    profile, units = whole / "profiles/few.yml", whole / "_build/units"
    before = {path.name for path in units.glob("*--*")}
    assert len(before) == len(jobs(profile))
    load = functools.cache(encoder_for)
    for chapter, needed in jobs_by_chapter(profile).items():
        run = Chapter(chapter, chapter_parameters(chapter, profile))
        read = {run.units(load(job.encoder), job.dataset, job.split).folder.name for job in needed}
        assert read <= before
        assert len(read) == len({(job.encoder, job.dataset, job.split) for job in needed})
    assert {path.name for path in units.glob("*--*")} == before


def test_what_one_chapter_extracts_no_other_extracts_in_another_way(project, monkeypatch):
    monkeypatch.chdir(project)
    for name in ("few", "mini", "mini-full", "small", "paper"):
        wanted = jobs(project / f"profiles/{name}.yml")
        assert len({replace(job, coordinates=False) for job in wanted}) == len(wanted)
        if name != "few":  # where one set is both a chapter's own and a task's
            assert len({replace(job, coordinates=False, balanced=False) for job in wanted}) == len(wanted)
        if name.startswith("mini"):  # no split at two sizes, but for the one whose images N is held against
            repeated = len(wanted) - len({(job.encoder, job.dataset, job.split) for job in wanted})
            assert repeated == (name == "mini")


def recorded(units):
    """The shards that a manifest knows, and when each was written."""
    return {
        path: path.stat().st_mtime_ns for path in units.glob("*/shard-*.safetensors")
        if (manifest := read_manifest(path.parent)) and path.name in {shard.file for shard in manifest.shards}
    }  # fmt: skip


def test_killed_at_any_point_only_what_is_missing_is_done_and_moments_are_the_same(project, whole):
    some = jobs(project / "profiles/few.yml")[:6]
    targets = [f"_build/units/jobs/{job.name}" for job in some]
    generator, units = random.Random(0), project / "_build/units"
    for _ in range(2):
        command = [*SNAKEMAKE, "--config", "profile=few", "units=1", "--", *targets]
        run = subprocess.Popen(
            command, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        before, limit = len(recorded(units)), time.monotonic() + 300
        while len(recorded(units)) == before and run.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(generator.uniform(0, 2))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    kept = recorded(units)
    assert len(kept) >= 2
    done = snake(project, *targets)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    ours, theirs = moments(units), moments(whole / "_build/units")
    assert len(ours) == len(some)
    assert ours.keys() <= theirs.keys()
    assert all(a.equal(b) for name in ours for a, b in zip(ours[name], theirs[name], strict=True))


CHANGES = [  # file, text, in place of which; and the chapters that run again
    ("lib/residual/dimension.py", "FEWEST = 20", "FEWEST = 21", "all"),
    ("lib/residual/pursuit.py", "NOTHING = 1e-12", "NOTHING = 1e-13", "all"),  # behind a lazy name
    ("lib/miniature/sets.py", "CHUNK = 500", "CHUNK = 400", "all"),  # behind an entry point
    ("lib/miniature/sets.yml", "train: 10000", "train: 9000", "all"),
    ("lib/miniature/encoders/mini-clip/open_clip_model.safetensors", "", "x", "all"),
    ("book/published/dataset_order.csv", "\n", "\n\n", "all"),
    ("constraints.txt", "torch==", "torch===", "all"),
    ("book/references.bib", "Facco", "Fako", set()),
    ("book/dimension.md", "heads live in few dimensions", "heads have few dimensions", set()),  # prose
    ("book/dimension.md", "Bands are two standard", "Bands are twice the standard", set()),  # a caption
    ("book/similarity.md", "run.save(table,", "run.save(1 * table,", {"similarity"}),
    ("profiles/few.yml", "images: 100, others", "images: 101, others", {"similarity"}),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A project of its own library, in which all chapters seem to have run."""
    project = small_project(tmp_path_factory.mktemp("built") / "project")
    (project / "lib").unlink()
    shutil.copytree(ROOT / "lib", project / "lib", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    assert planned(project) == set(chapters())
    now = time.time()
    for chapter in chapters():
        files = [f"_build/runs/few/{chapter}.ipynb", f"_build/runs/few/{chapter}.tsv"]
        files += [f"_build/results/few/{name}.csv" for name in outputs(chapter).tables]
        files += [f"_build/results/few/{name}/.snakemake_timestamp" for name in outputs(chapter).folders]
        for file in files:
            (project / file).parent.mkdir(parents=True, exist_ok=True)
            (project / file).write_text("")
            os.utime(project / file, (now, now))  # in whatever order they were written
    return project


def planned(folder):
    """The chapters that would run."""
    done = snake(folder, config=("profile=few",), options=("--dry-run",))
    assert done.returncode == 0, done.stderr
    return set(re.findall(r": chapter (\w+)", done.stdout + done.stderr))


@pytest.mark.parametrize(("file", "old", "new", "expected"), CHANGES)
def test_a_change_reruns_what_may_depend_on_it(built, tmp_path, file, old, new, expected):
    project = shutil.copytree(built, tmp_path / "project", symlinks=True)  # with the times of its files
    assert planned(project) == set()
    path = project / file
    data = path.read_bytes()
    assert old.encode() in data
    path.write_bytes(data.replace(old.encode(), new.encode(), 1) if old else data + new.encode())
    found = planned(project)
    if expected == "all":
        assert found == set(chapters())
    else:
        assert expected <= found
        assert found <= expected | {other for other in chapters() if expected & {*_before(other)}}


def _before(chapter):
    """All chapters that one waits for, directly or not."""
    return {*after(chapter), *(far for near in after(chapter) for far in _before(near))}


def test_a_table_that_is_gone_is_made_again(built, tmp_path):
    project = shutil.copytree(built, tmp_path / "project", symlinks=True)
    (project / "_build/results/few/factors_said.csv").unlink()
    assert "ground_truth" in planned(project)


def test_a_chapter_that_fails_is_named_with_its_notebook_and_others_go_on(project):
    text = project / "book/residual_stream.md"
    cell = '```{code-cell} ipython3\nraise RuntimeError("broken on purpose")\n```\n'
    start = text.read_text().index("\n## ")
    text.write_text(text.read_text()[:start] + cell + text.read_text()[start:])
    targets = ["_build/runs/few/residual_stream.ipynb", "_build/runs/few/dimension.ipynb"]
    done = snake(project, *targets, config=("profile=few",))
    assert done.returncode != 0
    log = project / "_build/logs/few/residual_stream.ipynb"
    assert f"RuntimeError: broken on purpose\nthe notebook up to there is {log}" in done.stdout + done.stderr
    assert "broken on purpose" in log.read_text()
    assert [(project / target).is_file() for target in targets] == [False, True]
