"""Rerunning and editing as people do it: the project's own commands, the ecosystem's tools, interruptions, changes."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pandas as pd
import papermill
import pytest
import yaml
from papermill import PapermillExecutionError
from PIL import Image
from playwright.sync_api import sync_playwright
from torchvision.transforms.functional import to_pil_image

from conftest import FLAGS, run
from edition import build
from edition.assemble import assembled
from edition.chapter import Chapter
from edition.pages import (
    ParameterError,
    chapter_defaults,
    chapter_path,
    chapters,
    find_profile,
    project_root,
    read_profile,
)
from edition.run import main
from edition.tables import styled
from miniature import WEIGHTS
from residual import load_dataset

ROOT = project_root()
BIN = Path(sys.executable).parent
SMALL = {"encoders": ["mini-openclip"]}  # of the chapter residual_stream, which takes seconds


def run_in(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    own = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, check=False)


def test_a_rerun_leaves_the_tables_of_the_book_alone_and_reads_them(inside):
    values = chapter_defaults(chapter_path("data")) | read_profile(inside / "profiles/few.yml", "data")
    rerun, book = Chapter("data", values), Chapter("data", values | {"results": "_build/results/few"})
    book.save(pd.DataFrame({"a": [1]}), "leaks")
    assert rerun.folder == inside / "_build/results/rerun"
    assert rerun.load("leaks", "data")["a"].tolist() == [1]
    rerun.save(pd.DataFrame({"a": [2]}), "leaks")
    assert (rerun.load("leaks", "data")["a"][0], book.load("leaks", "data")["a"][0]) == (2, 1)
    book.folder.joinpath("leaks.csv").write_text("")
    with pytest.raises(ValueError, match=r"leaks\.csv is damaged .* run the chapter data again"):
        book.load("leaks", "data")


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_no_script_of_a_name_runs_in_a_browser(inside, tmp_path):
    name = "<img src=x onerror=document.title='pwned'> `a` {doc}`b` $x$"
    encoder = shutil.copytree(WEIGHTS / "mini-openclip", tmp_path / name)
    for label in range(3):
        folder = tmp_path / "set" / f"{label} {name}"
        folder.mkdir(parents=True)
        for index in range(60):
            Image.new("RGB", (48, 48), (4 * index, 80 * label, 0)).save(folder / f"{index}.png")
    given = {"encoders": [str(encoder)], "dataset": str(tmp_path / "set"), "images": 100}
    runs = [run(inside, chapter, given) for chapter in ("dimension", "heads")]
    pages = [Path(re.search("page      (.*)", done.stdout)[1]) for done in runs]
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
    (inside / "params.yml").write_text("encoders: [mini-openclip]\n")
    for folder, chapter, given in (
        (inside, notebook, ["-f", "params.yml"]),
        (inside / "book", notebook, ["-y", "{encoders: [mini-openclip], seed: 5}"]),
    ):
        done = run_in(folder, str(BIN / "papermill"), str(chapter), "out.ipynb", *given)
        assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name for path in (inside / "_build/results").iterdir()] == ["rerun"]
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
    done = run_in(inside, *command, str(_as_notebook(inside / "book", "residual_stream")), JUPYTER_PLATFORM_DIRS="1")
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


TEXT = "# Title\n\n```{code-cell}\n:tags: [parameters]\n\nx: int = 1\n```\n\n```{code-cell}\nx\n```\n"


def test_prose_is_changed_without_running_a_chapter(inside, tmp_path):
    text, executed = tmp_path / "mine.md", tmp_path / "mine.ipynb"
    about = {"text_representation": {"extension": ".md", "format_name": "myst"}}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    header = f"---\n{yaml.safe_dump({'jupytext': about, 'kernelspec': kernel})}---\n"
    text.write_text(header + TEXT)
    draft = tmp_path / "draft.ipynb"
    jupytext.write(jupytext.read(text), draft)
    papermill.execute_notebook(str(draft), str(executed), {"x": 2}, progress_bar=False)
    text.write_text(header + TEXT.replace("Title", "Another title"))
    page = assembled(text, executed)
    assert page.cells[0].source == "# Another title"
    code = [cell for cell in page.cells if cell.cell_type == "code"]
    assert [cell.get("execution_count") for cell in code] == [1, 2, 3]
    assert [cell.metadata.get("tags", []) for cell in code[:2]] == [
        ["parameters", "remove-input"], ["injected-parameters", "hide-input"],
    ]  # fmt: skip
    assert code[-1].outputs[0].data["text/plain"] == "2"
    text.write_text(header + TEXT.replace("\nx\n", "\nx + 1\n"))
    with pytest.raises(ValueError, match=r"the code of .*mine\.md is not that of .*mine\.ipynb; run the chapter again"):
        assembled(text, executed)
    executed.write_text("{")
    with pytest.raises(ValueError, match=r"mine\.ipynb is damaged; delete it"):
        assembled(text, executed)


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


def test_a_second_run_is_refused_by_the_number_of_the_process_and_a_dead_one_leaves_no_lock(inside):
    path = inside / "_build/.lock"
    code = f"from pathlib import Path; from edition.build import lock; lock(Path({str(path)!r})); "
    first = subprocess.Popen(
        [sys.executable, "-c", code + "print(1, flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert first.stdout.readline() == b"1\n"
    with pytest.raises(ParameterError, match=f"another run of this project is active here, process {first.pid}"):
        build.lock(path)
    first.kill()
    first.communicate()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_inputs_of_chapters_are_written_where_they_differ_alone(inside):
    from edition.pages import write_inputs

    profile = inside / "profiles/few.yml"
    paths = {name: inside / path for name, path in write_inputs(profile).items()}
    before = {name: path.stat().st_mtime_ns for name, path in paths.items()}
    assert json.loads(paths["dimension"].read_text())["parameters"]["images"] == 100
    text = inside / "book/dimension.md"
    text.write_text(text.read_text().replace("heads live in few dimensions", "heads have few dimensions"))  # prose
    write_inputs(profile)
    assert before == {name: path.stat().st_mtime_ns for name, path in paths.items()}
    text.write_text(text.read_text().replace("run.save(layers,", "run.save(1 * layers,"))
    write_inputs(profile)
    assert [name for name, path in paths.items() if path.stat().st_mtime_ns != before[name]] == ["dimension"]


def test_the_scripts_of_the_readme_train_on_a_folder_and_name_another(tmp_path):
    data = load_dataset("shapes-colour", "train").balanced(240)
    for place, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
        file = tmp_path / f"birds/{data.classes[label]}/{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(file)
    new = load_dataset("shapes-colour", "test").head(40)
    (tmp_path / "new").mkdir()
    for place, image in enumerate(new.images):
        to_pil_image(image).save(tmp_path / f"new/{place:02d}.jpg", quality=95)
    section = (ROOT / "README.md").read_text().partition("## In a script")[2]
    scripts = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        (tmp_path / "script.py").write_text(script)
        done = run_in(tmp_path, sys.executable, "script.py", RESIDUAL_CACHE=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr[-2000:]
    with (tmp_path / "predictions.csv").open() as table:
        named = [row[1] for row in csv.reader(table)]
    assert sum(a == data.classes[b] for a, b in zip(named, new.labels.tolist(), strict=True)) > 30
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"birds", "new", "cache", "script.py", "birds.safetensors", "predictions.csv"}  # nothing else
