"""The Triton kernels of LSQ, interpreted on the CPU, against the definition in plain PyTorch."""

import math
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lsq import RANGES
from torch.nn import functional
from triton_on_cpu import warps_in_any_order  # before the kernels

import qdeploy.kernels
from qdeploy.errors import InputError
from qdeploy.kernels import lsq as definition
from qdeploy.kernels import triton_lsq, triton_lsq_many
from qdeploy.kernels.lsq import flat_views, lsq, lsq_many

# numpy reports what the interpreter computes with infinities and NaN
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")

SPECIAL = [np.nan, np.inf, -np.inf, -0.0, 0.0, 3e38, -3e38, 1e-42]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def as_on_gpu():
    """Takes every tensor for one on a GPU."""
    return mock.patch.object(definition, "on_gpu", lambda value: True)


def values_of(rng, shape, step, qmin, qmax):
    """Float32 values with ordinary elements, ties k + 1/2, bounds, elements far outside and special ones."""
    code = rng.integers(qmin - 2, qmax + 3, shape)
    x = np.choose(
        rng.integers(0, 5, shape),
        [rng.normal(0, qmax / 2, shape), code + 0.5, code, rng.choice([qmin, qmax], shape), code * 9],
    )
    with np.errstate(over="ignore"):
        value = (x * step).astype(np.float32)
    return np.where(rng.random(shape) < 0.05, rng.choice(np.float32(SPECIAL), shape), value)


def steps_of(rng, count, smallest=1e-40):
    """Ordinary steps, powers of two (exact ties and bounds) and very small ones."""
    step = rng.uniform(0.5, 2, count)
    power = 2.0 ** rng.integers(-4, 3, count)
    return np.choose(rng.choice(3, count, p=[0.5, 0.45, 0.05]), [step, power, step * smallest]).astype(np.float32)


def assert_same_bits(found, expected):
    """Equal as bits, but for which NaN it is."""
    assert found.dtype == expected.dtype and found.stride() == expected.stride()
    bits = {4: torch.int32, 2: torch.int16}[found.element_size()]
    same = (found.view(bits) == expected.view(bits)) | (found.isnan() & expected.isnan())
    assert same.all()


