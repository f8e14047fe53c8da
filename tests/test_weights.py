"""Weights of people's own: loaded under whatever wraps them, or refused with the file at fault and what to do."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from conftest import TOWERS, pixels_of
from miniature import WEIGHTS
from residual import load_encoder
from residual.encoders import encoder as encoders
from residual.encoders.weights import WeightsError, check_values

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"


@pytest.fixture
def saved(small, folders, tmp_path):
    """saved(kind) is a folder with configuration and weights, the name of its file of weights, and the encoder."""

    def save(kind):
        encoder, folder = small(kind), tmp_path / kind
        folder.mkdir()
        if kind == "openclip":
            shutil.copy(folders / kind / "open_clip_config.json", folder)
            save_file(encoder.model.state_dict(), folder / "open_clip_model.safetensors")
            return folder, "open_clip_model.safetensors", encoder
        encoder.model.save_pretrained(folder)
        return folder, "model.safetensors", encoder

    return save


@pytest.mark.parametrize(
    ("kind", "file"),
    [("openclip", "open_clip_pytorch_model.bin"), ("dinov2", "pytorch_model.bin"), ("vit", "epoch_9.pt")],
)
def test_a_checkpoint_of_a_training_is_opened(saved, kind, file):
    folder, plain, encoder = saved(kind)
    weights = load_file(folder / plain)
    (folder / plain).unlink()
    torch.save({"epoch": 3, "state_dict": weights, "optimizer": {"lr": 0.1}}, folder / file)
    assert load_encoder(str(folder)).weights_hash() == encoder.weights_hash()


def test_the_shards_that_an_index_names_are_read_and_no_others(saved, caplog):
    folder, file, encoder = saved("vit")
    weights = load_file(folder / file)
    (folder / file).unlink()
    places = {}
    for i, part in enumerate((list(weights)[:20], list(weights)[20:])):
        own = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / own, {"format": "pt"})
        places |= dict.fromkeys(part, own)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    save_file({name: torch.zeros_like(v) for name, v in weights.items()}, folder / "model-00001-of-00009.safetensors")
    assert load_encoder(str(folder)).weights_hash() == encoder.weights_hash()
    assert "model-00001-of-00009.safetensors are ignored" in caplog.text
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"lacks model-00002-of-00002\.safetensors, which model\.safetensors\.index"):
        load_encoder(str(folder))


def test_a_tensor_in_two_shards_an_index_without_names_and_whole_numbers_are_refused(saved):
    folder, file, _ = saved("vit")
    weights = load_file(folder / file)
    (folder / file).unlink()
    index, (first, *_) = folder / "model.safetensors.index.json", weights
    for own in ("a", "b"):
        save_file(weights if own == "a" else {first: weights[first]}, folder / f"{own}.safetensors", {"format": "pt"})
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "a.safetensors") | {first: "b.safetensors"}}))
    with pytest.raises(WeightsError, match=rf"b\.safetensors holds {first}, which another file holds too"):
        load_encoder(str(folder))
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(WeightsError, match="has no weight_map"):
        load_encoder(str(folder))
    index.unlink()
    (folder / "a.safetensors").unlink()
    whole = {key: value.to(torch.int8) if key.endswith(".weight") else value for key, value in weights.items()}
    save_file(whole, folder / "b.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"as torch\.int8; give weights in floating point"):
        load_encoder(str(folder))


def test_weights_of_open_clip_may_carry_a_prefix_and_what_older_releases_stored_and_are_never_resized(saved):
    folder, file, encoder = saved("openclip")
    weights = {f"module.{key}": value for key, value in load_file(folder / file).items()}
    (folder / file).unlink()
    torch.save(weights | {"module.attn_mask": torch.zeros(77, 77)}, folder / "open_clip_pytorch_model.bin")
    assert load_encoder(str(folder)).weights_hash() == encoder.weights_hash()
    config = folder / "open_clip_config.json"
    config.write_text(config.read_text().replace('"image_size": 32', '"image_size": 48'))
    with pytest.raises(
        WeightsError, match=r"1 are missing in the file, or of another shape \(visual\.positional_embedding"
    ):
        load_encoder(str(folder))


def test_a_file_of_weights_for_an_architecture_of_open_clip(tmp_path):
    encoder = load_encoder("ViT-S-16-alt", pretrained=False, seed=1)
    path = tmp_path / "mine.safetensors"
    save_file(dict(encoder.model.state_dict()), path)
    assert load_encoder("ViT-S-16-alt", str(path)).weights_hash() == encoder.weights_hash()
    with pytest.raises(RuntimeError, match=r"ViT-S-32-alt do not fit CLIP: 2 are missing .*visual\.conv1\.weight"):
        load_encoder("ViT-S-32-alt", str(path))


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ("vit", "openclip", r"ViTModel: 54 are missing .* \(embeddings.*; \d+ are no part of the model \("),
        ("openclip", "clip", r"CLIP: \d+ are missing .* are no part of the model \("),
        ("dinov2", "vit", r"Dinov2Model: \d+ are missing .*layer_scale1"),
        ("clip", "blip", r"CLIPModel: .* are no part of the model \(logit_scale|text"),
    ],
)
def test_weights_of_another_model_are_refused_with_the_first_names_of_each_side(saved, config, weights, message):
    folder, file, _ = saved(config)
    other, theirs, _ = saved(weights)
    shutil.copy(other / theirs, folder / file)
    with pytest.raises(RuntimeError, match=message):
        load_encoder(str(folder))


@pytest.mark.parametrize("kind", ["openclip", "dinov2"])
def test_a_configuration_with_fewer_layers_than_the_weights_is_refused(saved, kind):
    folder, _, _ = saved(kind)
    if kind == "openclip":
        path = folder / "open_clip_config.json"
        path.write_text(path.read_text().replace('"layers": 3', '"layers": 2'))
    else:
        hf.Dinov2Config(**TOWERS["dinov2"] | {"num_hidden_layers": 2}).save_pretrained(folder)
    with pytest.raises(RuntimeError, match=r"resblocks\.2|no part of the model \((encoder\.)?layers?\.2\."):
        load_encoder(str(folder))


@pytest.mark.parametrize(
    ("kind", "change", "lost"),
    [
        ("vit", {"qkv_bias": False}, r"9 are no part of the model \(.*bias"),
        ("dinov2_with_registers", {"model_type": "dinov2", "architectures": ["Dinov2Model"]}, "register_tokens"),
        ("clip_vision_model-projected", {"architectures": None}, r"visual_projection\.weight"),
    ],
)
def test_weights_that_the_configuration_has_no_place_for_are_not_dropped(saved, kind, change, lost):
    folder, _, _ = saved(kind)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(WeightsError, match=lost):
        load_encoder(str(folder))


def test_adapters_that_are_not_merged_are_refused(saved):
    folder, file, _ = saved("clip")
    weights = load_file(folder / file)
    added = {name.replace("weight", "lora_B.weight"): torch.ones(2) for name in weights if "q_proj.weight" in name}
    save_file(weights | added, folder / file, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"no part of the model \(.*lora_B"):
        load_encoder(str(folder))


@pytest.mark.parametrize("kind", ["openclip", "vit"])
def test_the_librarys_own_file_is_taken_and_others_are_named(saved, caplog, kind):
    folder, file, encoder = saved(kind)
    zeros = {f"module.{name}": torch.zeros_like(value) for name, value in load_file(folder / file).items()}
    save_file(zeros, folder / "z_ema.safetensors", {"format": "pt"})
    torch.save({"lr": 1}, folder / "training_args.bin")
    assert load_encoder(str(folder)).weights_hash() == encoder.weights_hash()
    assert f"weights come from {file}; training_args.bin, z_ema.safetensors are ignored" in caplog.text
    (folder / file).rename(folder / "epoch_9.safetensors")
    with pytest.raises(
        WeightsError, match=r"several files of weights, epoch_9\.safetensors, training_args\.bin, z_ema"
    ):
        load_encoder(str(folder))
    for other in ("z_ema.safetensors", "training_args.bin"):
        (folder / other).unlink()
    assert load_encoder(str(folder)).weights_hash() == encoder.weights_hash()  # the only one, under any name


def test_checkpoints_without_weights_are_refused(saved):
    folder, plain, _ = saved("vit")
    (folder / plain).unlink()
    for stored, message in (({"a": {}, "b": 1}, "holds no weights by name, but a, b"), ([1], "by name, but list")):
        torch.save(stored, folder / "pytorch_model.bin")
        with pytest.raises(WeightsError, match=message):
            load_encoder(str(folder))


def test_weights_with_nan_are_refused(saved):
    folder, file, _ = saved("vit")
    weights = load_file(folder / file)
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, folder / file, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"hold NaN or infinity: embeddings\.cls_token"):
        load_encoder(str(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_no_number_is_found_in_every_precision(dtype, value):
    model = torch.nn.Linear(3, 2).to(dtype).requires_grad_(False)
    model.register_buffer("nothing", torch.empty(0))
    check_values(model, "it")
    model.weight[1, 2] = value
    with pytest.raises(WeightsError, match="the weights of it hold NaN or infinity: weight"):
        check_values(model, "it")


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_pointers_in_place_of_other_files_are_named(tmp_path, file):
    folder = shutil.copytree(WEIGHTS / "mini-blip", tmp_path / "blip")
    (folder / file).write_text(POINTER)
    with pytest.raises(WeightsError, match=rf"{file} is a pointer of git-LFS"):
        load_encoder(str(folder))


def test_a_tokenizer_that_does_not_work_is_told(tmp_path):
    folder = shutil.copytree(WEIGHTS / "mini-blip", tmp_path / "blip")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(RuntimeError, match=r"the tokenizer of .* cannot be used: .* use the encoder without text"):
        load_encoder(str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert not load_encoder(str(folder)).reads_text


def test_the_processor_that_transformers_saves_with_a_tokenizer_is_read(tmp_path):
    folder = shutil.copytree(WEIGHTS / "mini-blip", tmp_path / "blip")
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | {"image_mean": [0.0, 0.1, 0.2]}
    (folder / "preprocessor_config.json").unlink()
    both = {"image_processor": settings, "processor_class": "BlipProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(both))
    assert load_encoder(str(folder)).mean == (0.0, 0.1, 0.2)


@pytest.mark.parametrize("texts", [[1], [["a", "b"]], ["a", None], [("a", "b")]])
def test_what_is_no_text_is_refused_with_its_place(texts):
    place = next(i for i, text in enumerate(texts) if not isinstance(text, str))
    with pytest.raises(ValueError, match=rf"texts\[{place}\] is \w+, not a string"):
        load_encoder("mini-clip").encode_text(texts)


@pytest.mark.parametrize("kind", ["openclip", "vit"])
def test_a_pointer_of_git_lfs_is_named(saved, kind):
    folder, file, _ = saved(kind)
    (folder / file).write_text(POINTER)
    with pytest.raises(WeightsError, match=rf"{file} is a pointer of git-LFS.*git lfs pull"):
        load_encoder(str(folder))


def test_errors_of_local_files_do_not_advise_to_connect(saved):
    folder, file, _ = saved("vit")
    (folder / file).write_bytes((folder / file).read_bytes()[:-100])
    with pytest.raises(RuntimeError, match=f"Check the files of {folder}") as caught:
        load_encoder(str(folder))
    assert "onnect" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "start", "starts"),
    [
        (hf.CLIPVisionModelWithProjection, "", ("vision_model.", "visual_projection.")),
        (hf.CLIPVisionModel, "vision_model.", "vision_model."),
    ],
)
def test_a_clip_without_text_encodes_images_as_with_it(small, tmp_path, model, start, starts):
    encoder = small("clip")
    config = encoder.model.config.vision_config
    config.projection_dim = encoder.output_dim
    vision = model(config)
    weights = encoder.model.state_dict()
    own = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(starts)}
    vision.load_state_dict(own)
    vision.save_pretrained(tmp_path / "vision")
    alone = load_encoder(str(tmp_path / "vision"))
    pixels = pixels_of(encoder)
    expected = encoder.encode_image(pixels) if model is hf.CLIPVisionModelWithProjection else None
    if expected is None:
        expected = encoder.model.vision_model(pixels).pooler_output
    torch.testing.assert_close(alone.encode_image(pixels), expected)
    assert (alone.family, alone.reads_text) == ("CLIP", False)


@pytest.mark.parametrize("kind", ["vit", "clip", "dinov2", "blip"])
def test_models_that_return_tuples_are_loaded(saved, kind):
    folder, _, encoder = saved(kind)
    config = json.loads((folder / "config.json").read_text())
    for part in (config, *(config[key] for key in ("vision_config", "text_config") if key in config)):
        part["return_dict"] = False
    (folder / "config.json").write_text(json.dumps(config))
    pixels = pixels_of(encoder)
    torch.testing.assert_close(load_encoder(str(folder)).encode_image(pixels), encoder.encode_image(pixels))


@pytest.mark.parametrize(
    ("kind", "processor"),
    [
        ("vit", hf.ViTImageProcessor(size={"height": 48, "width": 48})),
        ("clip", hf.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})),
        ("clip", hf.CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False)),
        ("dinov2", hf.BitImageProcessor(size={"shortest_edge": 32}, do_center_crop=False)),
    ],
)
def test_a_processor_of_another_model_is_named(saved, kind, processor):
    folder, _, _ = saved(kind)
    processor.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"preprocessor_config.json makes images of .*, and config.json .* 32 x 32"):
        load_encoder(str(folder))


def test_a_dinov2_may_be_run_at_another_size(saved):
    folder, _, _ = saved("dinov2")
    hf.BitImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}).save_pretrained(folder)
    assert load_encoder(str(folder)).layers == 3


@pytest.mark.parametrize("name", ["mini-openclip", "mini-clip", "mini-blip"])
@pytest.mark.parametrize("knows", [True, False])
def test_texts_longer_than_the_model_reads_are_cut_and_counted(tmp_path, caplog, name, knows):
    folder = shutil.copytree(WEIGHTS / name, tmp_path / name)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    context = settings["model_max_length"]
    if not knows:  # as tokenizers that were saved without their model's limit
        settings.pop("model_max_length")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    encoder = load_encoder(str(folder))
    fits, cut, longer = (" ".join(["a"] * (context - 2 + more)) for more in (0, 1, 50))
    with caplog.at_level(logging.WARNING):
        encodings = encoder.encode_text([fits, cut, longer] * 100, batch=7)
    assert caplog.text.count("200 of 300 texts have more tokens than it reads") == 1
    torch.testing.assert_close(encodings[1], encodings[2])
    caplog.clear()
    torch.testing.assert_close(encoder.encode_text([fits])[0], encodings[0])
    assert not caplog.text


def test_what_open_clip_calls_its_architectures_is_known_without_it():
    import open_clip

    assert encoders.open_clip_names() == sorted(open_clip.list_models())
