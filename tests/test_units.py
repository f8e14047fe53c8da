"""Eq. 1: the units sum to the model's own output, and tracing leaves nothing behind."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from conftest import FAMILIES, pixels_of, relative_error, shake
from residual import load_encoder, trace
from residual.units import Unit, head_frames, head_tokens, residual_units

BASE = ["OpenCLIP-B", "CLIP-B", "BLIP-B", "DINOv2-B", "ViT-B"]
LARGE = ["OpenCLIP-L", "CLIP-L", "BLIP-L", "DINOv2-L", "ViT-L"]


def state_of(module):
    """Everything that tracing could leave on a module."""
    return [
        (name, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), m.training)
        for name, m in module.named_modules()
    ]


def check_identity(encoder, pixels, tolerance):
    before, untraced = state_of(encoder.model), encoder.encode_image(pixels)
    units = trace(encoder, pixels)
    assert relative_error(units.output, untraced) < tolerance
    assert relative_error(units.total(), untraced) < tolerance
    assert relative_error(sum(units[label] for label in units.labels), untraced) < tolerance
    assert state_of(encoder.model) == before


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("count", [1, 5])
def test_units_sum_to_the_output_in_double_precision(small, kind, count):
    encoder = small(kind, dtype=torch.float64)
    check_identity(encoder, pixels_of(encoder, count), 1e-12)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_parts_of_tokens_sum_to_the_head(small, kind):
    encoder = small(kind)
    pixels, before = pixels_of(encoder, 5), state_of(encoder.model)
    units, (rows, columns) = trace(encoder, pixels), encoder.patch_grid(pixels)
    for layer, head in ((0, 1), (encoder.layers - 1, encoder.heads - 1)):
        parts = head_tokens(encoder, pixels, layer, head)
        assert parts.shape[1] - rows * columns == (5 if "registers" in kind else 1)
        assert relative_error(parts.sum(1), units[f"L{layer}.H{head}"]) < 1e-5
    assert state_of(encoder.model) == before


def test_a_tokens_part_is_what_its_value_adds(encoder):
    """Without the value of one patch, the head loses that patch's part, with the norm's m and s held."""
    pixels, block = pixels_of(encoder), encoder.tower.blocks[-1]
    parts, frames, seen = head_tokens(encoder, pixels, 2, 1), head_frames(encoder), []
    handle = block.norm1.register_forward_hook(lambda _, __, out: seen.append(out))
    scale = trace(encoder, pixels).head_coordinates[:, 2, 1, -2]
    handle.remove()
    q, k, v = (part.unflatten(-1, (block.heads, -1))[:, :, 1] for part in block.qkv(seen[0], seen[0]))
    weights = torch.softmax((q[:, :1] * k).sum(-1) / q.shape[-1] ** 0.5, -1)
    lost = (weights[:, 7, None] * v[:, 7] * scale[:, None]) @ frames.head_frames[2, 1, :-2]
    others = parts[:, 7] - lost  # what is spread evenly
    count = parts.shape[1]
    shared = trace(encoder, pixels).head_coordinates[:, 2, 1, -2:] @ frames.head_frames[2, 1, -2:]
    torch.testing.assert_close(others, (shared + frames.head_constant) / count, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("layer", "head"), [(3, 0), (0, 4), (-1, 0)])
def test_tokens_of_no_head_are_refused(encoder, layer, head):
    with pytest.raises(KeyError, match=f"no head L{layer}.H{head}; .* has 3 layers of 4 heads"):
        head_tokens(encoder, pixels_of(encoder), layer, head)


@pytest.mark.parametrize("name", BASE)
def test_units_sum_to_the_output_at_base_size(name):
    encoder = shake(load_encoder(name, pretrained=False))
    assert (encoder.layers, encoder.heads, encoder.width, encoder.head_width) == (12, 12, 768, 64)
    check_identity(encoder, pixels_of(encoder, 1), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_units_sum_to_the_output_at_large_size(name):
    encoder = shake(load_encoder(name, pretrained=False))
    assert (encoder.layers, encoder.heads, encoder.width, encoder.head_width) == (24, 16, 1024, 64)
    check_identity(encoder, pixels_of(encoder, 2), 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
@pytest.mark.parametrize("kind", ["openclip", "dinov2"])
def test_half_precision_is_as_good_as_its_rounding(small, kind, dtype, tolerance):
    encoder, exact = small(kind, dtype=dtype), small(kind)
    pixels = pixels_of(exact)
    units = trace(encoder, pixels)
    assert units.output.dtype == torch.float32
    assert relative_error(units.total(), units.output) < tolerance
    assert relative_error(units.output, trace(exact, pixels).output) < tolerance


def test_a_unit_is_what_removing_it_changes(encoder):
    """The last block's unit is the change of the residual stream, with the norm's m and s held."""
    pixels = pixels_of(encoder)
    block, seen = encoder.tower.blocks[-1], []
    handle = block.mlp.register_forward_hook(lambda _, __, out: seen.append(out[:, 0]))
    units = trace(encoder, pixels)
    handle.remove()
    visual, share = encoder.model.visual, 1 / (2 * encoder.layers + 1)
    end = []
    visual.ln_post.register_forward_pre_hook(lambda _, args: end.append(args[0][:, 0]))
    encoder.encode_image(pixels)
    mean = end[0].mean(1, keepdim=True)
    scale = (end[0].var(1, correction=0, keepdim=True) + visual.ln_post.eps).sqrt()
    expected = (visual.ln_post.weight * (seen[0] - mean * share) / scale + visual.ln_post.bias * share) @ visual.proj
    torch.testing.assert_close(units["L2.MLP"], expected)


def test_labels_follow_the_residual_stream(encoder):
    labels = trace(encoder, pixels_of(encoder)).labels
    assert labels[:6] == ["X0", "L0.H0", "L0.H1", "L0.H2", "L0.H3", "L0.MLP"]
    assert len(labels) == 1 + encoder.layers * (encoder.heads + 1)


@pytest.mark.parametrize("label", ["X0", "Y", "L0.H3", "L11.H0", "L11.MLP"])
def test_a_unit_knows_its_label(label):
    assert str(Unit.parse(label)) == label


def test_units_come_in_the_order_of_the_residual_stream_and_know_their_block():
    units = residual_units(2, 1)
    assert [str(unit) for unit in units] == ["X0", "L0.H0", "L0.MLP", "L1.H0", "L1.MLP"]
    assert [unit.block for unit in units if unit.kind != "head"] == [0, 1, 2]
    for label in ("L0", "H3", "L0.X0", "l0.h1", "L0.H", "L-1.MLP", "L0.H1 "):
        with pytest.raises(KeyError, match="no unit"):
            Unit.parse(label)


@pytest.mark.parametrize("label", ["L9.H0", "L0.H4", "x", ""])
def test_an_unknown_unit_is_named(encoder, label):
    with pytest.raises(KeyError, match="no unit"):
        trace(encoder, pixels_of(encoder))[label]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["openclip", "blip", "dinov2"])
def test_an_exception_inside_leaves_the_model_as_it_was(small, kind, error):
    encoder = small(kind)
    pixels, before = pixels_of(encoder), state_of(encoder.model)
    untraced = encoder.encode_image(pixels)

    def fail(*_):
        raise error("stop")

    for module in (encoder.tower.blocks[1].module, encoder.tower.blocks[2].mlp):
        handle = module.register_forward_hook(fail)
        with pytest.raises(error):
            trace(encoder, pixels)
        handle.remove()
        assert state_of(encoder.model) == before
    torch.testing.assert_close(encoder.encode_image(pixels), untraced, rtol=0, atol=0)


def test_nested_tracing_keeps_both_apart(encoder):
    outer, inner = pixels_of(encoder, 2), pixels_of(encoder, 3, seed=1)
    expected, before, found = trace(encoder, inner), state_of(encoder.model), []

    def trace_inside(*_):
        if not found:
            found.append(None)
            found[0] = trace(encoder, inner)

    handle = encoder.tower.blocks[1].mlp.register_forward_hook(trace_inside)
    units = trace(encoder, outer)
    handle.remove()
    torch.testing.assert_close(found[0].total(), expected.total())
    assert relative_error(units.total(), encoder.encode_image(outer)) < 1e-5
    assert state_of(encoder.model) == before


def test_a_block_that_does_not_run_is_an_error(encoder):
    blocks, first = encoder.model.visual.transformer.resblocks, encoder.tower.blocks[0].module
    blocks[0] = torch.nn.Identity().eval()
    blocks[0].forward = lambda x, attn_mask=None: x
    with pytest.raises(RuntimeError, match=r"\['L0'\].*did not run"):
        trace(encoder, pixels_of(encoder))
    assert "forward" not in vars(first)


def test_a_block_that_runs_twice_is_an_error(encoder):
    blocks = encoder.model.visual.transformer.resblocks
    blocks[1] = blocks[0]
    with pytest.raises(RuntimeError, match="ran twice"):
        trace(encoder, pixels_of(encoder))


def test_training_mode_is_refused(encoder):
    encoder.model.train()
    with pytest.raises(RuntimeError, match="training mode"):
        trace(encoder, pixels_of(encoder))


def test_training_mode_of_a_part_is_refused(encoder):
    encoder.tower.blocks[1].mlp.train()
    with pytest.raises(RuntimeError, match="training mode"):
        trace(encoder, pixels_of(encoder))


def test_threads_wait_for_each_other(encoder):
    batches = [pixels_of(encoder, 2, seed) for seed in range(6)]
    expected, before = [trace(encoder, batch).total() for batch in batches], state_of(encoder.model)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda batch: trace(encoder, batch).total(), batches))
    torch.testing.assert_close(found, expected)
    assert state_of(encoder.model) == before


def test_the_sum_is_exact_under_autocast(encoder):
    with torch.autocast("cpu", torch.bfloat16):
        units = trace(encoder, pixels_of(encoder))
    assert relative_error(units.total(), units.output) < 0.02
    assert units.head_coordinates.dtype == torch.float32


def test_uint8_pixels_are_normalised(encoder):
    raw = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in (encoder.mean, encoder.std))
    torch.testing.assert_close(trace(encoder, raw).output, trace(encoder, (raw / 255 - mean) / std).output)


@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [
        ([[0.0]], TypeError, "torch"),
        (torch.zeros(3, 32, 32), ValueError, r"\[3, 32, 32\]"),
        (torch.zeros(0, 3, 32, 32), ValueError, "n > 0"),
        (torch.zeros(2, 1, 32, 32), ValueError, r"\[2, 1, 32, 32\]"),
        (torch.zeros(2, 3, 33, 31), ValueError, "not 33 x 31"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int64), TypeError, "int64"),
        (torch.zeros(3, 3, 32, 32).index_fill(0, torch.tensor([1, 2]), torch.nan), ValueError, r"rows \[1, 2\]"),
    ],
)
def test_bad_pixels_are_refused(encoder, pixels, error, message):
    with pytest.raises(error, match=message):
        trace(encoder, pixels)


def test_other_image_sizes_where_the_model_interpolates(small):
    encoder = small("dinov2")
    pixels = torch.randn(3, 3, 51, 40)
    assert relative_error(trace(encoder, pixels).total(), encoder.encode_image(pixels)) < 1e-5


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_a_compiled_encoder_has_the_same_units(encoder, monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "vec_isa_ok", True)  # no trial compilations, no precompiled headers
    monkeypatch.setattr(config, "cpp_cache_precompile_headers", False)
    pixels = pixels_of(encoder)
    plain = trace(encoder, pixels)
    for block in encoder.tower.blocks:
        block.mlp.compile()
    compiled = trace(encoder, pixels)
    assert all(block.mlp._compiled_call_impl is not None for block in encoder.tower.blocks)
    assert relative_error(compiled.total(), plain.total()) < 1e-5
    assert relative_error(compiled["L1.MLP"], plain["L1.MLP"]) < 1e-5
