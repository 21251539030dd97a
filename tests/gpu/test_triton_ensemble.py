"""The ensemble average for GPUs, run by Triton's interpreter on the CPU, against qdeploy/reference.py bit for bit."""

from __future__ import annotations

import math
from unittest.mock import patch

import numpy as np
import pytest

pytest.importorskip("triton_on_cpu", reason="the kernels for GPUs need Triton", exc_type=ImportError)
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qdeploy import reference
from qdeploy.errors import InputError
from qdeploy.graph import COMBINE
from qdeploy.kernels.triton_ensemble import CHUNK, IN_REGISTERS, average

GUARD = 7  # elements before and after each output, which must stay as they are

KINDS = {
    "normal": lambda rng, shape: rng.normal(0, 4, shape),
    "ties": lambda rng, shape: rng.integers(-1, 2, shape),
    "huge": lambda rng, shape: rng.choice([-1e4, 0, 1e4], shape) + rng.normal(0, 1, shape),
    "deep": lambda rng, shape: rng.choice([0, -87, -87.0001, -103.5], shape) + rng.choice([0, 1, 2.5], shape),
    "exponents": lambda rng, shape: rng.choice([-1, 1], shape) * 2.0 ** rng.integers(-149, 8, shape),
}

LAYOUTS = {
    "contiguous": lambda logits: logits,
    "rows of members": lambda logits: logits.transpose(0, 1).contiguous().transpose(0, 1),
    "rows with a gap": lambda logits: torch.nn.functional.pad(logits, (0, 3))[:, :, : logits.shape[2]],
    "transposed": lambda logits: logits.transpose(1, 2).contiguous().transpose(1, 2),
    "one member": lambda logits: logits[:1].expand_as(logits),
}


def run(logits: torch.Tensor, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """`average`, whose memory lies poisoned in the middle of larger buffers."""
    buffers = []

    def guarded_empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        buffers.append(torch.full((math.prod(shape) + 2 * GUARD,), 77, dtype=dtype))
        return buffers[-1][GUARD:-GUARD].view(shape)

    # the interpreter computes with numpy, which warns
    with np.errstate(invalid="ignore"), patch.object(torch, "empty", guarded_empty):
        probabilities, classes = average(logits, rule)
    assert len(buffers) >= 2
    for buffer in buffers:
        assert (buffer[:GUARD] == 77).all() and (buffer[-GUARD:] == 77).all()
    return probabilities.numpy(), classes.numpy()


def assert_follows_the_definition(logits: torch.Tensor, rule: str) -> None:
    probabilities, scores = reference.combine(list(logits.float().numpy()), rule)
    found, classes = run(logits, rule)
    np.testing.assert_array_equal(found.view(np.int32), probabilities.view(np.int32))
    np.testing.assert_array_equal(classes, scores.argmax(-1))


@settings(max_examples=80, deadline=None)
@given(
    members=st.sampled_from([1, 2, 3, 5, 8]),
    rows=st.integers(1, 5),
    k=st.sampled_from([1, 2, 3, 7, 8, 9, 10, 31, 32, 33, 65, 127, 128, 129, 255, 256, 257, 345, 1000, 1024, 1025]),
    kind=st.sampled_from(sorted(KINDS)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    rule=st.sampled_from(COMBINE),
    seed=st.integers(0, 2**32),
)
@example(members=2, rows=300, k=2, kind="ties", layout="contiguous", dtype=torch.float32, rule="probs", seed=0)
@example(members=256, rows=1, k=5, kind="normal", layout="contiguous", dtype=torch.float32, rule="logits", seed=0)
def test_every_bit_follows_the_definition(members, rows, k, kind, layout, dtype, rule, seed):
    values = KINDS[kind](np.random.default_rng(seed), (members, rows, k))
    assert_follows_the_definition(LAYOUTS[layout](torch.tensor(values, dtype=dtype)), rule)


@pytest.mark.parametrize("rule", COMBINE)
@pytest.mark.parametrize("kind", ["ties", "deep"])
@pytest.mark.parametrize("k", [IN_REGISTERS, IN_REGISTERS + 1, 10 * CHUNK])
def test_long_rows(k, kind, rule):
    values = KINDS[kind](np.random.default_rng(k), (2, 2, k))
    assert_follows_the_definition(torch.tensor(values, dtype=torch.float32), rule)


@pytest.mark.parametrize("k", [5, IN_REGISTERS + 1])
@pytest.mark.parametrize("rule", COMBINE)
def test_rows_that_are_not_finite(k, rule):
    """NaN and +inf spoil their own row alone, and all of it; -inf is a logit of a class that cannot be."""
    logits = torch.tensor(np.random.default_rng(0).normal(0, 4, (3, 7, k)), dtype=torch.float32)
    logits[1, 1, k - 1] = torch.nan
    logits[2, 2, 0] = -torch.nan
    logits[1, 3, 2] = torch.inf
    logits[1, 4] = torch.inf
    logits[0, 5] = -torch.inf  # so is the mean
    logits[:, 6, 1] = -torch.inf
    found, classes = run(logits, rule)
    assert np.isnan(found).all(1).tolist() == np.isnan(found).any(1).tolist() == [False, *[True] * 5, False]
    assert found[6, 1] == 0
    assert ((classes >= 0) & (classes < k)).all()
    assert_follows_the_definition(logits[:, [0, 6]], rule)


def test_no_rows():
    probabilities, classes = average(torch.empty(3, 0, 5), "logits")
    assert probabilities.shape == (0, 5) and classes.shape == (0,)


def test_what_does_not_fit_is_refused():
    logits = torch.zeros(2, 3, 4)
    with pytest.raises(InputError, match="expected rule logits or probs, got 'vote' - at ensemble average"):
        average(logits, "vote")
    with pytest.raises(InputError, match=r"expected \[M, N, K\] with M and K > 0, got \[0, 3, 4\]"):
        average(logits[:0], "logits")
    with pytest.raises(InputError, match="expected float32, bfloat16 or float16, got torch.float64"):
        average(logits.double(), "logits")
