"""The rows of the papers with transformers, on tiny ones of the same classes: trained, switched, stopped, exported."""

from __future__ import annotations

import signal

import pytest
import torch
from lightning_fabric import Fabric
from test_training import assert_same_outcome
from torch import nn

import qdeploy
from qdeploy import format
from qdeploy.training import processes, quantize_, quantize_like_, quantizers, trainer
from qdeploy.training.config import Config, resolve
from qdeploy.training.domains import load_benchmark
from qdeploy.training.finished_runs import fallback_for, finish
from qdeploy.training.learner import Learner
from qdeploy.training.networks_by_name import build
from qdeploy.training.selected_network import load_trained

pytest.importorskip("transformers", reason="the `models` extra is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

BENCHMARK = load_benchmark("debug")
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VIT = SMALL | {"image_size": 16, "patch_size": 4, "initializer_range": 0.3}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4}
DISTILLED = {"name": "self-distillation", "norm": "deit.layernorm", "head": "classifier"}
ROWS = {
    "QT-DoG, ViT-B/16": ("ViT", VIT, {"method": "qt-dog"}),
    "QT-DoG, DeiT-S": ("DeiT", VIT, {"method": "sd-vit+qt-dog", "objective": DISTILLED}),
    "QGen, DeiT-T": ("DeiT", VIT, {"method": "lsq"}),
    "QGen, Swin-T": ("Swin", SWIN, {"method": "lsq"}),
    "inputs in 8 bits, equalized": (
        *("ViT", VIT),
        {"method": "qt-dog", "activation_bits": 8, "quantization": {"name": "lsq", "equalize": 0.5}},
    ),
}


def settings(row: str) -> Config:
    kind, options, others = ROWS[row]
    name = f"transformers:{kind}ForImageClassification"
    model = {"name": name, **options}
    if "objective" in others:  # versions of transformers differ in the name of the list of blocks
        net = build(name, 4, 1, **options)
        blocks = next(name for name, module in net.named_modules() if isinstance(module, nn.ModuleList))
        others = others | {"objective": others["objective"] | {"blocks": blocks}}
    run = {"data": "debug", "test_domain": "debug1", "updates": 7, "quantize_at": 3, "eval_every": 3, "batch_size": 4}
    return resolve(Config(**{**run, "accelerator": "cpu", "model": model, "lr": 1e-3, **others}))


def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_with_images(row, tmp_path, monkeypatch):
    config = settings(row)
    trainer.run(config, BENCHMARK, tmp_path / "whole", fabric())
    for updates in (2, 2):  # before the switch, and after it
        asked = iter([None] * (updates - 1))  # once an update
        monkeypatch.setattr(trainer, "_agreed", lambda signals, fabric, asked=asked: next(asked, signal.SIGTERM))
        with pytest.raises(processes.Interrupted):
            trainer.run(config, BENCHMARK, tmp_path / "parts", fabric())
        monkeypatch.undo()
    trainer.run(config, BENCHMARK, tmp_path / "parts", fabric())
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")
    net = load_trained(tmp_path / "whole", BENCHMARK)
    linear = {name for name, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    weights = {name.removesuffix(".weight") for name in quantizers(net) if name.endswith(".weight")}
    assert weights == linear - {"classifier"}
    file = finish([net], config, BENCHMARK, torch.device("cpu"), tmp_path / "m.safetensors")["file"]
    assert file["agreement"] >= 0.9


class WithAttention(nn.Module):
    """Of PyTorch's own attention, which no class of transformers has, between embeddings and a classifier."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, ids):
        x = self.words(ids)
        y = self.norm(x)
        return self.head(self.fc(self.norm(x + self.attention(y, y, y, need_weights=False)[0])[:, 0]))


@pytest.mark.parametrize(
    ("bits", "left"),
    [
        ({"fc": 4}, ["words", "attention", "head"]),
        ({"*": 7, "attention": None}, ["attention", "head"]),
        ({"*": 7, "attention.out_proj": None}, ["attention", "head"]),
        ({"*": 7, "words": None}, ["words", "head"]),
    ],
)
def test_what_bits_by_layer_leave_float_has_8_bits_in_the_file(bits, left, tmp_path):
    net, ids = WithAttention().eval(), torch.randint(20, (8, 6), generator=torch.Generator().manual_seed(0))
    quantize_(net, bits)
    fallback = fallback_for(net, Config(bits=bits))
    assert fallback == dict.fromkeys(left, 8)
    report = qdeploy.export(net, ids[:1], tmp_path / "m.safetensors", ids, fallback_bits=fallback)
    assert report.output_sqnr_db > 25


# ---- Texts -----------------------------------------------------------------------------------------------------------

TEXT = {"vocab_size": 40, "max_position_embeddings": 12, "n_layers": 2, "n_heads": 2, "dim": 16, "hidden_dim": 32}


def texts(seed: int, n: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [n, 12] of four classes: each has words of its own among those of all."""
    draw = torch.Generator().manual_seed(seed)
    classes = torch.randint(4, (n,), generator=draw)
    own = torch.randint(5, (n, 12), generator=draw) + 5 * classes[:, None]
    common = torch.randint(20, 40, (n, 12), generator=draw)
    return torch.where(torch.rand(n, 12, generator=draw) < 0.5, own, common), classes


@pytest.mark.parametrize("quantization", ["lsq", {"name": "lsq", "equalize": 0.5}], ids=["plain", "equalized"])
def test_the_row_with_texts(quantization, tmp_path):
    """QT-DoG, DistilBERT, without data of a run: updates, the switch and the export take ids alone."""
    torch.manual_seed(0)  # of the weights: half the loss is no bound that all reach
    run = {"data": "debug", "test_domain": "debug1", "updates": 60, "quantize_at": 30, "eval_every": 30}
    config = resolve(Config(**run, method="qt-dog", accelerator="cpu", lr=3e-3, quantization=quantization))
    net = build("transformers:DistilBertForSequenceClassification", 4, 1, **TEXT)
    learner = Learner(net, config, fabric())
    losses = [learner.update(t, [texts(2 * t), texts(2 * t + 1)]).item() for t in range(config.updates)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    names = {name.removesuffix(".weight") for name in quantizers(net) if name.endswith(".weight")}
    assert names == {
        *(name for name, module in net.named_modules() if isinstance(module, nn.Linear) and name != "classifier"),
        "distilbert.embeddings.word_embeddings",
    }
    again = build("transformers:DistilBertForSequenceClassification", 4, 1, **TEXT)
    quantize_like_(again, net.state_dict())
    ids, classes = texts(1000, 200)
    with torch.no_grad():
        logits = net.eval()(ids)
        assert torch.equal(again.eval()(ids), logits)
    path = tmp_path / "m.safetensors"
    qdeploy.export(again, ids[:1], path, texts(1001, 64)[0])
    assert format.load(path).variable
    found = torch.from_numpy(qdeploy.load_int_model(path).predict(ids.numpy()))
    assert (found == logits.argmax(1)).float().mean() >= 0.97
    assert (logits.argmax(1) == classes).float().mean() > 0.8