def assert_same_sums(found, expected, grad, largest, axis):
    """Float64 sums in another order, rounded to float32: at most the last bit differs, or what cancels out."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    rest = [i for i in range(grad.dim()) if i != axis]
    magnitude = grad.double().abs().mul(largest)
    magnitude = (magnitude.sum(rest) if rest else magnitude).reshape(found.shape)
    error = (found.double() - expected.double()).abs()
    close = (error <= 1.2e-7 * expected.double().abs() + 1e-14 * magnitude) | (found == expected)
    assert (close | (found.isnan() & ~expected.isfinite())).all()


def gradients(value, step, grad, *constants):
    v, s = value.detach().requires_grad_(), step.detach().requires_grad_()
    out = lsq(v, s, *constants)
    return out, *torch.autograd.grad(out, (v, s), grad)


@st.composite
def cases(draw):
    qmin, qmax = RANGES[draw(st.sampled_from(sorted(RANGES)))](draw(st.integers(2, 8)))
    shape = draw(
        st.lists(st.integers(0, 9), max_size=4).map(tuple)
        | st.tuples(st.integers(1, 3), st.integers(1, 150))  # rows of several tiles, tails of every length
        | st.tuples(st.integers(20, 150), st.integers(1, 5))  # columns
        | st.tuples(st.integers(1, 9), st.sampled_from([1, 3, 16, 64]), st.sampled_from([9, 16, 49]))
    )
    axis = draw(st.integers(-1, len(shape) - 1))
    order = draw(st.permutations(range(len(shape))))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    # The interpreter takes subnormal bfloat16 for zeros.
    step = steps_of(rng, shape[axis] if axis >= 0 else 1, 1e-40 if dtype == torch.float32 else 1e-3)
    aligned = step.reshape([-1 if i == axis else 1 for i in range(len(shape))]) if axis >= 0 else step[0]
    value = torch.tensor(values_of(rng, shape, aligned, qmin, qmax)).to(dtype)
    grad = torch.tensor(rng.normal(size=shape)).to(dtype)
    if order:  # any order of the dimensions in memory
        value = value.permute(order).contiguous().permute(np.argsort(order).tolist())
    if draw(st.booleans()):
        value = functional.pad(value[..., None], (0, 1))[..., 0]  # not dense
    if draw(st.booleans()):
        grad = grad.permute(order).contiguous().permute(np.argsort(order).tolist())
    return value, torch.tensor(step), grad, qmin, qmax, axis


@settings(max_examples=30, deadline=None)
@given(cases(), st.sampled_from([0.0, 1.0, 0.0123]))
def test_kernels_give_the_bits_of_the_definition(case, scale):
    value, step, grad, qmin, qmax, axis = case
    expected, expected_value, expected_step = gradients(value, step, grad, qmin, qmax, axis, scale)
    with as_on_gpu():
        found, found_value, found_step = gradients(value, step, grad, qmin, qmax, axis, scale)
    if qmin < 0:
        assert_same_bits(found, torch.empty_like(found).copy_(expected))
    else:  # max(-0, 0) has either sign in IEEE 754
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert_same_bits(found_value, torch.empty_like(found_value).copy_(expected_value))
    assert_same_sums(found_step, expected_step, grad, max(-qmin, qmax), axis)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((5000,), -1),  # one row of several tiles
        ((3, 2500), 0),  # rows longer than a tile
        ((130, 72), 0),  # more rows than a tile has
        ((2, 5, 300), 1),  # rows of channels that repeat
        ((200, 130), 1),  # columns, more than a tile has, both ways
        ((70, 3, 21), 1),  # columns of channels with several elements
    ],
)
def test_large_tensors(shape, axis):
    rng = np.random.default_rng(0)
    value = torch.tensor(rng.normal(0, 4, shape), dtype=torch.float32)
    step = torch.tensor(rng.uniform(0.5, 2, shape[axis] if axis >= 0 else 1), dtype=torch.float32)
    grad = torch.tensor(rng.normal(size=shape), dtype=torch.float32)
    expected = gradients(value, step, grad, -8, 7, axis, 0.1)
    with as_on_gpu():
        found, again = (gradients(value, step, grad, -8, 7, axis, 0.1) for _ in range(2))
    for a, b, c in zip(found, again, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1.2e-7, atol=0)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from([1, 3, 700, 9000]), st.integers(0, 2**32))
def test_partial_sums_of_any_number(a, channels, b, seed):
    partial = torch.tensor(np.random.default_rng(seed).normal(size=(a, channels, b)))
    found = triton_lsq._sum(partial.flatten(), a, channels, b, 0.3)
    expected = partial.sum((0, 2)).mul(0.3)
    assert found.dtype == torch.float32
    assert ((found - expected).abs() <= 1e-7 * expected.abs() + 1e-14 * partial.abs().sum((0, 2))).all()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 2**20) | st.sampled_from([1, 2**16, 2**28, 2**33]), min_size=1, max_size=3).filter(
        lambda shape: math.prod(shape) < 2**40
    ),
    st.integers(-1, 2),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_tiles_cover_tensors_of_any_size(shape, axis, dtype):
    value = torch.empty(shape, dtype=dtype, device="meta")
    axis = min(axis, len(shape) - 1)
    place = value.shape, value.stride(), value.element_size()
    (m, n_vec, channels, inner, tiles_n), tile = triton_lsq._geometry(*place, axis)
    vec, block_m, block_n = tile["VEC"], tile["BLOCK_M"], tile["BLOCK_N"]
    n = n_vec * vec
    assert m * n == value.numel()
    assert channels == (1 if axis == -1 else shape[axis])
    assert (m % channels == 0 and n == inner) if tile["BY_ROW"] else n == channels * inner
    assert (tiles_n - 1) * block_n < n <= tiles_n * block_n
    assert tiles_n * block_n <= 1.1 * n or block_n <= 32
    assert block_m == 1 or block_m * n < 2**31  # offsets in a tile are int32
    assert block_m * block_n <= 2048


SHAPES = st.sampled_from([(8, 3, 7, 7), (16, 8, 3, 3), (5, 3, 3, 3), (70, 64), (40, 3, 3), (3, 1000), (33,), (2, 2200)])


@st.composite
def weights(draw):
    """Lists of weights with their steps, ranges and gradient scales."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values, steps, ranges, scales = [], [], [], []
    for shape in draw(st.lists(SHAPES, min_size=1, max_size=4)):
        per_channel = draw(st.booleans())
        qmin, qmax = RANGES[draw(st.sampled_from(sorted(RANGES)))](draw(st.integers(2, 8)))
        step = steps_of(rng, shape[0] if per_channel else 1)
        aligned = step.reshape(-1, *[1] * (len(shape) - 1))
        value = torch.tensor(values_of(rng, shape, aligned, qmin, qmax))
        if len(shape) == 4 and draw(st.booleans()):
            value = value.contiguous(memory_format=torch.channels_last)
        if draw(st.booleans()):  # begins 4 bytes after a multiple of 16
            value = torch.empty(value.numel() + 1)[1:].as_strided(shape, value.stride()).copy_(value)
        values.append(value.requires_grad_())
        steps.append(torch.tensor(step if per_channel else step[0]).requires_grad_())
        ranges.append((qmin, qmax))
        scales.append(draw(st.sampled_from([0.0, 1.0, 0.0123])))
    wanted = draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)).filter(any))
    return values, steps, ranges, scales, wanted


