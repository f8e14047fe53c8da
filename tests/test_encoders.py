"""What is loaded is what was asked for, and what cannot be decomposed is refused by name."""

from __future__ import annotations

import pickle

import pytest
import torch
import transformers as hf
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from conftest import TOWERS, pixels_of
from residual import UnsupportedArchitectureError, load_encoder, trace
from residual.encoders import encoder as encoders
from residual.extraction import pixels_for

KINDS = {"blip": hf.BlipForImageTextRetrieval, "dinov2": hf.Dinov2Model, "clip": hf.CLIPModel}


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-S-16-alt", "facebook/dinov2-base", "mini-openclip"])
def test_sizes_are_read_from_the_model(name):
    encoder = load_encoder(name, pretrained=False)
    assert encoder.heads * encoder.head_width == encoder.width == encoder.tower.norm.weight.numel()
    assert encoder.encode_image(pixels_of(encoder, 1)).shape == (1, encoder.output_dim)
    size = encoder.preprocess(Image.new("RGB", (700, 500))).shape[1:]
    assert tuple(size) == encoder.tower.image_size or encoder.family == "DINOv2"


def test_clip_has_quick_gelu_and_openclip_has_not():
    for name, gelu in (("CLIP-B", "QuickGELU"), ("OpenCLIP-B", "GELU")):
        encoder = load_encoder(name, pretrained=False)
        assert type(encoder.tower.blocks[0].mlp.gelu).__name__ == gelu
        assert encoder.family == name.removesuffix("-B")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("RN50", "ModifiedResNet"),
        ("RN50@openai", "ModifiedResNet"),
        ("convnext_base", "TimmModel"),
        ("ViT-B-16-SigLIP", "TimmModel"),
        ("coca_ViT-B-32", "pools by attention"),
        ("ViT-H-14-CLIPA", "no class token"),
    ],
)
@pytest.mark.parametrize("pretrained", [True, False])
def test_other_architectures_are_refused_with_a_reason(name, reason, pretrained):
    with pytest.raises(UnsupportedArchitectureError, match=rf"{name.partition('@')[0]} cannot .*{reason}"):
        load_encoder(name, pretrained)


def test_images_of_one_channel_are_refused(tmp_path):
    hf.ViTConfig(num_channels=1).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match="1 channels"):
        load_encoder(str(tmp_path), pretrained=False)


@pytest.mark.parametrize(
    "kind", [hf.DeiTConfig, hf.ViTMSNConfig, hf.ChineseCLIPConfig, hf.Swinv2Config, hf.ConvNextConfig]
)
def test_other_types_of_transformers_are_refused_with_those_that_are_read(tmp_path, kind):
    kind().save_pretrained(tmp_path)
    told = rf"is of model type '{kind.model_type}', which is not read here: these are: .*vit"
    with pytest.raises(UnsupportedArchitectureError, match=told):
        load_encoder(str(tmp_path), pretrained=False)


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("nonsense", True, "unknown encoder 'nonsense'; give one of mini-openclip"),
        ("ViT-B-32", True, "give pretrained= one of .*laion2b_s34b_b79k"),
        ("ViT-B-32", "imagenet", "no weights 'imagenet'"),
        ("ViT-B-32@imagenet", True, "no weights 'imagenet'"),
        ("DINOv2-B", "openai", "has no tags"),
        ("mini-openclip", "openai", "names its own weights"),
    ],
)
def test_unknown_names_and_tags_are_named(name, pretrained, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(name, pretrained)


def test_random_weights_come_from_the_seed_alone(folders):
    def build(seed):
        return load_encoder(str(folders / "vit"), pretrained=False, seed=seed).weights_hash()

    first = build(0)
    torch.rand(3)
    assert build(0) == first
    assert build(1) != first
    before = torch.random.get_rng_state()
    build(0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_local_folder_gives_back_what_was_saved(small, tmp_path, kind):
    encoder = small(kind)
    encoder.model.save_pretrained(tmp_path)
    again = load_encoder(str(tmp_path))
    assert again.weights_hash() == encoder.weights_hash()
    pixels = pixels_of(encoder)
    torch.testing.assert_close(again.encode_image(pixels), encoder.encode_image(pixels))


def test_a_classifier_is_loaded_without_its_head(tmp_path):
    hf.ViTForImageClassification(hf.ViTConfig(**TOWERS["vit"])).save_pretrained(tmp_path)
    assert load_encoder(str(tmp_path)).family == "ViT"


@pytest.mark.parametrize("width", [96, 192])  # misshapen, or of the right shape and missing
def test_weights_of_another_architecture_are_refused(small, tmp_path, width):
    small("dinov2").model.save_pretrained(tmp_path)
    hf.ViTConfig(**TOWERS["vit"] | {"intermediate_size": width}).save_pretrained(tmp_path)
    message = r"do not fit ViTModel: \d+ are missing in the file, .*; \d+ are no part of the model \("
    with pytest.raises(RuntimeError, match=message):
        load_encoder(str(tmp_path))


def test_truncated_weights_are_refused(small, tmp_path):
    small("dinov2").model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(RuntimeError, match="cannot load"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "open_clip_pytorch_model.bin"])
def test_a_pickle_that_runs_code_is_refused(folders, tmp_path, name):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "attacked"), "w"))

    kind, config = ("openclip", "open_clip_config.json") if name.startswith("open") else ("vit", "config.json")
    (tmp_path / config).write_bytes((folders / kind / config).read_bytes())
    (tmp_path / name).write_bytes(pickle.dumps({"weight": Attack()}))
    with pytest.raises(RuntimeError, match="cannot load"):
        load_encoder(str(tmp_path))
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("kind", ["openclip", "vit"])
def test_missing_weights_are_not_replaced_by_random_ones(folders, kind):
    with pytest.raises(RuntimeError, match="pretrained=False"):
        load_encoder(str(folders / kind))


