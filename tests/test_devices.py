"""Device mix-ups, found without a GPU: torch's fake tensors compute shapes and devices, and refuse to mix these."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import FAMILIES
from residual.alignment import Bases, LinearAligner, ResiDual, transformed
from residual.dimension import _by_products
from residual.encoders.encoder import Encoder
from residual.spectrum import Moments, pca_from_moments
from residual.training import _Task
from residual.units import Unit, trace


@pytest.fixture(params=FAMILIES)
def on_gpu(request, small, monkeypatch):
    """An encoder whose weights are fakes of CUDA, while its caller's pixels are on the CPU."""
    encoder = small(request.param)
    with FakeTensorMode(allow_non_fake_inputs=False):
        for module in encoder.model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors |= {name: _fake(value) for name, value in tensors.items() if value is not None}
        # Whether pixels are finite is nothing that a fake tensor can tell.
        monkeypatch.setattr(Encoder, "check_pixels", lambda self, pixels: pixels.to(self.device, self.dtype))
        yield encoder


def _fake(value: torch.Tensor) -> torch.Tensor:
    fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
    return nn.Parameter(fake, requires_grad=False) if isinstance(value, nn.Parameter) else fake


def devices(*tensors: torch.Tensor) -> set[str]:
    return {tensor.device.type for tensor in tensors}


def test_units_and_spectra_are_where_the_encoder_is(on_gpu):
    units = trace(on_gpu, torch.empty(4, 3, *on_gpu.tower.image_size))
    assert devices(
        units.head_coordinates, units.blocks, units.output, units.frames.head_frames, units.frames.head_constant
    ) == {"cuda"}
    assert devices(units.total(), units["X0"], units["L0.H1"], units["L0.MLP"]) == {"cuda"}
    moments = Moments.of(units.head_coordinates).merge(Moments.of(units.head_coordinates))
    spectrum = pca_from_moments(moments, units.frames.head_frames, units.frames.head_constant)
    assert devices(moments.mean, moments.scatter, spectrum.components, spectrum.eigenvalues) == {"cuda"}
    samples = units["L0.H1"]
    assert devices(_by_products(samples, torch.arange(4, device="cuda"), 2)) == {"cuda"}
    with torch.device("cuda"):
        aligner = LinearAligner(on_gpu.output_dim)
    assert devices(aligner(units.output)) == {"cuda"}


def test_what_is_trained_and_made_of_inputs_elsewhere_is_where_it_belongs(on_gpu):
    d, k = on_gpu.output_dim, 6
    with torch.device("cuda"):
        means, unit = torch.empty(2, d), torch.zeros(k, dtype=torch.int64)
        units = Unit("head", 0, 0), Unit("MLP", 0)
        bases = Bases("RD", units, torch.empty(k, d), unit, means, torch.empty(k))
        adapter = ResiDual(bases)
    inputs, labels = torch.empty(70, bases.width), torch.zeros(70, dtype=torch.int64)
    task = _Task(inputs, labels, torch.empty(3, d, device="cuda"), 100.0, torch.device("cuda"))
    losses = list(task.epoch(adapter, torch.Generator()))
    assert devices(*losses) == {"cuda"}
    assert devices(transformed(adapter, inputs)) == {"cpu"}


def test_a_mix_up_would_be_seen(on_gpu):
    norm = on_gpu.tower.norm
    norm.bias = nn.Parameter(torch.empty(norm.bias.shape), requires_grad=False)
    with pytest.raises(RuntimeError, match="same device"):
        trace(on_gpu, torch.empty(4, 3, *on_gpu.tower.image_size))
