"""What is planted is found, and chance is called chance."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from conftest import page_functions
from edition.chapter import Chapter
from edition.pages import chapter_defaults, chapter_path
from miniature.sets import Factor
from miniature.shapes import SHAPES
from residual import extract
from residual.heads import factor_levels, variance_shares


def test_a_share_is_what_was_planted():
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(4, (20_000,), generator=generator)
    effect = torch.tensor([-1.5, -0.5, 0.5, 1.5])[levels]  # variance 1.25
    noise = torch.randn(20_000, generator=generator)
    values = torch.stack([effect, effect + noise * 1.25**0.5, noise, torch.full_like(noise, 3.0)], 1)
    share, variance = variance_shares(values, levels)
    assert share.tolist() == pytest.approx([1, 0.5, 0, 0], abs=0.02)
    assert variance.tolist() == pytest.approx([1.25, 2.5, 1, 0], abs=0.05)


def test_many_levels_explain_nothing_by_chance():
    generator = torch.Generator().manual_seed(0)
    shares = variance_shares(torch.randn(300, 200, generator=generator), torch.arange(300) % 60)[0]
    assert abs(shares.mean().item()) < 0.02
    with pytest.raises(ValueError, match="300 levels"):
        variance_shares(torch.randn(300, 2), torch.arange(300))


def test_levels_of_names_measures_and_pairs():
    n = 1600
    factors = {
        "colour": Factor(torch.arange(n) % 3, ("red", "green", "blue")),
        "size": Factor(torch.linspace(0, 1, n)),
        "x": Factor(torch.rand(n)),
        "y": Factor(torch.rand(n)),
    }
    levels = factor_levels(factors, {"colour": ("colour",), "size": ("size",), "position": ("x", "y")})
    assert levels["colour"].bincount().tolist() == [534, 533, 533]
    assert levels["size"].bincount().tolist() == [200] * 8
    assert len(levels["position"].unique()) == 16
    with pytest.raises(KeyError):
        factor_levels(factors, {"angle": ("angle",)})


def test_heads_are_scored_in_output_space(encoder, dataset, tmp_path):
    units = extract(encoder, dataset, root=tmp_path, coordinates="float32", progress=False)
    levels = {"class": dataset.labels, "noise": torch.arange(70) // 7 % 2}
    page = page_functions("ground_truth", "shuffled", "shares_of", "head_factors")
    components, heads = page["head_factors"](units, levels)
    names = ["layer", "head", "component", "explained_variance_ratio", "factor", "share"]
    components = pd.DataFrame(components, columns=names)
    heads = pd.DataFrame(heads, columns=["layer", "head", "factor", "share", "null"])
    assert len(heads) == 2 * encoder.layers * encoder.heads
    own = components.query("layer == 1 and head == 2 and factor == 'class'")
    basis = torch.linalg.qr(units.frames.head_frames[1, 2].double().mT).Q
    samples = units.head_coordinates(1, 2) @ basis.mT
    centred = samples - samples.mean(0)
    groups = torch.stack([centred[dataset.labels == c].mean(0) for c in range(3)])
    between = (torch.bincount(dataset.labels)[:, None] * groups.square()).sum()
    whole = 1 - (1 - between / centred.square().sum()) * 69 / 67
    found = heads.query("layer == 1 and head == 2 and factor == 'class'")["share"].item()
    assert found == pytest.approx(whole.item(), abs=1e-6)
    assert (own["share"] * own["explained_variance_ratio"]).sum() == pytest.approx(found)


def test_specialisation_is_one_for_one_factor_and_zero_for_equal_ones():
    def shares(*values):
        rows = [(0, 0, f"f{i}", value, 0.01) for i, value in enumerate(values)]
        return pd.DataFrame(rows, columns=["layer", "head", "factor", "share", "null"])

    page = page_functions("ground_truth", "index_of", "specialisation")
    one, equal, none = (
        page["specialisation"](shares(*v)).iloc[0] for v in ((0.5, 0.001, 0), (0.2, 0.2, 0.2), (0.001, 0, 0))
    )
    assert (one["driver"], one["index"]) == ("f0", pytest.approx(1))
    assert equal["index"] == pytest.approx(0)
    assert none["driver"] == "none"
    assert pd.isna(none["index"])


def test_the_share_on_the_shape_counts_what_varies_there_and_the_class_token_elsewhere():
    share = page_functions("ground_truth", "share_on_shape")["share_on_shape"]
    generator = torch.Generator().manual_seed(0)
    on_shape = torch.zeros(200, 9)
    on_shape[:, 2] = 1
    on_shape[:, 3] = 0.5
    parts = torch.randn(200, 10, 6, generator=generator)
    constant = 100 * torch.randn(10, 6, generator=generator)  # as a bias adds it
    assert share(parts + constant, on_shape).mean().item() == pytest.approx(0.15, abs=0.01)
    parts[:, [*range(3), *range(5, 10)]] = 0  # of the class token and of patches 0, 1 and 4 to 8
    assert share(parts + constant, on_shape).mean().item() == pytest.approx(0.75, abs=0.02)
    parts[:, 4] = 0
    torch.testing.assert_close(share(parts + constant, on_shape), torch.ones(200), atol=2e-3, rtol=0)  # 100 * rounding


def test_what_is_covered_is_the_part_of_each_patch(monkeypatch):
    """The sum over patches is the shape's area."""
    values = chapter_defaults(chapter_path("ground_truth")) | {"encoders": ["mini-vit"], "controls": [], "images": 100}
    run = Chapter("ground_truth", values)
    page = page_functions("ground_truth", "covered", run=run, loaded=run.encoders(), LOOKED=20)
    page["looked_at"] = lambda name: run.data("shapes", "test", name).images[:20]
    on_shape, data = page["covered"]("mini-vit"), run.data("shapes", "test", "mini-vit").head(20)
    assert on_shape.shape == (20, 36)
    square = data.factors["shape"].values == SHAPES.index("square")
    areas = (1.6 * data.factors["size"].values[square]) ** 2 / 4  # of the image
    assert square.any()
    torch.testing.assert_close(on_shape[square].mean(1), areas.float(), atol=0.01, rtol=0)