@settings(max_examples=20, deadline=None)
@given(weights())
def test_one_launch_gives_the_bits_of_many(case):
    values, steps, ranges, scales, wanted = case
    expected = lsq_many(values, steps, ranges, scales)
    grads = [torch.randn(out.shape) for out in expected]

    def differentiate(outputs):
        pairs = [(out, grad) for out, grad, want in zip(outputs, grads, wanted, strict=True) if want]
        used, upstream = zip(*pairs, strict=True)
        found = torch.autograd.grad(used, values + steps, upstream, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, values + steps, strict=True)]

    with as_on_gpu():
        found = lsq_many(values, steps, ranges, scales)
        found_grads = differentiate(found)
    for (qmin, _), out, reference in zip(ranges, found, expected, strict=True):
        assert out.untyped_storage().data_ptr() == found[0].untyped_storage().data_ptr() and out.data_ptr() % 16 == 0
        if qmin < 0:
            assert_same_bits(out, reference)
        torch.testing.assert_close(out, reference, rtol=0, atol=0, equal_nan=True)
    expected_grads = differentiate(expected)
    count = len(values)
    for grad, reference in zip(found_grads[:count], expected_grads[:count], strict=True):
        assert_same_bits(grad, torch.empty_like(grad).copy_(reference))
    for i, (grad, reference) in enumerate(zip(found_grads[count:], expected_grads[count:], strict=True)):
        if not wanted[i]:
            grad = grad.nan_to_num()  # a missing gradient is zeros, which NaN values make NaN
        assert_same_sums(grad, reference, grads[i], max(map(abs, ranges[i])), 0 if grad.dim() else -1)


def three_weights():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).requires_grad_() for shape in [(8, 3, 3, 3), (6, 64), (5, 3)]]
    steps = [torch.full((8,), 0.3), torch.tensor(0.2), torch.full((5,), 0.1)]
    return values, [step.requires_grad_() for step in steps], [(-8, 7), (-64, 63), (-2, 1)], [1.0, 0.5, 0.1]


