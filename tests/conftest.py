"""Small real encoders of every family, so that most tests take milliseconds.

What takes seconds to import is imported where it is used: the process that hands out tests needs none of it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import beartype  # noqa: F401  (before our modules, as LIBRARIES)
import pytest

from edition.pages import code_cells, project_root

if TYPE_CHECKING:
    import torch

    from residual import Encoder

SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
TOWERS = {
    "blip": {
        "vision_config": SMALL | {"intermediate_size": 96, "initializer_range": 0.02},
        "text_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "encoder_hidden_size": 48},
        "image_text_hidden_size": 20,
    },
    "clip": {
        "vision_config": SMALL | {"intermediate_size": 96, "hidden_act": "quick_gelu"},
        "text_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
        "projection_dim": 20,
    },
    "clip_vision_model": SMALL | {"intermediate_size": 96},
    "clip_vision_model-projected": SMALL
    | {"intermediate_size": 96, "projection_dim": 20, "architectures": ["CLIPVisionModelWithProjection"]},
    "dinov2": SMALL,
    "dinov2-swiglu": SMALL | {"use_swiglu_ffn": True},
    "dinov2_with_registers": SMALL | {"num_register_tokens": 4},
    "vit": SMALL | {"intermediate_size": 96},
    "vit-no-bias": SMALL | {"intermediate_size": 96, "qkv_bias": False},
}
OPEN_CLIP = {"openclip": {}, "openclip-scaled": {"ls_init_value": 0.3, "no_ln_pre": True, "final_ln_after_pool": True}}
FAMILIES = [*TOWERS, *OPEN_CLIP]
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")  # of Chromium


# While jaxtyping's hook imports one of our modules, Python looks for compiled files under another name, also for all
# that the module imports. In a new environment, and always where Python may not write such files, each process would
# compile 2,000 files of these libraries again.
LIBRARIES = ("open_clip", "transformers", "pandas", "matplotlib.pyplot", "IPython", "scipy.stats", "huggingface_hub")


def pytest_configure():
    """Ctrl-C is heard by what tests start, also where these run in a shell's background, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection():
    """Import others' libraries first, without looking for garbage, in the processes that share the whole suite."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    gc.disable()
    for name in LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(name)


def pytest_collection_finish():
    """What was imported stays, and is not looked through for garbage again and again."""
    gc.freeze()
    gc.enable()


LONGEST = tuple(
    f"test_{name}.py" for name in ("site", "graph", "rerun", "data", "zoo", "units", "hub", "store", "chapters")
)


def pytest_collection_modifyitems(items):
    """The longest files first, or one process works on them alone at the end."""
    items.sort(key=lambda item: [*LONGEST, item.path.name].index(item.path.name))


def shake(encoder: Encoder, seed: int = 0) -> Encoder:
    """Biases, LayerNorm weights and layer scales at random: at initialisation Eq. 1 is too easy."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for parameter in encoder.model.parameters():
        if parameter.ndim == 1:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return encoder


def pixels_of(encoder: Encoder, count: int = 3, seed: int = 0) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *encoder.tower.image_size, generator=generator)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def interrupt_at(function, call):
    """The same function, interrupted as by Ctrl-C at a given call."""
    calls = []

    def interrupted(*args, **options):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **options)

    return interrupted


def write_config(folder, kind: str) -> None:
    """A model's configuration as its library saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind in OPEN_CLIP:
        vision = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "head_width": 12} | OPEN_CLIP[kind]
        text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
        config = {"model_cfg": {"embed_dim": 20, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
    else:
        from transformers import AutoConfig

        AutoConfig.for_model(kind.split("-")[0], **TOWERS[kind]).save_pretrained(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    for kind in FAMILIES:
        write_config(root / kind, kind)
    return root


@pytest.fixture
def small(folders):
    """small(kind) builds one of FAMILIES with shaken random weights."""
    from residual import load_encoder

    return lambda kind, **options: shake(load_encoder(str(folders / kind), pretrained=False, **options))


@pytest.fixture
def encoder(small):
    return small("openclip")


@pytest.fixture
def dataset():
    import torch

    from residual.data.dataset import Dataset

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (70, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Dataset("noise", "train", images, torch.arange(70) % 3, ("a", "b", "c"), ("{}",))


FEW = """
data: {profile: few, encoders: [mini-openclip], controls: [], tasks: [digits], images: 100, set_images: 100}
dimension: &one {profile: few, encoders: [mini-openclip], dataset: digits, images: 100}
pursuit: *one
semantics: {<<: *one, encoders: [mini-openclip, mini-openclip@random]}
similarity:
  {profile: few, encoders: [mini-openclip], dataset: digits, reference_images: 130, images: 100, others: [shapes]}
ground_truth: {profile: few, encoders: [mini-openclip], controls: [], images: 100}
text_and_code: &tasks
  profile: few
  encoders: [mini-openclip]
  dataset: digits
  tasks: [digits]
  reference_images: 130
  images: 100
heads: *tasks
selection: {<<: *tasks, encoders: [mini-openclip, mini-openclip@random], without_text: [mini-vit]}
alignment:
  {<<: *tasks, encoders: [mini-openclip, mini-openclip@random], without_text: [mini-vit], finetune: [], seeds: 1}
"""


def run(folder: Path, chapter: str, given: dict[str, object], *options: str) -> subprocess.CompletedProcess:
    """Run a chapter as `make chapter` does."""
    pairs = [word for name, value in given.items() for word in ("-p", name, json.dumps(value))]
    command = [sys.executable, "-m", "edition.run", chapter, *pairs, *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def page_functions(chapter: str, *names: str, **namespace: object) -> dict[str, object]:
    """Functions that cells of a chapter define, in a namespace with what its set-up cell imports."""
    cells = [cell.source for cell in code_cells(project_root() / f"book/{chapter}.md")]
    setup = next(source for source in cells if "run = Chapter(" in source)
    exec(setup.partition("\nrun = Chapter(")[0], namespace | {"__name__": chapter}, namespace)
    for source in cells:
        if any(f"def {name}(" in source for name in names):
            exec(source, namespace)
    return namespace


def copy_project(folder: Path) -> Path:
    """A copy of the project, so that nothing is shared with other runs but the code."""
    folder.mkdir(parents=True)
    root = project_root()
    for name in ("Snakefile", "_toc.yml", "_config.yml", "constraints.txt", "pyproject.toml"):
        shutil.copy(root / name, folder)
    for name in ("book", "profiles"):
        shutil.copytree(root / name, folder / name)
    (folder / "lib").symlink_to(root / "lib")
    return folder


def small_project(folder: Path) -> Path:
    """A copy of the project with a small profile, "few"."""
    (copy_project(folder) / "profiles/few.yml").write_text(FEW)
    return folder


@pytest.fixture
def project(tmp_path):
    return small_project(tmp_path / "le projet à moi")


@pytest.fixture
def inside(project, monkeypatch):
    """The project's copy, as the folder that is worked in."""
    monkeypatch.chdir(project)
    return project


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Data sets are read and kept apart from other tests' and the user's."""
    import datasets

    from edition.inputs import task_split
    from residual.data import hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setenv("RESIDUAL_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    hub._fetched.cache_clear()
    task_split.cache_clear()
