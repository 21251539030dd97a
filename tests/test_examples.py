"""Every example runs from any folder and says what it is there to say; so does code of the
README."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qdeploy

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES, README = ROOT / "examples", ROOT / "README.md"
SAYS = {
    "quantize_and_export.py": r"the int8 file +(\d+)%, [\d,]+ bytes",
    "run_with_numpy.py": r"(\d+)\.\d% of 200 digits are right(?s:.*)agree bit for bit: True",
    "ensemble.py": r"the three as one +(\d+)%, [\d,]+ bytes",
    "your_own_training_loop.py": r"the int8 file: (\d+)\.\d% right",
}
REAL = {"photographs_to_features.py", "sentences_to_embeddings.py", "beside_onnxruntime.py"}  # test_real_networks.py


def run(name: str, folder: Path, *arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", EXAMPLES / name, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SAYS, *REAL}


@pytest.mark.parametrize("name", SAYS)
def test_examples(tmp_path, name):
    said = run(name, tmp_path)
    found = re.search(SAYS[name], said)
    assert found, said
    assert int(found[1]) > 60  # of ten classes, or of two
    assert list(tmp_path.iterdir()) == []  # an example leaves nothing behind


def test_a_file_of_ones_own(tmp_path):
    model = ROOT / "tests/data/v1/every_op.safetensors"
    assert "agree bit for bit: True" in run("run_with_numpy.py", tmp_path, str(model))


def test_first_code_of_the_readme(tmp_path, monkeypatch):
    """As it stands there, with a network, an optimizer and data as a reader would have them."""
    torch = pytest.importorskip("torch", reason="it trains: pip install 'qdeploy[train]'")
    layers = torch.nn
    net = layers.Sequential(layers.Conv2d(3, 8, 3), layers.ReLU(), layers.Flatten(), layers.Linear(288, 4))

    def train_step(net, optimizer, images, labels):
        optimizer.zero_grad()
        layers.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()

    known = {"net": net, "optimizer": torch.optim.Adam(net.parameters()), "train_step": train_step}
    known["loader"] = [(torch.randn(5, 3, 8, 8), torch.arange(5) % 4) for _ in range(3)]
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1], known)
    assert known["scores"].shape == (5, 4)


def blocks_of(section: str, language: str) -> list[str]:
    text = README.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def shell(command: str) -> str:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    result = subprocess.run(command, shell=True, capture_output=True, text=True, env=os.environ | {"PATH": path})
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_what_the_readme_brings_in_and_out(tmp_path, monkeypatch):
    """As it stands there, with files and pictures as a reader would have them."""
    onnx = pytest.importorskip("onnx", reason="it reads ONNX: pip install 'qdeploy[onnx]'")
    images = pytest.importorskip("PIL.Image", reason="it reads pictures: pip install 'qdeploy[train]'")
    monkeypatch.chdir(tmp_path)
    quantized, of_float, *out = blocks_of("Bring a network", "sh")
    shutil.copy(ROOT / "tests/data/onnx/resnet_ort_u8s8_per_channel.onnx", "quantized.onnx")
    assert "file" in shell(quantized)
    x = np.random.default_rng(0).normal(size=(3, *qdeploy.load_int_model("quantized.onnx").inputs[0]["shape"]))
    x = x.astype(np.float32)
    assert np.array_equal(qdeploy.load_int_model("quantized.onnx")(x), qdeploy.load_int_model("net.safetensors")(x))
    for command in out:
        shell(command)
    shutil.copy("net.onnx", "float.onnx")  # the last one wrote the float32 network
    onnx.checker.check_model("net.onnx", full_check=True)
    Path("pictures").mkdir()
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 16, 3), dtype=np.uint8)
        images.fromarray(pixels).save(f"pictures/{i}.png")
    assert "calibration" in shell(of_float)


def test_a_network_in_pytorch_as_the_readme_brings_it(tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch", reason="it exports: pip install 'qdeploy[train]'")
    layers = torch.nn
    net = layers.Sequential(layers.Conv2d(3, 8, 3), layers.ReLU(), layers.Flatten(), layers.Linear(288, 4))
    monkeypatch.chdir(tmp_path)
    [code] = blocks_of("Bring a network", "python")
    exec(code, {"net": net, "images": torch.randn(50, 3, 8, 8)})
    assert "calibration" in capsys.readouterr().out
    assert qdeploy.load_int_model("net.safetensors")(np.zeros((2, 3, 8, 8), np.float32)).shape == (2, 4)