def test_tables_follow_the_weights():
    values, steps, ranges, scales = three_weights()
    with as_on_gpu():
        lsq_many(values, steps, ranges, scales)
        tables = list(triton_lsq_many._tables.values())
        with torch.no_grad():
            values[0].add_(1)  # in place: the tables still hold
        first = lsq_many(values, steps, ranges, scales)
        assert all(a is b for a, b in zip(tables, triton_lsq_many._tables.values(), strict=True))
        values[1].data = torch.randn(6, 64)
        steps[2].data = torch.full((5,), 0.7)
        second = lsq_many(values, steps, ranges, scales)
        third = lsq_many(values, steps, [(-4, 3)] * 3, scales)
        for i in range(triton_lsq_many.MAX_TABLES + 4):
            lsq_many([torch.randn(3, 4)], [torch.tensor(1.0)], [(-i - 1, i)], [1.0])
    assert len(triton_lsq_many._tables) <= triton_lsq_many.MAX_TABLES
    assert torch.equal(first[0], lsq(values[0], steps[0], -8, 7, 0, 1.0))
    assert torch.equal(second[1], lsq(values[1], steps[1], -64, 63, -1, 1.0))
    assert torch.equal(second[2], lsq(values[2], steps[2], -2, 1, 0, 1.0))
    assert torch.equal(third[1], lsq(values[1], steps[1], -4, 3, -1, 1.0))


def test_weights_that_move_keep_their_layout():
    """torch.compile copies the weights to other memory in every update: a new layout takes 4 ms, new addresses 0.1."""
    values, steps, ranges, scales = three_weights()
    constants = ([low for low, _ in ranges], [high for _, high in ranges], scales)
    grads = [torch.randn_like(value) for value in values]
    expected = torch.autograd.grad(lsq_many(values, steps, ranges, scales), values + steps, grads)
    exact = [lsq(v, s, *limits, 0 if s.dim() else -1, 1.0) for v, s, limits in zip(values, steps, ranges, strict=True)]
    triton_lsq_many._tables.clear()
    with as_on_gpu(), mock.patch.object(triton_lsq_many, "Layout", side_effect=triton_lsq_many.Layout) as made:
        for copies in [[value.detach().clone() for value in values] for _ in range(3)]:
            flat = torch.ops.qdeploy.lsq_many(copies, steps, *constants)
            of_values, of_steps = torch.ops.qdeploy.lsq_many_backward(grads, copies, steps, *constants)
            for view, value, gradient in zip(flat_views(values)[0], exact, expected[:3], strict=True):
                assert torch.equal(flat.as_strided(*view), value)
                assert torch.equal(of_values.as_strided(*view), gradient)
            torch.testing.assert_close(of_steps, torch.cat([g.reshape(-1) for g in expected[3:]]), rtol=1.2e-7, atol=0)
    assert made.call_count == 1