def test_texts_are_encoded_or_refused(encoder, small):
    assert encoder.encode_text(["a red circle", "a blue one"]).shape == (2, 20)
    for bad in ("a red circle", []):
        with pytest.raises(ValueError, match="non-empty list"):
            encoder.encode_text(bad)
    with pytest.raises(ValueError, match="no text tower"):
        small("dinov2").encode_text(["a"])


def test_the_hash_sees_every_weight(encoder):
    before = encoder.weights_hash()
    encoder.model.visual.proj[0, 0] += 1e-4
    assert encoder.weights_hash() != before


@pytest.mark.parametrize("options", [{}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}])
@pytest.mark.parametrize("size", [32, [32, 48]])
def test_raw_pixels_are_normalised_as_the_processor_does(tmp_path, options, size):
    height, width = size if isinstance(size, list) else (size, size)
    hf.ViTConfig(**TOWERS["vit"] | {"image_size": size}).save_pretrained(tmp_path)
    processor = hf.ViTImageProcessor(size={"height": height, "width": width}, **options)
    processor.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path), pretrained=False)
    raw = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    expected = encoder.encode_image(encoder.preprocess(to_pil_image(raw))[None])
    torch.testing.assert_close(encoder.encode_image(raw[None]), expected, rtol=1e-4, atol=1e-4)


def test_a_broken_processor_is_not_replaced_by_a_default(small, tmp_path):
    small("vit").model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{broken")
    with pytest.raises(RuntimeError, match="cannot load"):
        load_encoder(str(tmp_path))


def test_a_folder_may_have_an_at_in_its_name(folders, tmp_path):
    (tmp_path / "vit@home").mkdir()
    (tmp_path / "vit@home/config.json").write_bytes((folders / "vit/config.json").read_bytes())
    for name in ("vit@home", "vit@home@random"):
        assert load_encoder(str(tmp_path / name), pretrained=False).family == "ViT"
    with pytest.raises(ValueError, match="unknown encoder ''"):
        load_encoder("")


@pytest.mark.network
@pytest.mark.parametrize("name", ["CLIP-B", "DINOv2-B", "ViT-B", "BLIP-B"])
def test_real_weights_load(name):
    assert load_encoder(name).layers == 12


def test_a_batch_in_parts_is_the_batch_at_once(encoder, monkeypatch):
    pixels = pixels_of(encoder, 5)
    whole, units = encoder.encode_image(pixels), trace(encoder, pixels)
    monkeypatch.setattr(encoders, "CACHED", 40)  # two images of 17 tokens
    assert [len(part) for part in encoder.cached_parts(pixels)] == [2, 2, 1]
    torch.testing.assert_close(encoder.encode_image(pixels), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trace(encoder, pixels).total(), units.total(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="n > 0"):
        encoder.encode_image(pixels[:0])


def test_an_encoder_reads_images_of_another_size_as_they_are(folders):
    encoder = load_encoder(str(folders / "dinov2"), pretrained=False)
    smaller = encoder.at_size(16)
    raw = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    assert pixels_for(smaller, raw) is raw
    assert smaller.preprocess(to_pil_image(raw[0])).shape == (3, 16, 16)
    assert smaller.with_model(smaller.model).tower.image_size == (16, 16)
    assert len({smaller.preprocessing_hash(), encoder.preprocessing_hash()}) == 2
    units = trace(smaller, raw)
    torch.testing.assert_close(units.total(), units.output, rtol=1e-4, atol=1e-4)
    for wrong, side in ((encoder, 4), (load_encoder(str(folders / "vit"), pretrained=False), 16)):
        with pytest.raises(ValueError, match=f"does not take images of {side} x {side} pixels"):
            wrong.at_size(side)
