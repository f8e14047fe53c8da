"""Rerunning and editing as people do it: the project's own commands, the ecosystem's tools, interruptions, changes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import nbformat
import pandas as pd
import papermill
import psutil
import pytest
import yaml
from papermill import PapermillExecutionError
from PIL import Image
from playwright.sync_api import sync_playwright

from conftest import run_forked, small_project
from edition import build, check, keys
from edition.assemble import assembled, run_command
from edition.chapter import Chapter
from edition.forkserver import SHARED
from edition.pages import (
    ParameterError,
    chapter_defaults,
    chapter_path,
    chapters,
    code_cells,
    find_profile,
    project_root,
    read_profile,
    run_name,
)
from edition.pdf import FLAGS
from edition.run import main, run_chapter
from edition.tables import styled

ROOT = project_root()
BIN = Path(sys.executable).parent
SMALL = {"encoders": ["mini-openclip"]}  # of the chapter residual_stream, which takes seconds


def run_in(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    own = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({}, "few--rerun"),
        ({"device": "cuda", "workers": 3}, "few--rerun"),
        ({"images": 500}, "few--images-500"),
        ({"images": 500, "seed": 2}, "few--images-500--seed-2"),
        ({"encoders": ["mini-vit", "mini-clip"]}, "few--encoders-mini-vit+mini-clip"),
        ({"profile": "mine", "images": 500}, "mine"),  # a name that is no profile's
        ({"dataset": "/data/été & co"}, r"few--dataset-_data_été___co--[0-9a-f]{6}"),
        ({"tasks": ["x"] * 99}, r"few--tasks-[x+]{69}--[0-9a-f]{6}"),
    ],
)
def test_a_run_is_named_after_what_differs_from_its_profile(inside, changed, name):
    usual = chapter_defaults(chapter_path("dimension")) | {
        "profile": "few", "encoders": ["mini-openclip"], "dataset": "digits", "images": 100,
    }  # fmt: skip
    assert re.fullmatch(re.sub(r"\+(?!\])", r"\\+", name), run_name(chapter_path("dimension"), usual | changed))


def test_a_rerun_leaves_the_tables_of_the_book_alone_and_reads_them(inside, monkeypatch):
    values = chapter_defaults(chapter_path("learned")) | read_profile(inside / "profiles/few.yml", "learned")
    rerun = Chapter("learned", values | {"seed": 5})
    monkeypatch.setenv("RESIDUAL_BOOK", "1")
    book = Chapter("learned", dict(values))
    book.folder.joinpath("bases.csv").write_text("a\n1\n")
    assert rerun.folder != book.folder
    assert rerun.load("bases", "alignment")["a"].tolist() == [1]
    rerun.folder.joinpath("bases.csv").write_text("a\n2\n")
    assert (rerun.load("bases", "alignment")["a"][0], book.load("bases", "alignment")["a"][0]) == (2, 1)
    book.folder.joinpath("bases.csv").write_text("")
    with pytest.raises(ValueError, match=r"bases\.csv is damaged .* run the chapter alignment again"):
        book.load("bases", "alignment")


def test_tables_of_a_chapter_that_fails_are_not_those_of_an_earlier_run(inside, monkeypatch):
    values = chapter_defaults(chapter_path("gpu")) | {"profile": "few"}
    monkeypatch.setenv("RESIDUAL_BOOK", "1")
    run = Chapter("gpu", values)
    run.save(pd.DataFrame({"a": [1]}), "mine")
    assert run.load("mine", "gpu")["a"].tolist() == [1]
    monkeypatch.setattr("edition.execute.execute_chapter", lambda *given, **options: None)
    run_chapter(chapter_path("gpu"), {"profile": "few"}, cells=Path("cells"))
    with pytest.raises(FileNotFoundError, match="run the chapter gpu"):
        run.load("mine", "gpu")


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_no_script_of_a_name_runs_in_a_browser(inside, tmp_path):
    name = "<img src=x onerror=document.title='pwned'> `a` {doc}`b` $x$"
    encoder = shutil.copytree(ROOT / "lib/residual/encoders/mini/mini-openclip", tmp_path / name)
    for label in range(3):
        folder = tmp_path / "set" / f"{label} {name}"
        folder.mkdir(parents=True)
        for index in range(60):
            Image.new("RGB", (48, 48), (4 * index, 80 * label, 0)).save(folder / f"{index}.png")
    given = {"encoders": [str(encoder)], "dataset": str(tmp_path / "set"), "images": 100}
    runs = [run_forked(inside, chapter, given) for chapter in ("dimension", "heads")]
    pages = [Path(re.search("page      (.*)", run.stdout)[1]) for run in runs]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=[*FLAGS])
        page = browser.new_page()
        for path in pages:
            page.goto(path.as_uri(), wait_until="networkidle")
            assert page.title() != "pwned"
            assert "&lt;img src=x" in page.content()
            assert not page.locator("img[src=x]").count()
        browser.close()


@pytest.fixture
def notebook(inside):
    """A chapter as `jupytext --to ipynb` makes a notebook of it."""
    done = run_in(inside, str(BIN / "jupytext"), "--to", "ipynb", "book/residual_stream.md", "-o", "book/mine.ipynb")
    assert done.returncode == 0, done.stderr
    return inside / "book/mine.ipynb"


def test_papermill_runs_a_chapter_from_the_root_and_from_the_book(inside, notebook):
    (inside / "params.yml").write_text("profile: few\n")
    for folder, chapter, given in (
        (inside, _as_notebook(inside, "gpu"), ["-f", "params.yml"]),
        (inside / "book", notebook, ["-y", "{encoders: [mini-openclip], seed: 5}"]),
    ):
        done = run_in(folder, str(BIN / "papermill"), str(chapter), "out.ipynb", *given)
        assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name for path in (inside / "_build/results").iterdir()] == ["mini--encoders-mini-openclip--seed-5"]
    assert not (inside / "book/_build").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [({"seed": -1}, "seed = -1: "), ({"sead": 1}, r"no parameters \['sead'\]; it has \['device', 'encoders'")],
)
def test_papermill_refuses_wrong_parameters_in_the_first_cells(inside, notebook, given, message):
    with pytest.raises(PapermillExecutionError, match=message) as caught:
        papermill.execute_notebook(str(notebook), "out.ipynb", SMALL | given, progress_bar=False)
    assert caught.value.exec_count <= 3


def test_papermill_lists_parameters_with_types_and_texts(inside):
    for chapter in chapters():
        cells = papermill.inspect_notebook(str(_as_notebook(inside, chapter)))
        assert list(cells) == list(chapter_defaults(chapter_path(chapter)))
        for name, about in cells.items():
            assert about["inferred_type_name"] in ("str", "int", "float", "list[str]"), (chapter, name)
            assert len(about["help"]) > 8, (chapter, name)


def _as_notebook(folder: Path, chapter: str) -> Path:
    path = folder / f"{chapter}.ipynb"
    jupytext.write(jupytext.read(chapter_path(chapter)), path)
    return path


def test_nbconvert_executes_a_chapter(inside):
    command = [str(BIN / "jupyter"), "nbconvert", "--execute", "--to", "notebook", "--output", "done.ipynb"]
    done = run_in(inside, *command, str(_as_notebook(inside / "book", "gpu")), JUPYTER_PLATFORM_DIRS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (inside / "book/done.ipynb").is_file()


def test_a_profile_may_lie_anywhere_and_a_missing_one_is_told(inside, tmp_path):
    other = tmp_path / "my own.yml"
    other.write_text("dimension: {images: 500}\n")
    assert find_profile(other) == other
    with pytest.raises(ParameterError, match=r"no profile minni; give one of few, mini, mini-full, "):
        find_profile("minni")
    (tmp_path / "mini.yml").write_text("")
    with pytest.raises(ParameterError, match="has the name of a profile of the project"):
        find_profile(tmp_path / "mini.yml")
    other.write_text("dimension: {profile: mini}\n")
    with pytest.raises(ParameterError, match="profile = 'mini', which must be 'my own'"):
        build.check_profile(other)


def test_wrong_profiles_are_told_whole_before_any_job(inside):
    wrong = inside / "wrong.yml"
    wrong.write_text("dimention: {}\ndimension: {images: 3}\npursuit: {images: 3}\nheads: {seed: x}\n")
    with pytest.raises(ParameterError) as caught:
        build.check_profile(wrong)
    told = str(caught.value)
    assert "dimention: there are no such chapters" in told
    assert "dimension, pursuit: images = 3: " in told
    assert "heads: seed = 'x': " in told


def test_without_a_network_all_that_is_missing_is_told_at_once(inside, tmp_path):
    command = [sys.executable, "-m", "edition.build", "small"]
    done = run_in(inside, *command, HF_HOME=str(tmp_path / "empty"), HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "the profile small needs 9 downloads, and HF_HUB_OFFLINE is set" in done.stderr
    for name in ("encoder DINOv2-S", "data set cifar100", "data set svhn", "--download"):
        assert name in done.stderr
    assert not (inside / "_build/logs").exists()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_build_that_is_stopped_says_so_in_one_line_and_leaves_nothing_running(inside, sign):
    command = [sys.executable, "-m", "edition.build", "tiny"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(command, cwd=inside, env=os.environ | {SHARED: ""}, **pipes)  # with a server of its own
    limit = time.monotonic() + 120
    while not list(inside.glob("_build/runs/tiny/*.ipynb")) and time.monotonic() < limit and run.poll() is None:
        time.sleep(0.1)
    assert sys.platform != "linux" or any("import serve" in command for command in running_in(inside))
    run.send_signal(sign)
    out, err = run.communicate(timeout=180)
    assert run.returncode == 130
    assert err.strip() == f"stopped. {build.KEPT}"
    assert "Traceback" not in out
    assert not running_in(inside)
    assert not list(inside.glob("_build/runs/tiny/*.failed"))


def test_a_process_that_has_ended_is_not_waited_for_though_nobody_has_reaped_it():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        about = psutil.Process(process.pid)
        assert build._is_alive(about)
        process.stdin.close()
        while about.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert not build._is_alive(about)
    assert not build._is_alive(about)


def running_in(folder: Path) -> list[str]:
    """Processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder and int(process.name) != os.getpid():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has ended
            continue
    return found


