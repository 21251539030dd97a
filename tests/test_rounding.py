"""Weights in float32, rounded with and without calibration data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from network_by_hand import ByHand

from qdeploy.errors import ExportError, InputError
from qdeploy.exporter.elements import Value
from qdeploy.exporter.fusion import fuse
from qdeploy.exporter.layer_inputs import Columns, columns_of
from qdeploy.exporter.layers import Concat, Conv2d, Input, Linear, MaxPool2d, Network
from qdeploy.exporter.rounding import Rounding, _step, check_rounding
from qdeploy.exporter.weights import Rounded, quantize_weights

BITS = 4


def rounded(method="nearest", correct_bias=True, bits=BITS, source=None):
    """The network, its layer `fc` as it was, and the float network, after all the data were seen."""
    source = source or ByHand()
    network = fuse(source.network())
    before = {layer.name: (layer.scale, layer.shift) for layer in network.layers if isinstance(layer, Linear)}
    rounding = Rounding(quantize_weights(network, {"fc": bits}), method, correct_bias)
    for images in np.array_split(source.images, 3):
        network.run(images, rounding.observers())
    rounding.apply()
    return network, before, source


def fc_of(network):
    return network.output


def dequantized(layer):
    return layer.codes.values * layer.scale[:, None]


def seen_by_fc(source):
    found = []
    source.run(source.images, {"hardswish": found.append})
    return found[0].astype(np.float64)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_without_data_the_largest_weight_of_a_channel_is_the_largest_code(bits):
    source = ByHand()
    source.second[2] = 0
    network = fuse(source.network())
    [one] = quantize_weights(network, {"fc": bits})
    fc = fc_of(network)
    most = 2 ** (bits - 1) - 1
    assert np.abs(fc.codes.values.astype(int)).max(1).tolist() == [most, most, 0, most, most]
    assert np.array_equal(fc.codes.values, np.rint(source.second / fc.scale[:, None]))
    assert one.layer is fc and one.bits == bits and np.array_equal(one.weight, source.second)


@pytest.mark.parametrize("method", ["nearest", "obc"])
def test_no_channel_is_off_in_the_mean(method):
    network, _, source = rounded(method)
    fc, x = fc_of(network), seen_by_fc(source)
    expected = (x @ source.second.T.astype(np.float64)).mean(0)
    np.testing.assert_allclose((x @ dequantized(fc).T + fc.shift).mean(0), expected, atol=1e-6)
    plain, _, _ = rounded(method, correct_bias=False)
    assert not fc_of(plain).shift.any()
    assert np.abs((x @ dequantized(fc_of(plain)).T).mean(0) - expected).max() > 0.01
    assert np.array_equal(fc_of(plain).codes.values, fc.codes.values)


@pytest.mark.parametrize("method", ["nearest", "obc"])
def test_learned_codes_and_biases_stay(method):
    network, before, source = rounded(method)
    first = network.layers[1]
    assert first.codes.quantizer == "learned" and np.array_equal(first.codes.values, source.codes)
    assert first.shift is before["first"][1]


@given(st.integers(0, 2**32 - 1), st.integers(2, 8))
@settings(max_examples=30, deadline=None)
def test_the_step_is_the_better_of_two_on_the_data(seed, bits):
    random = np.random.default_rng(seed)
    rows = random.standard_t(3, (2, 3, 12)).astype(np.float32)
    rows[1, 2] = 0
    squares, half = random.exponential(size=(2, 12)) ** 2, 2 ** (bits - 1)
    exact = rows.astype(np.float64)
    largest = np.abs(exact).max(2) / (half - 1)

    def error(step, importance):
        wrong = np.clip(np.rint(exact / step[..., None]), -half, half - 1) * step[..., None] - exact
        return (wrong**2 * importance[:, None]).sum(2)

    step = _step(rows, squares, bits).reshape(2, 3)
    largest[1, 2] = step[1, 2]  # of zeros any is right
    kept = np.isclose(step, largest, rtol=1e-6)
    assert (error(step, squares) <= error(largest, squares) * (1 + 1e-9)).all()
    alike = np.ones((2, 12))
    assert (error(step, alike)[~kept] <= error(largest, alike)[~kept] * (1 + 1e-5)).all()


def test_obc_is_nearer_on_the_data():
    random = np.random.default_rng(0)
    x = (random.normal(size=(300, 40)) + 2 * random.normal(size=(300, 1))).astype(np.float32)  # all say nearly the same
    weight, errors = random.normal(size=(6, 40)).astype(np.float32), {}
    for method in ("nearest", "obc"):
        source = Input("x", [], (40,), Value("x"))
        layer = Linear("fc", [source], (6,), Value("y"), weight=weight, scale=np.ones(6), shift=np.zeros(6))
        rounding = Rounding([Rounded(layer, weight, layer.scale, 3)], method, correct_bias=True)
        rounding.observers()[source](x)
        rounding.apply()
        assert layer.codes.bits == 3 and layer.codes.values.min() >= -4 and layer.codes.values.max() <= 3
        errors[method] = np.square(x @ (dequantized(layer) - weight).T + layer.shift).mean()
    assert errors["obc"] < 0.5 * errors["nearest"]


def conv(x, channels, kernel, groups, stride=1, padding=(0, 0, 0, 0), dilation=1):
    """A convolution of `x`; shape and value are those of nothing."""
    weight = np.ones((channels, x.shape[0] // groups, *kernel), np.float32)
    window = {"stride": [stride] * 2, "padding": [*padding], "dilation": [dilation] * 2, "groups": groups}
    fields = {"weight": weight, "scale": np.ones(channels), "shift": np.zeros(channels)}
    return Conv2d("conv", [x], (channels, 1, 1), Value("conv"), window=window, **fields)


def columns_by_hand(x, layer):
    """[groups, N * positions, columns], one number at a time."""
    window = layer.window
    (stride, _), (dilation, _), groups = window["stride"], window["dilation"], window["groups"]
    top, left, bottom, right = window["padding"]
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    _, depth, kh, kw = layer.weight.shape
    found = []
    for group in range(groups):
        part = padded[:, group * depth : (group + 1) * depth]
        tops = range(0, part.shape[2] - dilation * (kh - 1), stride)
        lefts = range(0, part.shape[3] - dilation * (kw - 1), stride)
        windows = [
            part[n, :, i : i + dilation * (kh - 1) + 1 : dilation, j : j + dilation * (kw - 1) + 1 : dilation].ravel()
            for n, i, j in itertools.product(range(len(x)), tops, lefts)
        ]
        found.append(windows)
    return np.array(found, np.float64)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": (1, 1), "groups": 1},
        {"kernel": (3, 3), "groups": 1, "padding": (1, 1, 1, 1)},
        {"kernel": (3, 2), "groups": 2, "padding": (0, 1, 2, 3), "stride": 2},
        {"kernel": (3, 3), "groups": 4, "padding": (2, 2, 2, 2), "dilation": 2},
    ],
)
def test_columns_of_a_convolution(options):
    x = np.random.default_rng(0).normal(size=(5, 4, 6, 7)).astype(np.float32)
    layer = conv(Input("input", [], x.shape[1:], Value("x")), 8, **options)
    columns = Columns(layer, products=True)
    [observer] = columns.observers().values()
    observer(x[:2])
    observer(x[2:])
    seen = columns_by_hand(x, layer)
    np.testing.assert_allclose(columns.means(), seen.mean(1), atol=1e-7)
    np.testing.assert_allclose(columns.mean_squares(), (seen**2).mean(1), atol=1e-7)
    expected = seen.swapaxes(1, 2) @ seen / seen.shape[1]  # at most 64 positions an image: all of them
    np.testing.assert_allclose(columns.mean_products(), expected, atol=1e-5)


def test_columns_of_tokens():
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    weight, ones = np.ones((2, 4), np.float32), np.ones(2)
    layer = Linear(
        "fc", [Input("x", [], (5, 4), Value("x"))], (5, 2), Value("y"), weight=weight, scale=ones, shift=ones
    )
    columns = Columns(layer, products=True)
    [observer] = columns.observers().values()
    observer(x)
    rows = x.reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(columns.means(), rows.mean(0)[None], atol=1e-7)
    np.testing.assert_allclose(columns.mean_products(), (rows.T @ rows / 15)[None], atol=1e-6)


def test_of_many_positions_some_are_drawn():
    x = np.random.default_rng(0).normal(size=(4, 1, 40, 40)).astype(np.float32)
    columns = Columns(conv(Input("input", [], (1, 40, 40), Value("x")), 1, (1, 1), 1), products=True)
    [observer] = columns.observers().values()
    observer(x)
    assert columns.mean_products()[0, 0, 0] == pytest.approx(1, abs=0.3)
    assert columns.mean_products()[0, 0, 0] != pytest.approx(columns.mean_squares()[0, 0], rel=1e-6)


def test_what_moves_is_no_tensor_of_the_float_network():
    random = np.random.default_rng(0)
    a, b = (random.normal(size=(2, 3, 6, 6)).astype(np.float32) for _ in range(2))
    first, second = (Input(name, [], (3, 6, 6), Value(name)) for name in "ab")
    window = {"kernel": [3, 3], "stride": [2, 2], "padding": [1, 1, 1, 1], "dilation": [1, 1]}
    pool = MaxPool2d("pool", [first], (3, 3, 3), None, window=window)
    others = MaxPool2d("others", [second], (3, 3, 3), None, window=window)
    both = Concat("both", [pool, others], (6, 3, 3), None)
    columns = Columns(conv(both, 2, (1, 1), 1), products=False)
    observers = columns.observers()
    assert list(observers) == [first, second]
    observers[first](a)
    observers[second](b)
    padded = np.pad(np.concatenate([a, b], 1), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    pooled = np.array([[padded[:, :, i : i + 3, j : j + 3].max((2, 3)) for j in (0, 2, 4)] for i in (0, 2, 4)])
    np.testing.assert_allclose(columns.means()[0], pooled.mean((0, 1, 2)), atol=1e-6)


def test_layers_that_read_the_same_share_what_was_seen():
    x = Input("input", [], (4, 6, 6), Value("x"))
    one, two, other = conv(x, 2, (1, 1), 1), conv(x, 8, (1, 1), 1), conv(x, 2, (1, 1), 1, stride=2)
    found = columns_of([one, two, other], products=False)
    assert found[one] is found[two] is not found[other]


def test_an_input_that_is_always_0_rounds_to_nearest():
    source = ByHand()
    source.first[3] = 0  # hardswish(0) = 0
    network, _, _ = rounded("obc", source=source)
    fc = fc_of(network)
    assert np.array_equal(fc.codes.values[:, 3], np.clip(np.rint(source.second[:, 3] / fc.scale), -8, 7))


def test_numbers_that_are_not_finite_are_named():
    source = ByHand()
    network = fuse(source.network())
    rounding = Rounding(quantize_weights(network, None), "nearest", True)
    source.images[7, 2] = np.inf
    with np.errstate(invalid="ignore"), pytest.raises(ExportError) as error:
        network.run(source.images, rounding.observers())
    got = "NaN or infinity on calibration data"
    assert str(error.value) == f"expected finite activations, got {got} - at module `act`"


def test_unknown_methods_and_missing_data():
    check_rounding("nearest", has_data=False)
    check_rounding("obc", has_data=True)
    with pytest.raises(InputError) as error:
        check_rounding("gptq", has_data=True)
    assert str(error.value) == "expected rounding nearest or obc, got 'gptq' - at export"
    with pytest.raises(InputError) as error:
        check_rounding("obc", has_data=False)
    assert str(error.value) == "expected calibration data for rounding obc, got none - at export"


def test_a_network_without_such_weights():
    source = ByHand()
    x = Input("input", [], (6,), Value("x"))
    assert Rounding(quantize_weights(Network(source, [x], x), 8), "obc", True).observers() == {}
