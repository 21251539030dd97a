"""A small share of the mutations of ONNX files."""

from __future__ import annotations

import numpy as np
import pytest

from qdeploy import load_int_model
from qdeploy.errors import QdeployError
from qdeploy.exporter import converted

pytest.importorskip("onnx", reason="the `onnx` extra is not installed")
from onnx_mutations import mutated, seeds


@pytest.mark.filterwarnings("ignore")  # numpy's, of numbers that no file of sense has
def test_mutations_end_in_one_line_or_a_valid_file():
    rng = np.random.default_rng(0)
    read = 0
    for content in seeds()[::4]:
        for _ in range(12):
            try:
                load_int_model(converted(mutated(content, rng)))
                read += 1
            except QdeployError as error:
                assert "\n" not in str(error)
    assert read > 0