CHANGES = [  # file, text, in place of which; and the chapters that run again
    ("lib/residual/dimension.py", "Intrinsic dimension", "Dimension of the data", set()),  # a docstring
    ("lib/residual/dimension.py", "FEWEST = 20", "FEWEST = 21", "some"),
    ("lib/edition/figures/dimension.py", '"Blues"', '"Greens"', {"dimension"}),
    ("lib/edition/figures/pictures.py", "#cfe3f3", "#cfe3f4", {"residual_stream", "data", "intro"}),
    ("lib/residual/training.py", "EPOCHS, PATIENCE = 30", "EPOCHS, PATIENCE = 31", "some"),
    ("book/references.bib", "Facco", "Fako", set()),
    ("book/_static/custom.css", "{", "{ color: red;", set()),
    ("book/dimension.md", "heads live in few dimensions", "heads have few dimensions", set()),  # prose
    ("book/dimension.md", "Darker is larger, on one scale", "Darker is more, on one scale", set()),  # a caption
    ("book/dimension.md", "run.save(layers,", "run.save(1 * layers,", {"dimension"}),
    ("book/published/dataset_order.csv", "\n", "\n\n", {"similarity"}),
    ("profiles/few.yml", "dataset: digits, images: 400", "dataset: digits, images: 500", set()),
    (
        "profiles/few.yml",
        "images: 100}\npursuit",
        "images: 101}\npursuit",
        {"dimension", "pursuit", "semantics", "heads"},
    ),
    ("constraints.txt", "torch==", "torch===", "all"),
]


