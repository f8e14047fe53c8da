"""Device mix-ups, found without a GPU: torch's fake tensors compute shapes and devices, and refuse to mix these."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import FAMILIES
from residual.alignment import LinearAligner
from residual.dimension import _two_nearest
from residual.encoders import Encoder
from residual.spectrum import Moments, pca_from_moments
from residual.units import trace


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
    assert devices(units.coordinates, units.blocks, units.output, units.frames.heads, units.frames.heads_constant) == {
        "cuda"
    }
    assert devices(units.total(), units["X0"], units["L0.H1"], units["L0.MLP"]) == {"cuda"}
    moments = Moments.of(units.coordinates).merge(Moments.of(units.coordinates))
    spectrum = pca_from_moments(moments, units.frames.heads, units.frames.heads_constant)
    assert devices(moments.mean, moments.scatter, spectrum.components, spectrum.eigenvalues) == {"cuda"}
    samples = units["L0.H1"]
    assert devices(_two_nearest(samples, torch.arange(4, device="cuda"), 2)) == {"cuda"}
    with torch.device("cuda"):
        aligner = LinearAligner(on_gpu.output_dim)
    assert devices(aligner(units.output)) == {"cuda"}


def test_a_mix_up_would_be_seen(on_gpu):
    norm = on_gpu.tower.norm
    norm.bias = nn.Parameter(torch.empty(norm.bias.shape), requires_grad=False)
    with pytest.raises(RuntimeError, match="same device"):
        trace(on_gpu, torch.empty(4, 3, *on_gpu.tower.image_size))
