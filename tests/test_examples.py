"""Every example runs from any folder and says what it is there to say; so does the first code of the README."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
