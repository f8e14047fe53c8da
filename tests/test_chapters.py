"""Chapters run with parameters, refuse bad ones before any work, and the book builds without a warning."""

from __future__ import annotations

import ast
import re
from itertools import product
from pathlib import Path

import jupytext
import numpy as np
import pandas as pd
import pytest

from conftest import page_functions, run, write_config
from edition.chapter import Chapter
from edition.claims import claims
from edition.inputs import task_parts
from edition.pages import ParameterError, chapter_defaults, chapter_path, chapters, project_root, read_profile
from edition.parameters import PARAMETERS, check_parameters
from edition.results import measured, outputs
from edition.run import main
from edition.tables import best_bold, styled
from miniature import ENCODERS

ROOT = project_root()
CHAPTERS = [chapter_path(name) for name in chapters()]


def test_every_pair_of_the_default_run_was_fine_tuned_with_as_many_images_and_seeds():
    default = chapter_defaults(chapter_path("alignment"))
    rows = measured("finetuning").query("images == @default['images'] and seed < @default['seeds']")
    embedded = [name for name in default["encoders"] if name in ENCODERS]
    pairs = product(embedded, default["tasks"], range(default["seeds"]))
    assert set(zip(rows["model"], rows["dataset"], rows["seed"], strict=True)) == set(pairs)


def test_a_chapter_reruns_with_other_parameters(tmp_path):
    write_config(tmp_path / "dino v2", "dinov2")  # a path with a space
    out = tmp_path / "out.ipynb"
    encoders = [f"{tmp_path / 'dino v2'}@random", "mini-openclip"]
    given = {"dataset": "digits", "images": 120, "seed": 3, "encoders": encoders, "results": str(tmp_path / "mine")}
    done = run(ROOT, str(ROOT / "book/dimension.md"), given, "--out", str(out))
    found = re.search(r"notebook  (.*)\npage      (.*)\nresults   (.*)\n", done.stdout).groups()
    assert (found[0], found[2]) == (str(out), str(tmp_path / "mine"))
    assert "Residual dimensionality" in Path(found[1]).read_text()
    notebook = jupytext.read(out)
    assert not [o for cell in notebook.cells for o in cell.get("outputs", []) if o.get("name") == "stderr"]
    table = pd.read_csv(tmp_path / "mine/intrinsic_dimension.csv")
    assert set(pd.read_csv(ROOT / "book/published/intrinsic_dimension.csv").columns) <= set(table.columns)
    assert table.groupby("model").size().tolist() == [3, 12]
    assert table[["linear_id", "twonn_id", "ratio", "evr1"]].gt(0).all(axis=None)


