"""What the playground computes in a browser is what the library computes."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from conftest import FLAGS, page_functions
from edition.chapter import Chapter
from edition.interactive.playground import all_components, write_playground
from edition.pages import chapter_defaults, chapter_path
from residual.alignment import ResiDual, align, component_scores, reference_bases, transformed
from residual.selection import ablate, score_units, select_top

SHOWN = 60


@pytest.fixture(scope="module")
def played():
    values = chapter_defaults(chapter_path("heads")) | {"encoders": ["mini-openclip"], "tasks": ["shapes-colour"]}
    run = Chapter("heads", values | {"images": 200, "reference_images": 300, "dataset": "digits"})
    ((encoder, task),) = run.pairs()
    return run, encoder, task, *shown(run, encoder, task, SHOWN)


def shown(run, encoder, task, count):
    """The page's scene of so many images, and its presets."""
    classes = {(encoder.name, task): run.classes(encoder, task)}
    scores = count * len(all_components(run.units(encoder)).components)
    page = page_functions(
        "heads", "trained", "chosen_heads", "scene_of", run=run, seed=0, SHOWN=scores, classes=classes
    )
    scene, chosen = page["scene_of"](encoder, task)
    return scene, scene.presets(page["trained"](encoder, task), chosen)


def expected(run, encoder, task):
    """Logits of the library for every button."""
    units, labels = run.task_units(encoder, task)
    classes, stored = run.classes(encoder, task), units["test"]
    every = torch.ones(stored.head_grid, dtype=torch.bool)
    ranked = score_units(units["validation"], "U", classes)
    outputs = {"the encoder": stored.outputs(), "all heads": ablate(stored, every)}
    outputs["3 heads, by U"] = ablate(stored, select_top(ranked, 3))
    for name, kind in (("ResiDual", "RD"), ("ResiDual, heads alone", "RD*")):
        aligner = ResiDual(bases := reference_bases(run.units(encoder), kind))
        scores = {split: component_scores(part, bases) for split, part in units.items()}
        align(aligner, encoder, scores, labels, classes, cache=run.root / "_build/fits")
        outputs[name] = transformed(aligner, scores["test"])
    return {name: (output.double()[:SHOWN] @ classes.double().T).numpy() for name, output in outputs.items()}


def read(text, kind="f4"):
    return np.frombuffer(base64.b64decode(text), kind).astype(float)


def test_the_numbers_of_a_page_give_the_logits_of_the_library(played):
    run, encoder, task, scene, presets = played
    data = scene.payload(presets)
    k, c = sum(data["sizes"]), len(data["classes"])
    scores = read(data["scores"], "i2").reshape(SHOWN, k) * read(data["step"])
    for name, logits in expected(run, encoder, task).items():
        preset = data["presets"][name]
        lambdas = read(preset["lambdas"])
        found = (scores * lambdas) @ read(data["products"]).reshape(k, c)
        on = [lambdas[part].any() for part in np.split(np.arange(k), np.cumsum(data["sizes"])[:-1])]
        found += preset["means"] * (read(data["means"]).reshape(-1, c) * np.array(on)[:, None]).sum(0)
        found += sum(preset[key] * read(data[key.lower()]).reshape(SHOWN, c) for key in ("X0", "rest"))
        np.testing.assert_allclose(found, logits, rtol=0, atol=1e-4 * np.abs(logits).max())


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_the_page_computes_them_in_a_browser(played, tmp_path):
    run, encoder, task, scene, presets = played
    page = write_playground(tmp_path / "page", scene, presets)
    assert page.stat().st_size < 1e5
    text = page.read_text()
    assert not re.search(r'(?:src|href)="https?:', text)
    command = [
        "chromium",
        "--headless",
        *FLAGS,
        f"--user-data-dir={tmp_path / 'user'}",
        "--virtual-time-budget=8000",
        "--dump-dom",
    ]
    done = subprocess.run([*command, f"{page.as_uri()}#check"], capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(html.unescape(re.search(r'<pre id="checked">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
    labels = scene.labels.numpy()
    for name, logits in expected(run, encoder, task).items():
        own = np.array(found[name]["logits"]).reshape(3, -1)
        np.testing.assert_allclose(own, logits[:3], rtol=0, atol=1e-4 * np.abs(logits).max())
        assert found[name]["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())


def test_a_test_split_with_fewer_images_is_shown_whole(played):
    run, encoder, task, *_ = played
    scene, _ = shown(run, encoder, task, 10_000)
    assert len(scene.data) == len(scene.labels) == len(scene.scores) == 200


def test_names_of_classes_do_not_end_the_script(played, tmp_path):
    *_, scene, presets = played
    bad = "</script><script>alert(1)</script>"
    renamed = type(scene)(**(vars(scene) | {"names": (bad, *scene.names[1:]), "task": bad}))
    page = write_playground(tmp_path / "page", renamed, presets)
    assert page.read_text().count("</script>") == 2
    assert "<script>alert" not in page.read_text()
    payload = json.loads((page.parent / "data.js").read_text().removeprefix("window.played = ").rstrip(";\n"))
    assert payload["classes"][0] == bad
