"""Speed and memory against the naive way, in the same run: `make bench`.

Each group measures both; the ratio of their medians is printed at the end, and nothing is asserted.
"""

from __future__ import annotations

import pytest
import torch

from residual import load_encoder, trace
from residual.dimension import two_nn
from residual.spectrum import Moments, pca_from_moments

K, D, H = 66, 768, 16


def unit(n):
    """Coordinates, frame and values of a head of ViT-L's size, with a falling spectrum."""
    generator = torch.Generator().manual_seed(0)
    coordinates = torch.randn(n, K, generator=generator) * torch.linspace(3, 0.1, K)
    frame = torch.randn(K, D, generator=generator)
    return coordinates, frame, coordinates @ frame


@pytest.fixture(scope="module", params=["OpenCLIP-B", "CLIP-B", "BLIP-B", "DINOv2-B", "ViT-B"])
def encoder(request):
    return load_encoder(request.param, pretrained=False)


@pytest.mark.parametrize("way", ["naive", "ours"])
def test_trace_over_plain_forward(benchmark, encoder, way):
    benchmark.group = f"trace: {encoder.name}, batch 16, against the model's own forward pass"
    side = 224 if encoder.tower.smallest else encoder.tower.image_size[0]
    pixels = torch.randn(16, 3, side, side, generator=torch.Generator().manual_seed(0))
    run = encoder.encode_image if way == "naive" else (lambda x: trace(encoder, x))
    with torch.no_grad():
        benchmark.pedantic(run, (pixels,), rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("n", [5000, 10000])
@pytest.mark.parametrize("way", ["naive", "ours"])
def test_pca_of_a_head_from_moments_over_svd_of_the_unit(benchmark, n, way):
    benchmark.group = f"PCA of one head, n = {n}: moments against SVD of n x {D}"
    coordinates, frame, values = unit(n)
    if way == "naive":
        benchmark.pedantic(lambda: torch.linalg.svd(values - values.mean(0), full_matrices=False), rounds=3)
    else:  # a layer of 16 heads in one call, as the library does it; the time is for all of them
        moments = Moments.of(coordinates[:, None].expand(-1, H, -1))
        frames = frame.expand(H, -1, -1)
        benchmark.extra_info["calls"] = H
        benchmark.pedantic(lambda: pca_from_moments(moments, frames), rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("n", [5000, 10000])
@pytest.mark.parametrize("way", ["naive", "ours"])
def test_two_nn_over_cdist(benchmark, n, way):
    benchmark.group = f"TwoNN of one head, n = {n}: isometric and blocked against torch.cdist of n x {D}"
    coordinates, frame, values = unit(n)
    if way == "naive":
        benchmark.pedantic(lambda: torch.cdist(values, values).topk(3, largest=False), rounds=5, warmup_rounds=1)
    else:
        samples = coordinates.double() @ torch.linalg.qr(frame.double().mT).R.mT
        benchmark.pedantic(lambda: two_nn(samples), rounds=10, warmup_rounds=1)
