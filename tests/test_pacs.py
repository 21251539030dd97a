"""The command for PACS itself, on a tree of its form: four domains, seven classes, ResNet-50 at 224 pixels."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import qdeploy
from qdeploy import cli
from qdeploy.training.models import MODELS

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


@pytest.fixture
def tree(tmp_path):
    """One image of 227 x 227 a class and domain, and a second one of the first three classes."""
    rng = np.random.default_rng(0)
    for domain in DOMAINS:
        for i, name in enumerate([*CLASSES, *CLASSES[:3]]):
            folder = tmp_path / "PACS" / domain / name
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (227, 227, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"pic_{i:03}.jpg")
    return tmp_path / "PACS"


def test_pretrained_resnet50_on_a_tree(tree, tmp_path, capsys):
    """Weights under torchvision's names, with a classifier of 1,000 classes, as published ones have it."""
    torch.manual_seed(0)
    torch.save(MODELS["resnet50"](1000).state_dict(), tmp_path / "resnet50.pth")
    words = f"--data {tree} --weights {tmp_path / 'resnet50.pth'} --test-domain sketch --out {tmp_path / 'run'}"
    words += " --updates 2 --quantize-at 1 --eval-every 1 --batch-size 2 --workers 1"
    assert cli.main(["train", *words.split()]) == 0
    said = capsys.readouterr().err
    assert "7-bit weights in 53 layers from update 1 on; `fc` in float" in said
    assert len(re.findall(r"update \d .* images/s, \d+% waiting for data", said)) == 2
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["members"][0]["update"] == 1 and summary["file"]["agreement"] == 1
    model = qdeploy.load_int_model(tmp_path / "run/model.safetensors")
    assert model.inputs[0]["shape"] == (3, 224, 224) and model.classes == [*CLASSES]
