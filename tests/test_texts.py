"""Texts: what stands beyond their end, their neighbours and the number of tokens of the batch never change a bit."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from builder import Builder, small_text, text_batch

import qdeploy
from qdeploy import _engine, reference
from qdeploy.errors import InputError
from qdeploy.format import load, save
from qdeploy.graph import Graph

LONGEST, VOCABULARY = 9, 11  # of small_text


@pytest.fixture
def path(tmp_path):
    save(small_text(), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def rows_graph() -> Graph:
    """Ends in rows, one more than a text has, each of which depends on all others."""
    net = Builder(np.random.default_rng(5), (LONGEST,), None)
    x = net.norm(net.position(net.embedding(VOCABULARY, 8), prefix=1))
    x = net.attention(x, x, x, 2, logit_bias=True)
    net.linear(x, 5, dtype="f32")
    return Graph([net.member()], vocabulary=VOCABULARY, variable=True)


def mask_of(lengths: list[int], width: int) -> np.ndarray:
    return (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)


@pytest.mark.parametrize("isa", _engine.isas())
@pytest.mark.parametrize("threads", [1, 3])
def test_neighbours_and_padding_change_no_bit(tmp_path, isa, threads):
    save(rows_graph(), tmp_path / "m.safetensors")
    model = qdeploy.load_int_model(tmp_path / "m.safetensors", threads, isa)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCABULARY, (7, LONGEST))
    lengths = [1, 4, 9, 4, 2, 9, 4]
    batch = model(ids, mask_of(lengths, LONGEST))
    assert batch.shape == (7, LONGEST + 1, 5)
    padded = np.where(mask_of(lengths, LONGEST), ids, 2**40)
    assert model(padded, mask_of(lengths, LONGEST)).tobytes() == batch.tobytes()
    for i, length in enumerate(lengths):
        alone = model(ids[i : i + 1, :length].astype(np.int32))
        assert alone.shape == (1, length + 1, 5)
        assert np.array_equal(batch[i, : length + 1], alone[0])
        assert not batch[i, length + 1 :].any()


def test_batches_larger_than_a_chunk(path):
    graph = small_text()
    ids, mask = text_batch(graph, 200, np.random.default_rng(1))
    expected = reference.run(graph, ids, mask=mask)
    for threads in (1, 2):
        assert qdeploy.load_int_model(path, threads)(ids, mask).tobytes() == expected.tobytes()


def test_all_of_one_length_without_a_mask(path):
    graph, model = small_text(), qdeploy.load_int_model(path)
    ids = np.random.default_rng(2).integers(0, VOCABULARY, (3, 5))
    expected = reference.run(graph, ids)
    assert model(ids).tobytes() == expected.tobytes()
    assert model(ids, np.ones((3, 5), bool)).tobytes() == expected.tobytes()
    assert model(np.asfortranarray(ids)).tobytes() == expected.tobytes()
    assert model.predict(ids).tolist() == reference.predict(graph, ids).tolist()
    assert pickle.loads(pickle.dumps(model))(ids).tobytes() == expected.tobytes()
    assert len(model.profile(ids, 1, np.ones((3, 5)))) == len(model.plan())


@pytest.mark.parametrize("rule", ["logits", "probs"])
def test_ensembles_of_texts(tmp_path, rule):
    """Members of their own lengths of rows; one shares its input with the first."""
    members = []
    for i in range(3):
        net = Builder(np.random.default_rng(i), (LONGEST,), None)
        x = net.position(net.embedding(VOCABULARY, 6 + i), prefix=i)
        net.linear(net.mean(x), 4, dtype="f32", size=1.0)
        members.append(net.member(f"m{i}"))
    graph = Graph(members, rule, vocabulary=VOCABULARY, variable=True)
    save(graph, tmp_path / "m.safetensors")
    ids, mask = text_batch(graph, 6, np.random.default_rng(3))
    model = qdeploy.load_int_model(tmp_path / "m.safetensors", 2)
    assert model(ids, mask).tobytes() == reference.run(graph, ids, mask=mask).tobytes()
    assert model.predict(ids, mask).tolist() == reference.predict(graph, ids, mask).tolist()


def test_what_a_model_of_texts_says_of_itself(path):
    model = qdeploy.load_int_model(path)
    (entry,) = model.inputs
    assert entry == {
        "name": "input",
        "shape": (LONGEST,),
        "dtype": "i32",
        "scale": 1.0,
        "zero_point": 0,
        "vocabulary": VOCABULARY,
        "variable": True,
        "layouts": ["i32 [N, T]", "i64 [N, T]"],
    }
    macs = {step["name"]: step["macs"] for step in model.plan() if step["op"] == "attention"}
    assert list(macs.values()) == [10 * 10 * (12 + 12)]


IDS = np.zeros((2, 4), np.int64)
BAD = {  # name: arguments, the error
    "a list": (([[1]],), "expected int32 or int64 [N, T] with T from 1 to 9, got list - at the input"),
    "padding before": (
        (IDS, np.array([[0, 0, 1, 1], [1, 1, 1, 1]])),
        "expected ones, at least one, and then zeros, got others - at text 0 of the mask",
    ),
    "bytes": ((IDS.astype(np.uint8),), "with T from 1 to 9, got uint8 [2, 4] - at the input"),
    "floats": ((IDS.astype(np.float32),), "with T from 1 to 9, got float32 [2, 4] - at the input"),
    "one text": ((IDS[0],), "with T from 1 to 9, got int64 [4] - at the input"),
    "no token": ((IDS[:, :0],), "with T from 1 to 9, got int64 [2, 0] - at the input"),
    "too long": ((np.zeros((1, 10), np.int64),), "with T from 1 to 9, got int64 [1, 10] - at the input"),
    "an id too large": ((IDS + 11,), "expected token ids from 0 to 10, got 11 - at the input"),
    "a negative id": ((IDS - 1,), "expected token ids from 0 to 10, got -1 - at the input"),
    "2^32": ((IDS + 2**32,), "expected token ids from 0 to 10, got 4294967296 - at the input"),
    "a mask of another shape": ((IDS, IDS[:, :3]), "expected a mask of shape [2, 4], got [2, 3] - at the mask"),
    "a mask with a hole": (
        (IDS, np.array([[1, 1, 1, 1], [1, 0, 1, 0]])),
        "expected ones, at least one, and then zeros, got others - at text 1 of the mask",
    ),
    "an empty text": (
        (IDS, np.array([[0, 0, 0, 0], [1, 0, 0, 0]])),
        "expected ones, at least one, and then zeros, got others - at text 0 of the mask",
    ),
    "a mask of twos": (
        (IDS, IDS + 2),
        "expected ones, at least one, and then zeros, got others - at text 0 of the mask",
    ),
}


def runs(path):
    """The engine and the reference, as functions of ids and a mask."""
    graph = load(path)
    return [qdeploy.load_int_model(path), lambda ids, mask=None: reference.run(graph, ids, mask=mask)]


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_batch_of_texts(path, case):
    arguments, error = BAD[case]
    for run in runs(path):
        with pytest.raises(InputError) as raised:
            run(*arguments)
        assert str(raised.value).endswith(error)


def test_texts_of_one_length_take_no_mask(tmp_path):
    graph = rows_graph()
    graph.variable = False
    save(graph, tmp_path / "m.safetensors")
    model = qdeploy.load_int_model(tmp_path / "m.safetensors")
    ids = np.zeros((2, LONGEST), np.int64)
    assert model(ids).tobytes() == reference.run(graph, ids).tobytes()
    for arguments, error in (
        ((ids, np.ones_like(ids)), "expected no mask for texts of one length, got one - at the mask"),
        ((ids[:, :4],), "expected int32 or int64 [N, 9], got int64 [2, 4] - at the input"),
    ):
        for run in runs(tmp_path / "m.safetensors"):
            with pytest.raises(InputError) as raised:
                run(*arguments)
            assert str(raised.value) == error