def keys_of(folder, monkeypatch):
    """The key of every chapter of a project, in which its own copy of the library counts."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(keys, "LIBRARY", folder / "lib")
    _forget_modules()
    try:
        return {chapter: keys.chapter_key(chapter, folder / "profiles/few.yml") for chapter in chapters()}
    finally:
        _forget_modules()


def _forget_modules():
    """Their files and contents are kept by name."""
    for cached in (keys._module, keys._exports, keys._imports_of, keys._file_hash):
        cached.cache_clear()


def with_library(project):
    (project / "lib").unlink()
    shutil.copytree(ROOT / "lib", project / "lib", ignore=shutil.ignore_patterns("mini", "__pycache__", "*.egg-info"))
    return project


@pytest.fixture(scope="module")
def keys_before(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return keys_of(with_library(small_project(tmp_path_factory.mktemp("before") / "project")), monkeypatch)


@pytest.mark.parametrize(("file", "old", "new", "expected"), CHANGES)
def test_a_change_reruns_what_depends_on_it(project, keys_before, monkeypatch, file, old, new, expected):
    before, path = keys_before, with_library(project) / file
    text = path.read_text()
    if file.startswith("profiles") and "400" in old:
        assert old not in text  # a line of no chapter: a comment
        text = f"# {old}\n{text}"
        path.write_text(text)
    assert old in text
    path.write_text(text.replace(old, new, 1))
    after = keys_of(project, monkeypatch)
    changed = {chapter for chapter in before if before[chapter] != after[chapter]}
    if expected == "all":
        assert changed == set(before)
    elif expected == "some":
        assert {"dimension", "alignment"} & changed
    else:
        assert changed == expected


def test_prose_is_changed_without_running_a_chapter(inside, tmp_path):
    text, executed = tmp_path / "mine.md", tmp_path / "mine.ipynb"
    source = "# Title\n\n```{code-cell}\n:tags: [parameters]\n\nx: int = 1\n```\n\n```{code-cell}\nx\n```\n"
    about = {"text_representation": {"extension": ".md", "format_name": "myst"}}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    header = f"---\n{yaml.safe_dump({'jupytext': about, 'kernelspec': kernel})}---\n"
    text.write_text(header + source)
    papermill.execute_notebook(str(_converted(text)), str(executed), {"x": 2}, progress_bar=False)
    text.write_text(header + source.replace("Title", "Another title"))
    page = assembled(text, executed)
    assert page.cells[0].source == "# Another title"
    assert [cell.get("execution_count") for cell in page.cells if cell.cell_type == "code"] == [1, 2, 3]
    assert page.cells[-1].outputs[0].data["text/plain"] == "2"
    text.write_text(header + source.replace("\nx\n", "\nx + 1\n"))
    assert assembled(text, executed).cells[0].source == "# Title"  # the code is another: the run as it was
    executed.write_text("{")
    with pytest.raises(ValueError, match=r"mine\.ipynb is damaged; delete it"):
        assembled(text, executed)


def test_a_page_shows_the_command_that_runs_it_with_its_values(tmp_path):
    source = """# Parameters
