"""Speed against the naive way and against other libraries, in the same run: `make bench`.

The two alternate round by round, so that a machine that slows down slows both. The ratio of their
medians is printed at the end, and kept for the page *Running it*; nothing is asserted.
"""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from schedulefree import AdamWScheduleFree

from residual import load_encoder, trace
from residual.alignment import Bases, ResiDual
from residual.dimension import two_nn
from residual.encoders import encoder as encoders
from residual.extraction import DTYPES
from residual.pursuit import somp_in_basis, textspan_from_moments
from residual.spectrum import Moments, pca_from_moments
from residual.training import BATCH, _Task
from residual.units import residual_units

K, D, H = 66, 768, 16  # a layer of 16 heads of 64 dimensions, in an output of 768
NAMES = {"dadapy": "DADApy", "skdim": "scikit-dimension"}
PEERS = Path(os.environ.get("PEERS", "_build/peers")) / "bin/python"


def compare(benchmark, what, against, naive, ours, *, rounds, calls=1, images=0):
    """Benchmark `ours`, and before each round time `naive`; one in a process of its own returns its seconds.

    calls: how often `ours` does naive's work. images: that both work on, where growth is of interest.
    """
    seconds = []

    def run_naive():
        start = time.perf_counter()
        own = naive()
        seconds.append(own if isinstance(own, float) else time.perf_counter() - start)

    with torch.no_grad():
        naive()
        benchmark.pedantic(ours, setup=run_naive, rounds=rounds, warmup_rounds=1)
    benchmark.extra_info |= {
        "what": what, "against": against, "images": images, "naive": statistics.median(seconds), "calls": calls
    }  # fmt: skip


@pytest.mark.parametrize("name", ["OpenCLIP-B", "CLIP-B", "BLIP-B", "DINOv2-B", "ViT-B"])
def test_trace(benchmark, name):
    encoder = load_encoder(name, pretrained=False)
    side = 224 if encoder.tower.smallest else encoder.tower.image_size[0]
    pixels = torch.randn(16, 3, side, side, generator=torch.Generator().manual_seed(0))
    plain, ours = (lambda: encoder.encode_image(pixels)), (lambda: trace(encoder, pixels))
    compare(benchmark, f"a trace of {name}, batch 16", "the plain forward pass", plain, ours, rounds=7)


def test_moments(benchmark):
    encoder = load_encoder("OpenCLIP-B", pretrained=False)
    pixels = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    def with_moments():
        units = trace(encoder, pixels)
        return [Moments.of(part) for part in (units.head_coordinates, units.blocks, units.output)]

    what = "a trace of OpenCLIP-B and its moments, batch 16"
    compare(benchmark, what, "the trace alone", lambda: trace(encoder, pixels), with_moments, rounds=7)


@pytest.mark.parametrize(
    ("name", "batch"), [("mini-openclip", 128), ("DINOv2-S@random", 32), ("OpenCLIP-B@random", 32)]
)
def test_parts(benchmark, name, batch):
    encoder = load_encoder(name)
    side = 224 if encoder.tower.smallest else encoder.tower.image_size[0]
    pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))

    def at_once():
        with mock.patch.object(encoders, "CACHED", 10**9):
            trace(encoder, pixels)

    what = f"a trace of {name.partition('@')[0]}, batch {batch}, in parts that fit the cache"
    compare(benchmark, what, "the batch at once", at_once, lambda: trace(encoder, pixels), rounds=3)


@pytest.mark.parametrize("how", ["compiled", "bfloat16", "float16"])
def test_faster_trace(benchmark, how):
    plain, other = (load_encoder("OpenCLIP-B", pretrained=False) for _ in range(2))
    if how == "compiled":
        for block in other.tower.blocks:
            block.mlp.compile()
    precision = DTYPES.get(how, torch.float32)
    pixels = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    def faster():
        with torch.autocast("cpu", precision, enabled=how != "compiled"):
            trace(other, pixels)

    what = f"a trace of OpenCLIP-B, batch 16, {how}"
    compare(benchmark, what, "single precision", lambda: trace(plain, pixels), faster, rounds=3)


def head(n):
    """Coordinates, frame and values of a head, with a falling spectrum."""
    generator = torch.Generator().manual_seed(0)
    coordinates = torch.randn(n, K, generator=generator) * torch.linspace(3, 0.1, K)
    frame = torch.randn(K, D, generator=generator)
    return coordinates, frame, coordinates @ frame


@pytest.mark.parametrize("n", [5000, 10000])
def test_pca(benchmark, n):
    coordinates, frame, values = head(n)
    moments, frames = Moments.of(coordinates[:, None].expand(-1, H, -1)), frame.expand(H, -1, -1)
    compare(
        benchmark,
        "PCA of a head from moments",
        f"SVD of n x {D}",
        lambda: torch.linalg.svd(values - values.mean(0), full_matrices=False),
        lambda: pca_from_moments(moments, frames),
        rounds=5,
        calls=H,
        images=n,
    )


def isometric(n):
    coordinates, frame, values = head(n)
    return coordinates.double() @ torch.linalg.qr(frame.double().mT).R.mT, values


@pytest.mark.parametrize("n", [5000, 10000, 20000])
def test_two_nn(benchmark, n):
    samples, values = isometric(n)

    def naive():  # a block at a time, as all distances take 8 n^2 bytes
        for part in values.split(5000):
            torch.cdist(part, values).topk(3, largest=False)

    other = f"torch.cdist of n x {D}"
    compare(benchmark, "TwoNN of a head", other, naive, lambda: two_nn(samples), rounds=5, images=n)


