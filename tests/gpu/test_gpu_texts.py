"""Models of texts on the kernels for GPUs: their own lengths, what they refuse, and what they say of themselves."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton_on_cpu", reason="the kernels for GPUs need Triton", exc_type=ImportError)
import torch
from builder import Builder, small_text, text_batch
from test_gpu_model import with_fake_graphs
from test_texts import BAD, IDS, LONGEST, VOCABULARY, mask_of, rows_graph

import qdeploy
from qdeploy import cli, format, reference
from qdeploy.errors import InputError
from qdeploy.gpu import GpuTextModel, loading, texts
from qdeploy.gpu import model as gpu
from qdeploy.graph import Graph

CPU = torch.device("cpu")


def load(graph: Graph, path: Path) -> GpuTextModel:
    format.save(graph, path)
    return loading.build(format.read(path), path, CPU)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize("step", [1, 4, 64])
def test_neighbours_and_padding_change_no_bit(path, monkeypatch, step):
    monkeypatch.setattr(texts, "TOKENS_STEP", step)
    model = load(rows_graph(), path)
    ids = torch.randint(0, VOCABULARY, (3, LONGEST), generator=torch.Generator().manual_seed(0))
    lengths = [1, 9, 4]
    mask = torch.from_numpy(mask_of(lengths, LONGEST))
    batch = model(ids, mask)
    assert batch.shape == (3, LONGEST + 1, 5)
    assert torch.equal(model(torch.where(mask == 1, ids, 2**40), mask.bool()), batch)
    for i, length in enumerate(lengths):
        alone = model(ids[i : i + 1, :length].int())
        assert alone.shape == (1, length + 1, 5)
        assert torch.equal(batch[i, : length + 1], alone[0])
        assert not batch[i, length + 1 :].any()


def test_chunks_classes_pickles_and_times(path, monkeypatch):
    graph = small_text()
    model = load(graph, path)
    ids, mask = text_batch(graph, 5, np.random.default_rng(1))
    batch = torch.from_numpy(ids), torch.from_numpy(mask)
    expected = reference.run(graph, ids, mask=mask)
    model._images_per_chunk = 2
    assert model(*batch).numpy().tobytes() == expected.tobytes()
    assert model.predict(*batch).tolist() == reference.predict(graph, ids, mask).tolist()
    assert model(batch[0][:0], batch[1][:0]).shape == (0, 3)
    assert model(batch[0][:0], taps=["mul.12"])[1]["mul.12"].shape == (0, LONGEST + 1, 12)
    monkeypatch.setattr(gpu, "checked_device", torch.device)
    assert pickle.loads(pickle.dumps(model))(*batch).numpy().tobytes() == expected.tobytes()
    monkeypatch.setattr(gpu, "_milliseconds", lambda launch: (launch(), 0.25)[1])
    assert len(model.profile(batch[0][:2], batch[1][:2])) == len(model.plan())
    model.tune(batch[0][:2], batch[1][:2])


def test_graphs_by_number_of_texts_and_tokens(path, monkeypatch):
    model = load(rows_graph(), path)
    monkeypatch.setattr(texts, "TOKENS_STEP", 4)
    ids = torch.randint(0, VOCABULARY, (2, LONGEST), generator=torch.Generator().manual_seed(0))
    expected = {width: model(ids[:, :width]) for width in (3, 4, 9)}
    with_fake_graphs(model, monkeypatch)
    monkeypatch.setattr(GpuTextModel, "_run_chunk", GpuTextModel._replay)
    for width in (9, 3, 4, 3, 9):
        assert torch.equal(model(ids[:, :width]), expected[width])
    assert [tuple(size) for size in model._captured] == [(2, 5), (2, 10)]


@pytest.mark.parametrize("rule", ["logits", "probs"])
def test_ensembles_of_texts(path, rule):
    """Members of their own numbers of rows."""
    members = []
    for i in range(2):
        net = Builder(np.random.default_rng(i), (LONGEST,), None)
        x = net.position(net.embedding(VOCABULARY, 6 + i), prefix=i)
        net.linear(net.mean(x), 4, dtype="f32", size=1.0)
        members.append(net.member(f"m{i}"))
    graph = Graph(members, rule, vocabulary=VOCABULARY, variable=True)
    ids, mask = text_batch(graph, 6, np.random.default_rng(3))
    found = load(graph, path)(torch.from_numpy(ids), torch.from_numpy(mask))
    assert found.numpy().tobytes() == reference.run(graph, ids, mask=mask).tobytes()


def test_description_is_that_of_the_model_on_a_cpu(path):
    model = load(small_text(), path)
    other = qdeploy.load_int_model(path)
    for key in ("inputs", "outputs", "members", "classes", "weight_bits", "nbytes"):
        assert getattr(model, key) == getattr(other, key), key
    assert model.weight_bits["embedding.0"] == 5
    keys = ("name", "op", "macs", "share_of_macs")
    assert [[row[key] for key in keys] for row in model.plan(3)] == [
        [row[key] for key in keys] for row in other.plan(3)
    ]


def as_tensor(value: object) -> object:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("case", [name for name in BAD if name != "a list"])
def test_what_is_no_batch_of_texts(path, case):
    arguments, error = BAD[case]
    with pytest.raises(InputError) as raised:
        load(small_text(), path)(*map(as_tensor, arguments))
    assert str(raised.value).endswith(error)


def test_tensors_that_are_none_or_elsewhere(path):
    model, ids = load(small_text(), path), torch.from_numpy(IDS)
    for arguments, error in (
        ((IDS,), "expected a tensor on cpu, got ndarray - at the input"),
        ((ids, IDS), "expected a tensor on cpu, got ndarray - at the mask"),
        ((ids, ids.to("meta")), "expected a tensor on cpu, got one on meta - at the mask"),
    ):
        with pytest.raises(InputError) as raised:
            model(*arguments)
        assert str(raised.value) == error


def test_texts_of_one_length_take_no_mask(path):
    graph = rows_graph()
    graph.variable = False
    model, ids = load(graph, path), torch.zeros(2, LONGEST, dtype=torch.int64)
    assert model(ids).numpy().tobytes() == reference.run(graph, ids.numpy()).tobytes()
    for arguments, error in (
        ((ids, torch.ones_like(ids)), "expected no mask for texts of one length, got one - at the mask"),
        ((ids[:, :4],), "expected int32 or int64 [N, 9], got int64 [2, 4] - at the input"),
    ):
        with pytest.raises(InputError) as raised:
            model(*arguments)
        assert str(raised.value) == error


def test_verify_on_a_gpu(path, monkeypatch, capsys):
    format.save(small_text(), path)
    monkeypatch.setattr(loading, "checked_device", lambda device: CPU)
    assert cli.main(["verify", str(path), "--batch", "2", "--device", "cuda", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]
    assert (row["input"], row["isa"], row["different"], row["compared"]) == ("ids", "cuda", 0, 19)