profile = "mini"
encoders = ["/data/my $model", "it's"]
images = 100
dictionary = ""
share = 0.5"""
    command = run_command("dimension", "mini", source)
    (tmp_path / "Makefile").write_text("chapter:\n\t@printf '%s\\n' $(CHAPTER) $(PROFILE) $(ARGS)\n")
    alone = {name: value for name, value in os.environ.items() if "MAKE" not in name and name != "MFLAGS"}
    told = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=alone, capture_output=True, text=True, check=True)
    given = ["-p", "encoders", "[/data/my $model, it's]", "-p", "images", "100", "-p", "share", "0.5"]
    assert told.stdout.splitlines() == ["dimension", "mini", *given]


def _converted(text: Path) -> Path:
    draft = text.with_name("draft.ipynb")
    jupytext.write(jupytext.read(text), draft)
    return draft


@pytest.mark.parametrize("chapter", chapters())
def test_cells_are_read_as_jupytext_reads_them(chapter):
    path = chapter_path(chapter)
    theirs = [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]
    ours = code_cells(path.read_text())
    assert [cell.source for cell in ours] == [cell.source for cell in theirs]
    assert [cell.options.get("tags", []) for cell in ours] == [cell.metadata.get("tags", []) for cell in theirs]
    lines = path.read_text().splitlines()
    assert all(lines[cell.line - 1] == cell.source.splitlines()[0] for cell in ours)


@pytest.mark.parametrize(
    ("page", "old", "new", "told"),
    [
        ("dimension", "{cite}`facco2017`", "{cite}`facco1917`", "references.bib lacks 'facco1917'"),
        ("dimension", "{glue:text}`error`", "{glue:text}`eror`", "no cell glues the value 'eror'"),
        ("dimension", "{doc}`claims`", "{doc}`claim`", "there is no page 'claim'"),
        ("zoo", "{numref}`tab-text-aligned`", "{numref}`tab-text`", "has the label 'tab-text'"),
        (
            "dimension",
            "figures.dimension_heatmaps(layers);",
            "figures.dimension_heatmaps(layers;",
            "this is not Python",
        ),
        ("dimension", 'Chapter("dimension", globals())', "None", 'no cell calls run = Chapter("dimension", globals())'),
        ("intro", "{doc}`zoo`", "the zoo", "its table lacks the chapter zoo"),
    ],
)
def test_faults_of_pages_are_told_with_file_and_line(inside, page, old, new, told, capsys):
    assert check.main() == 0
    path = inside / f"book/{page}.md"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert check.main() == 1
    first = capsys.readouterr().err.splitlines()[0]
    assert told in first
    line = int(re.match(rf"book/{page}\.md:(\d+): ", first)[1])
    assert line == 1 or new in path.read_text().splitlines()[line - 1]


def test_a_new_page_says_what_it_needs(inside, capsys):
    shutil.copy(inside / "book/gpu.md", inside / "book/mine.md")
    assert check.main() == 1
    assert "book/mine.md:1: it is not in _toc.yml" in capsys.readouterr().err
    toc = inside / "_toc.yml"
    toc.write_text(toc.read_text() + "      - file: mine\n")
    assert check.main() == 1
    told = capsys.readouterr().err
    assert "its table lacks the chapter mine" in told
    assert "the chapter mine, which has no device, is not among those for CPU nodes" in told


NASTY = "<img src=x onerror=alert(1)> `a` {doc}`b` $x$ *c* </td>"


def test_tables_show_texts_as_they_are(pandas_frame):
    html = styled(pandas_frame, index=True).to_html()
    assert "<img" not in html
    assert html.count("&lt;img src=x onerror=alert(1)&gt;") == 4  # two cells, a row, a column
    assert "<a href" in styled(pandas_frame.assign(link="<a href='x'>x</a>"), html=["link"]).to_html()


@pytest.fixture
def pandas_frame():
    return pd.DataFrame({NASTY: [NASTY], "other": [NASTY]}, index=[NASTY])


def test_pages_make_tables_in_one_way():
    """The one that escapes."""
    for path in [*(ROOT / "book").glob("*.md"), *(ROOT / "lib/edition").rglob("*.py")]:
        assert ".style." not in path.read_text() or path.name == "tables.py", path


def test_a_rerun_without_git_or_a_writable_home(inside, tmp_path):
    given = ["-p", "encoders", "[mini-openclip]"]
    command = [sys.executable, "-m", "edition.run", "residual_stream", "--profile", "few", *given]
    done = run_in(inside, *command, PATH=str(tmp_path), HOME="/proc/none", LC_ALL="C", LANG="C")
    assert done.returncode == 0, done.stderr[-2000:]
    written = re.search(r"notebook  (.*)\npage      (.*)\nresults   (.*)\n", done.stdout).groups()
    assert all(Path(path).exists() for path in written)
    executed = nbformat.read(written[0], as_version=4)
    assert "not a git checkout" in str(executed.cells[-1].outputs)


def test_a_wrong_chapter_is_told(inside, capsys):
    assert main(["dimention"]) == 2
    assert "no chapter 'dimention'; did you mean 'dimension'?" in capsys.readouterr().err
