"""The plan tells what the chapters extract, and the graph survives kills and failures."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from conftest import small_project
from edition import plan
from edition.chapter import Chapter
from edition.inputs import Extraction, encoder_for
from edition.pages import chapters, project_root
from edition.parameters import chapter_parameters
from edition.plan import jobs, jobs_by_chapter, main
from residual import load_units
from residual.data.hub.read import DataError
from residual.store import read_manifest

ROOT = project_root()
SNAKEMAKE = [sys.executable, "-m", "snakemake", "--cores", "2", "--nolock", "--rerun-incomplete"]
SNAKEMAKE += ["--rerun-triggers", "mtime"]


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
            plan.run_job(job, device="cpu", workers=0, part=None, compiled=False)
    return folder


def test_the_paper_is_planned_offline_with_every_job(capsys, monkeypatch):
    monkeypatch.setattr(plan, "encoder_cost", lambda *name: plan.Cost(1e11, 900, 100, 10**6, 10**8))
    assert main(["paper", "--tflops", "50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    images = {row["job"]: row["images"] for row in found["jobs"]}
    assert len(images) == len(found["jobs"]) == len(jobs(ROOT / "profiles/paper.yml"))
    (reference,) = (row for row in found["jobs"] if row["job"].startswith("OpenCLIP-L--imagenet--"))
    assert reference["images"] == 80_000
    assert reference["hours"] == pytest.approx(80_000 * 1e11 / 50e12 / 3600)
    assert reference["bytes"] == 80_000 * 1000 + 20 * 10**6
    assert found["downloads"]["imagenet"]["gated"]
    assert main(["paper", "--tflops", "50"]) == 0
    assert "gated: ask for access first" in (shown := capsys.readouterr().out)
    assert f"{len(images)} extractions, 0 of them there" in shown


def test_what_is_there_already_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "encoder_cost", lambda *name: plan.Cost(1e11, 900, 100, 10**6, 10**8))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    rest = "test", 100, False, True, 0, 128
    own = [Extraction("BLIP-L", "mnist", *rest), Extraction("CLIP-B", "org/x", *rest)]
    assert not any(found["there"] for found in plan._downloads(own).values())
    (tmp_path / "hub/models--timm--vit_base_patch16_clip_224.openai/snapshots/a").mkdir(parents=True)
    (tmp_path / "hub/models--timm--vit_base_patch16_clip_224.openai/snapshots/a/weights").write_text("")
    (tmp_path / "datasets/org___x/default/0.0.0").mkdir(parents=True)
    (tmp_path / "datasets/org___x/default/0.0.0/dataset_info.json").write_text("")
    tars = tmp_path / "hub/datasets--clip-benchmark--wds_mnist"
    (tars / "snapshots/a/test").mkdir(parents=True)
    (tars / "snapshots/a/test/0.tar").write_text("")
    assert plan._downloads(own)["mnist"]["there"]
    (tars / "blobs").mkdir()
    (tars / "blobs/b.incomplete").write_text("")
    found = plan._downloads(own)
    assert {name: one["there"] for name, one in found.items()} == {
        "BLIP-L": False, "CLIP-B": True, "mnist": False, "org/x": True,
    }  # fmt: skip
    assert found["mnist"]["kept"] == 2 * found["mnist"]["bytes"]
    assert found["org/x"]["bytes"] is None


def test_downloads_are_tried_once_each_and_failures_told_together(monkeypatch, capsys):
    asked = []

    def fetch(*names, **_):
        asked.append(names)
        if names[0] in ("imagenet", "CLIP-L"):
            raise DataError("ask for access")

    monkeypatch.setattr(plan, "load_dataset", fetch)
    monkeypatch.setattr(plan, "load_encoder", fetch)
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
    assert plan.encoder_cost("mini-openclip", 112).flops > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["none"], "no profile none; give one of"), (["tiny", "--run", "x"], "tiny has no job 'x'; --list shows them")],
)
def test_a_wrong_plan_is_refused(capsys, arguments, message):
    assert main(arguments) == 2
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
        if name.startswith("mini"):  # no split at two sizes
            assert len({(job.encoder, job.dataset, job.split) for job in wanted}) == len(wanted)


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


def test_jobs_that_share_an_extraction_leave_the_same(project):
    name = next(job.name for job in jobs(project / "profiles/few.yml") if "--shapes--train--100--" in job.name)
    assert snake(project, f"_build/units/jobs/{name}", config=("profile=few", "units=1", "parts=2")).returncode == 0
    (folder,) = (project / "_build/units").glob("*--*")
    assert load_units(folder).manifest.complete
    assert [path.name for path in folder.glob("part-*.json")] == ["part-0-of-2.json"]  # 100 images are one shard


def test_what_no_chapter_reads_reruns_no_other(project):
    def planned():
        told = snake(project, config=("profile=few",), options=("--dry-run",)).stdout
        return set(re.findall(r"chapter=(\w+)", told))

    assert planned() == set(chapters())
    runs, later = project / "_build/runs/few", time.time() + 10
    runs.mkdir(parents=True)
    for chapter in chapters():
        (runs / f"{chapter}.ipynb").write_text("{}")
        os.utime(runs / f"{chapter}.ipynb", (later, later))
    assert planned() == set()
    text = project / "book/data.md"
    text.write_text(text.read_text() + "\n```{code-cell} ipython3\nprint(1)\n```\n")
    assert planned() == {"data", "costs", "results"}


@pytest.mark.slow
def test_a_chapter_that_fails_is_in_the_book_with_its_error(project):
    text, middle = project / "book/similarity.md", "## Every head on every data set"
    cell = '```{code-cell} ipython3\nraise RuntimeError("broken on purpose")\n```\n\n'
    text.write_text(text.read_text().replace(middle, cell + middle))
    done = snake(project, config=("profile=tiny",))
    assert done.returncode != 0
    told = "These chapters failed, and their pages show where: claims intro reproduction similarity"
    assert told in done.stdout + done.stderr
    html = project / "_build/html"
    assert "broken on purpose" in (html / "similarity.html").read_text()
    assert "run the chapter similarity" in (html / "claims.html").read_text()  # which it reads
    assert "These chapters" not in (html / "heads.html").read_text()
    assert not (project / "_build/runs/tiny/similarity.ipynb").exists()  # so that it is run again