def test_gradients_in_any_layout():
    """Expanded (a sum's), not on 16 bytes, and of channels_last weights in the order of contiguous ones."""
    values, steps, ranges, scales = three_weights()
    values[0] = values[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    grads = [torch.randn(8, 3, 3, 3), torch.randn(6 * 64 + 1)[1:].reshape(6, 64), torch.ones(()).expand(5, 3)]
    expected = torch.autograd.grad(lsq_many(values, steps, ranges, scales), values + steps, grads)
    with as_on_gpu():
        found = torch.autograd.grad(lsq_many(values, steps, ranges, scales), values + steps, grads)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_no_order_of_warps_changes_a_bit(seed):
    """Groups of several rows and of one, each of several programs, whose last one differs from run to run."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(6, 64 * 9), (2, 64 * 61), (9, 3, 3, 3), (64 * 70,)]
    values = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    steps = [torch.full(shape[:1], 0.3).requires_grad_() for shape in shapes[:-1]] + [
        torch.tensor(0.2).requires_grad_()
    ]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    empty = torch.empty

    def poisoned(*size, dtype=torch.float32, device=None):
        return empty(*size, dtype=dtype, device=device).fill_(-1 if dtype == torch.int32 else np.nan)

    def run():
        with as_on_gpu(), mock.patch.object(torch, "empty", poisoned):
            outputs = lsq_many(values, steps, [(-8, 7)] * 4, [0.1] * 4)
            twice = [torch.autograd.grad(outputs, values + steps, grads, retain_graph=True) for _ in range(2)]
        return *outputs, *twice[0], *twice[1]

    expected = run()
    with warps_in_any_order(seed):
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("change", ["half", "transposed", "empty"])
def test_what_does_not_fit_goes_one_by_one(change):
    values, steps, ranges, scales = three_weights()
    values[1] = {"half": values[1].bfloat16(), "transposed": values[1].t(), "empty": values[1][:0]}[change].detach()
    expected = lsq_many(values, steps, ranges, scales)
    with as_on_gpu(), mock.patch.object(triton_lsq_many, "forward_many", side_effect=AssertionError):
        found = lsq_many(values, steps, ranges, scales)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with as_on_gpu():
        assert lsq_many([], [], [], []) == []
        steps[2] = torch.ones(4)
        with pytest.raises(InputError, match=r"axis 0 of a value of shape \[5, 3\], got shape \[4\]"):
            lsq_many(values, steps, ranges, scales)


def test_weights_without_use_have_no_gradient():
    values, steps, ranges, scales = three_weights()
    with as_on_gpu():
        outputs = lsq_many(values, steps, ranges, scales)
        found = torch.autograd.grad(outputs[1].sum(), values + steps, allow_unused=True)
    assert [grad is None for grad in found] == [True, False, True] * 2
    expected = torch.autograd.grad(lsq(values[1], steps[1], -64, 63, -1, 0.5).sum(), [values[1], steps[1]])
    torch.testing.assert_close([found[1], found[4]], list(expected), rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("together", [True, False])
def test_second_derivatives_are_those_of_the_definition(together):
    values, steps, ranges, scales = three_weights()
    along = [torch.randn_like(tensor) for tensor in values + steps]

    def derivatives():
        if together:
            outputs = lsq_many(values, steps, ranges, scales)
        else:
            terms = zip(values, steps, ranges, scales, strict=True)
            outputs = [lsq(v, s, *limits, 0 if s.dim() else -1, scale) for v, s, limits, scale in terms]
        loss = sum((out**3).sum() for out in outputs)
        grads = torch.autograd.grad(loss, values + steps, create_graph=True)
        return torch.autograd.grad(grads, values + steps, along)

    expected = derivatives()
    with as_on_gpu():
        found = derivatives()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's own tracing
def test_one_launch_compiles_without_graph_break():
    values, steps, ranges, scales = three_weights()

    def loss(*tensors):
        return sum(out.square().sum() for out in lsq_many(tensors[:3], tensors[3:], ranges, scales))

    with as_on_gpu():
        eager = torch.autograd.grad(loss(*values, *steps), values + steps)
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        found = torch.autograd.grad(compiled(*values, *steps), values + steps)
    assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))


def test_operators_pass_the_checks_of_torch():
    values, steps, ranges, scales = three_weights()
    values[0] = values[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    with as_on_gpu():
        torch.library.opcheck(lsq, (values[0], steps[0], -8, 7, 0, 0.5))
        arguments = [v.detach() for v in values], [s.detach() for s in steps], *zip(*ranges, strict=True), scales
        grads = [torch.randn_like(v) for v in values]
        checks = (
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
        )  # the gaps of flat buffers have no value
        torch.library.opcheck(definition._lsq_many, tuple(map(list, arguments)), test_utils=checks)
        torch.library.opcheck(definition._lsq_many_backward, (grads, *map(list, arguments)), test_utils=checks)


def test_a_gpu_needs_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "qdeploy.kernels.triton_lsq", None)
    monkeypatch.delattr(qdeploy.kernels, "triton_lsq")
    with as_on_gpu(), pytest.raises(InputError, match=r"got none: pip install 'qdeploy\[train\]' - at qdeploy::lsq"):
        lsq(torch.ones(3), torch.tensor(1.0), -8, 7, -1, 1.0)