@pytest.mark.parametrize("chapter", ["data", "heads", "ground_truth", "alignment"])
def test_a_chapter_reruns_with_an_encoder_that_reads_no_text(chapter, tmp_path):
    given = {"encoders": ["mini-vit"], "controls": [], "without_text": [], "tasks": ["shapes-colour"], "finetune": []}
    given |= {"dataset": "digits", "reference_images": 130, "images": 100, "set_images": 100, "seeds": 1}
    given = {name: value for name, value in given.items() if name in chapter_defaults(chapter_path(chapter))}
    given |= {"profile": "none", "results": str(tmp_path / "mine")}
    run(ROOT, chapter, given, "--book", "--out", str(tmp_path / "out.ipynb"))
    assert {path.stem for path in (tmp_path / "mine").glob("*.csv")} == set(outputs(chapter).tables)
    assert all((tmp_path / "mine" / folder).is_dir() for folder in outputs(chapter).folders)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "image", "3"], "no parameters ['image']; did you mean 'images'? it has"),
        (["-p", "images", "many"], "images = 'many': Input should be a valid integer"),
        (["-p", "images", "3"], "greater than or equal to 100"),
        (["-p", "dataset", "imagenot"], "dataset = 'imagenot': unknown data set"),
        (["-p", "encoders", "[resnet]"], "unknown encoder 'resnet'"),
        (["-p", "encoders", "mini-openclip"], "valid list; in a shell, -p encoders '[mini-clip, mini-vit]'"),
        (["-p", "dataset", "/no/such"], "dataset = '/no/such': unknown data set '/no/such': there is no such folder"),
        (["-p", "device", "gpu"], "gpu"),
        (["-p", "device", "meta"], "device"),
        (["-p", "device", "cuda:99"], "CUDA devices here; 'cpu' always works"),
        (["-p", "seed", "[1"], "error"),
        (["--profile", "profiles/none.yml"], "profiles/none.yml"),
        (["--profile", "book/intro.md"], "error"),
    ],
)
def test_bad_parameters_stop_a_chapter_before_any_work(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("edition.run.run_chapter", None)
    out = tmp_path / "out.ipynb"
    assert main([str(ROOT / "book/dimension.md"), *arguments, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_chapter_whose_process_is_killed_says_so(tmp_path, capsys):
    text = (ROOT / "book/residual_stream.md").read_text()
    start = text.index("\n## ")
    killed = tmp_path / "killed.md"
    cell = "```{code-cell} ipython3\nimport os\nos.kill(os.getpid(), 9)\n```\n"
    killed.write_text(text[:start] + cell + text[start:])
    assert main([str(killed), "--out", str(tmp_path / "out.ipynb")]) == 1
    assert "killed.md: its process died, probably out of memory; see" in capsys.readouterr().err
    assert (tmp_path / "out.ipynb").is_file()


def test_all_bad_parameters_are_named_at_once():
    with pytest.raises(ParameterError, match=r"split = 'all'.*; seed = -1"):
        check_parameters(split="all", seed=-1)


def test_a_pair_to_fine_tune_must_be_of_the_run(tmp_path):
    run = {"encoders": ["mini-clip"], "tasks": ["digits"]}
    check_parameters(**run, finetune=["mini-clip on digits"])
    (folder := tmp_path / "my set on disk").mkdir()
    spaced = run | {"tasks": [*run["tasks"], str(folder)]}
    check_parameters(**spaced, finetune=[f"mini-clip on {folder}"])
    with pytest.raises(ParameterError, match=r"\['mini-vit on digits'\] are not among this run's .* fine-tunes none"):
        check_parameters(**run, finetune=["mini-vit on digits"])


def test_an_empty_value_is_an_empty_text(monkeypatch):
    given = {}

    monkeypatch.setattr("edition.run.run_chapter", lambda source, values, out, progress: given.update(values))
    assert main(["semantics", "-p", "dictionary", "", "-p", "images", "300", "--book"]) == 0
    assert (given["dictionary"], given["images"]) == ("", 300)
    check_parameters(**given)


def test_a_chapter_refuses_its_parameters_in_the_notebook_too():
    values = chapter_defaults(chapter_path("dimension"))
    with pytest.raises(ParameterError, match="images = 3:"):
        Chapter("dimension", values | {"images": 3})
    with pytest.raises(
        ParameterError, match=r"no parameters \['images', 'seed'\]; the first cell of book/dimension.md"
    ):
        Chapter("dimension", {name: value for name, value in values.items() if name not in ("images", "seed")})
    assert Chapter("dimension", values | {"x": 1}).parameters == values


def test_the_reference_set_may_be_a_task_too():
    """Its images are then the first ones, and the task's are balanced over classes."""
    values = chapter_defaults(chapter_path("selection")) | {"dataset": "digits", "tasks": ["digits"]}
    values["encoders"] = ["mini-clip"]
    run = Chapter("selection", values | {"images": 100, "reference_images": 200})
    reference, training = run.data(), run.data("digits", "train")
    assert (len(reference), len(training)) == (200, 100)
    assert training.labels.bincount().tolist() == [10] * 10
    with pytest.raises(ParameterError, match="selection extracts no such units"):
        run.data("shapes", "train")


def test_a_page_that_draws_what_another_trained_does_without_where_that_was_not_run():
    values = chapter_defaults(chapter_path("ground_truth")) | {"profile": "none", "results": "_build/results/none"}
    page = page_functions("ground_truth", "trained_for_colours", run=Chapter("ground_truth", values))
    assert page["trained_for_colours"]("mini-clip") is None


def test_an_encoder_is_named_in_one_list():
    for name in ("controls", "without_text"):
        with pytest.raises(ParameterError, match=rf"{name} = .*\['mini-vit'\] are among the encoders, too"):
            check_parameters(encoders=["mini-vit"], **{name: ["mini-vit"]})


def test_names_that_repeat_and_classes_without_images_are_refused():
    with pytest.raises(ParameterError, match=r"tasks = .*\['digits'\] repeat"):
        check_parameters(tasks=["digits", "shapes", "digits"])
    with pytest.raises(ParameterError, match="images = 100: 162 of 262 classes of emoji-flags have no training image"):
        task_parts("emoji-flags", 100, 0)


def test_results_of_a_chapter_that_was_not_run_say_which_to_run():
    run = Chapter("claims", {"profile": "none", "results": "_build/results/none"})
    with pytest.raises(FileNotFoundError, match="run the chapter similarity with the same profile first"):
        run.load("claims_similarity", "similarity")


def test_every_claim_points_to_a_figure_and_is_checked_in_its_chapter():
    for name, claim in claims().items():
        page, label = claim.figure.split(":")
        text = (ROOT / "book" / f"{page}.md").read_text()
        assert f"name: {label}\n" in text
        assert f'"{name}"' in text


def code_cells(path):
    return [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapters_start_with_their_parameters_and_profiles_give_no_others(path):
    parameters, setup, *cells = code_cells(path)
    hidden = "remove-cell" if path.stem == "intro" else "hide-input"  # the first page answers first
    assert {"parameters", hidden} <= set(parameters.metadata["tags"])
    names = re.findall(r"^(\w+): ", parameters.source, re.M)
    assert set(names) <= set(PARAMETERS)
    assert len(names) <= 17
    assert f'run = Chapter("{path.stem}", globals())' in setup.source
    assigned = [name for cell in (setup, *cells) for name in assigned_names(ast.parse(cell.source))]
    installed = {"encoders", "controls", "without_text"}  # taken back from the run, without what is not installed
    assert not set(assigned) & set(PARAMETERS) - installed, "a name of a parameter is used for something else"
    assert all(assigned.count(name) == (name in names) for name in installed)
    functions = [n.name for cell in cells for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.FunctionDef)]
    assert len(functions) == len({*functions}), "two functions have one name"
    assert not set(functions) & set(assigned), "a function's name is used for something else"
    for profile in (ROOT / "profiles").glob("*.yml"):
        given = read_profile(profile, path.stem)
        assert set(given) <= set(names)
        check_parameters(**given)


def assigned_names(node):
    """Names that a cell leaves behind: not those inside functions and comprehensions."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    inner = ast.FunctionDef | ast.Lambda | ast.ListComp | ast.DictComp | ast.SetComp | ast.GeneratorExp
    if not isinstance(node, inner):
        for child in ast.iter_child_nodes(node):
            yield from assigned_names(child)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapters_can_be_read_on_the_page(path):
    for place, cell in enumerate(code_cells(path)):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert all(len(line) <= 88 for line in lines), f"cut off on the page: {max(lines, key=len)}"
        assert len(lines) <= 15 or "figures." in cell.source or place < 2  # parameters and imports, which are folded
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 12, f"{node.name} belongs in the library"
        if {"hide-input", "hide-cell"} & set(cell.metadata.get("tags", ())):
            assert cell.metadata["mystnb"]["code_prompt_show"], "a folded cell needs a name that says what it does"
        if "figure" in cell.metadata.get("mystnb", {}) and "figures." in cell.source:
            assert cell.metadata["mystnb"]["image"]["alt"]
            assert cell.metadata["mystnb"]["figure"]["caption"]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_saving_a_chapter_unchanged_changes_nothing(path):
    assert jupytext.writes(jupytext.read(path), fmt="md:myst") == path.read_text()


def test_cells_of_chapters_are_short():
    sizes = [len(cell.source.splitlines()) for path in CHAPTERS for cell in code_cells(path)]
    assert sorted(sizes)[len(sizes) // 2] <= 8


def test_every_table_that_a_chapter_saves_is_listed_and_every_listed_one_is_saved(tmp_path):
    for path in CHAPTERS:
        names = re.findall(r'run\.save\(.*?, "(\w+)"\)', path.read_text(), re.DOTALL)
        names += [f"claims_{path.stem}"] * ("run.claims(" in path.read_text())
        assert set(names) == set(outputs(path.stem).tables)
    run = Chapter("running", {"profile": "mini", "results": str(tmp_path)})
    with pytest.raises(KeyError, match=r"results\.yml does not list something"):
        run.save(pd.DataFrame(), "something")


def test_tables_write_no_negative_zero_and_set_all_that_look_best_in_bold():
    table = pd.DataFrame({"a": [-0.001, 0.5], "b": [np.nan, -0.4]})
    html = styled(table, "{:.2f}", na_rep="").to_html()
    assert "-0.00" not in html
    assert "-0.40" in html
    assert "nan" not in html
    columns = pd.MultiIndex.from_product([["m"], ["B", "Lin", "RD"]])
    html = best_bold(pd.DataFrame([[0.999, 1.0, 0.5]], columns=columns), ["m"], ["B", "Lin", "RD"]).to_html()
    assert re.search(r"col0, #\w+col1 \{\s+font-weight: bold", html)