@pytest.mark.parametrize("n", [5000, 10000, 20000])
def test_two_nn_and_the_product(benchmark, n):
    samples, _ = isometric(n)
    single = samples.float()
    buffer = torch.empty(256, n)

    def product():
        for part in single.split(256):
            torch.mm(part, single.T, out=buffer[: len(part)])

    compare(
        benchmark, "TwoNN of a head", "its matrix product alone", product, lambda: two_nn(samples), rounds=15, images=n
    )


@pytest.mark.skipif(not PEERS.is_file(), reason="needs other libraries, which `make bench` installs")
@pytest.mark.parametrize("n", [5000, 10000, 20000])
@pytest.mark.parametrize("peer", ["dadapy", "skdim"])
def test_two_nn_of_others(benchmark, tmp_path, peer, n):
    samples, _ = isometric(n)
    np.save(path := tmp_path / "samples.npy", samples.numpy())
    command = [PEERS, Path(__file__).with_name("peers.py"), peer, path]

    def theirs():
        seconds, dimension = map(
            float, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
        )
        assert dimension == pytest.approx(two_nn(samples), rel=1e-6)
        return seconds

    compare(benchmark, "TwoNN of a head", NAMES[peer], theirs, lambda: two_nn(samples), rounds=3, images=n)


def texts(count=3498):
    return torch.nn.functional.normalize(torch.randn(count, D, generator=torch.Generator().manual_seed(1)), dim=1)


def test_textspan(benchmark):
    coordinates, frame, values = head(5000)
    words, values = texts(), values - values.mean(0)
    moments, frames = Moments.of(coordinates[:, None].expand(-1, H, -1)), frame.expand(H, -1, -1)

    def naive():
        residual, left = values, words
        for _ in range(5):
            atom = left[(left @ residual.T).var(1).argmax()]
            residual = residual - torch.outer(residual @ atom, atom) / (atom @ atom)
            left = left - torch.outer(left @ atom, atom) / (atom @ atom)

    what = f"TextSpan of a head from moments, 5 of 3,498 texts in R^{D}, n = 5,000"
    compare(
        benchmark,
        what,
        "samples, as published",
        naive,
        lambda: textspan_from_moments(moments, words, 5, frames),
        rounds=5,
        calls=H,
    )


def test_somp(benchmark):
    coordinates, frame, values = head(5000)
    words, values = texts(), values - values.mean(0)
    basis, factor = torch.linalg.qr(frame.double().mT)
    samples = (coordinates - coordinates.mean(0)).double() @ factor.mT

    def naive():
        residual, picked = values, []
        for _ in range(5):
            picked.append((words @ residual.T).abs().sum(1).argmax())
            atoms = words[torch.stack(picked)]
            residual = values - torch.linalg.lstsq(atoms.T, values.T).solution.T @ atoms

    what = f"SOMP of a head in isometric coordinates, 5 of 3,498 texts in R^{D}, n = 5,000"
    ours = functools.partial(somp_in_basis, samples, basis, words.double(), 5, "l1")
    compare(benchmark, what, f"samples in R^{D}", naive, ours, rounds=5)


def residual(n, layers=12, heads=12, d=512):
    """A ResiDual of the size of ViT-B/16, an optimiser, and a task of n images on stored coordinates."""
    generator = torch.Generator().manual_seed(0)
    units = tuple(residual_units(layers, heads)[1:])
    sizes = torch.tensor([64 if unit.kind == "head" else d for unit in units])
    k = int(sizes.sum())
    components = torch.randn(k, d, generator=generator) / d**0.5
    index = torch.arange(len(units)).repeat_interleave(sizes)
    bases = Bases("RD", units, components, index, torch.zeros(len(units), d), torch.ones(k))
    module = ResiDual(bases)
    optimizer = AdamWScheduleFree(module.parameters(), lr=1e-2)
    optimizer.train()
    inputs = torch.randn(n, bases.width, generator=generator)
    classes = torch.nn.functional.normalize(torch.randn(100, d, generator=generator), dim=1)
    task = _Task(inputs, torch.arange(n) % 100, classes, 100.0, torch.device("cpu"))

    def step(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return module, task, step


def test_residual_epoch(benchmark):
    module, task, step = residual(2000)
    encoder = load_encoder("OpenCLIP-B", pretrained=False)
    pixels = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    @torch.enable_grad()
    def naive():  # one batch
        trace(encoder, pixels)
        step(task.loss(module(task.inputs[:BATCH]), torch.arange(BATCH)))

    @torch.enable_grad()
    def ours():  # an epoch
        for loss in task.epoch(module, torch.Generator().manual_seed(0)):
            step(loss)

    what = f"RD of a ViT-B/16, {BATCH} images of an epoch, on stored coordinates"
    compare(benchmark, what, "the encoder in the loop", naive, ours, rounds=3, calls=2000 / BATCH)


def test_residual_step(benchmark):
    module, task, step = residual(BATCH)
    scaled, gradient = task.inputs[:, : len(module.components)].clone(), torch.randn(BATCH, 512)

    def products():
        return scaled @ module.components, gradient @ module.components.T

    @torch.enable_grad()
    def ours():
        step(task.loss(module(task.inputs[:BATCH]), torch.arange(BATCH)))

    what = f"RD of a ViT-B/16, a step of {BATCH} images"
    compare(benchmark, what, "its two matrix products alone", products, ours, rounds=30)
