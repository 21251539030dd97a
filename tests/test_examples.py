"""Every example runs, from any folder and without network, and says what it is there to say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SAYS = {
    "quantize_and_export.py": r"the int8 file +(\d+)%, [\d,]+ bytes",
    "run_with_numpy.py": r"(\d+)\.\d% of 200 digits are right(?s:.*)agree bit for bit: True",
    "ensemble.py": r"the three as one +(\d+)%, [\d,]+ bytes",
    "your_own_training_loop.py": r"the int8 file: (\d+)\.\d% right",
}


def run(name: str, folder: Path, *arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", EXAMPLES / name, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_examples(tmp_path, name):
    said = run(name, tmp_path)
    found = re.search(SAYS[name], said)
    assert found, said
    assert int(found[1]) > 60  # of ten classes, or of two
    assert list(tmp_path.iterdir()) == []  # an example leaves nothing behind


def test_a_file_of_ones_own(tmp_path):
    model = Path(__file__).parent / "data/v1/every_op.safetensors"
    assert "agree bit for bit: True" in run("run_with_numpy.py", tmp_path, str(model))
