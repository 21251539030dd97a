"""qdeploy::lsq against its formulas in numpy, and as a citizen of PyTorch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qdeploy import _engine
from qdeploy.errors import InputError
from qdeploy.kernels import cpu_lsq
from qdeploy.kernels.lsq import fake_quantize, lsq, lsq_codes, lsq_many
from qdeploy.training import quantize_

RANGES = {
    "signed": lambda b: (-(2 ** (b - 1)), 2 ** (b - 1) - 1),
    "symmetric": lambda b: (1 - 2 ** (b - 1), 2 ** (b - 1) - 1),
    "unsigned": lambda b: (0, 2**b - 1),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def cases(draw):
    """A value with ordinary elements, exact ties k + 1/2, exact bounds and elements far outside, and its steps."""
    bits = draw(st.integers(2, 8))
    qmin, qmax = RANGES[draw(st.sampled_from(sorted(RANGES)))](bits)
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    axis = draw(st.integers(-1, len(shape) - 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = 1 if axis == -1 else shape[axis]
    step = rng.uniform(0.5, 2, count).astype(np.float32)
    if draw(st.booleans()):  # powers of two make every tie and bound exact
        step = 2.0 ** np.round(np.log2(step) * 8)
    step = step.astype(np.float32)
    aligned = step.reshape([-1 if i == axis else 1 for i in range(len(shape))]) if axis >= 0 else step[0]
    kind = rng.integers(0, 5, shape)
    code = rng.integers(qmin - 2, qmax + 3, shape)
    x = np.choose(kind, [rng.normal(0, qmax / 2, shape), code + 0.5, code, rng.choice([qmin, qmax], shape), code * 9])
    value = (x * aligned).astype(np.float32)
    grad = rng.normal(size=shape).astype(np.float32)
    shaped = step if axis >= 0 else step.reshape(draw(st.sampled_from([(), (1,)])))
    return value, shaped, aligned, grad, qmin, qmax, axis


@settings(max_examples=250, deadline=None)
@given(cases(), st.sampled_from([0.0, 1.0, 0.0123]), st.sampled_from([lsq, fake_quantize]))
def test_values_codes_and_gradients_follow_the_formulas(case, grad_scale, quantize):
    value, step, aligned, grad, qmin, qmax, axis = case
    x = value / aligned
    codes = np.rint(np.clip(x, qmin, qmax))
    inside = (x >= qmin) & (x <= qmax)
    terms = grad * np.where(inside, codes - x, codes)
    axes = tuple(i for i in range(value.ndim) if i != axis)
    expected_step = grad_scale * terms.sum(axis=axes, dtype=np.float64)

    v, s = torch.tensor(value, requires_grad=True), torch.tensor(step, requires_grad=True)
    out = quantize(v, s, qmin, qmax, axis, grad_scale)
    out.backward(torch.tensor(grad))
    found = lsq_codes(v, s, qmin, qmax, axis)
    assert found.dtype == (torch.int8 if qmin < 0 else torch.uint8)
    assert np.array_equal(found.numpy(), codes)
    assert np.array_equal(out.detach().numpy(), codes * aligned)
    assert np.array_equal(v.grad.numpy(), np.where(inside, grad, 0))
    assert s.grad.shape == s.shape
    magnitude = grad_scale * np.abs(terms).sum(axis=axes, dtype=np.float64)
    assert np.all(np.abs(s.grad.numpy().reshape(-1) - expected_step) <= 1e-6 * magnitude + 1e-30)


def test_bounds_are_inside():
    value = torch.tensor([-4.0, -4.5, 3.0, 3.5, 0.5], requires_grad=True)
    step = torch.tensor(1.0, requires_grad=True)
    lsq(value, step, -4, 3, -1, 1.0).sum().backward()
    assert value.grad.tolist() == [1, 0, 1, 0, 1]
    assert step.grad.item() == 0 - 4 + 0 + 3 - 0.5


def composed(value, step):
    """LSQ's own formulation, with 4 bits along axis 0: round and a gradient scale of 0.1 by detached differences."""
    scaled = (step * 0.1 + (step - step * 0.1).detach()).reshape(-1, 1, 1, 1)
    x = (value / scaled).clamp(-8, 7)
    return (x + (x.round() - x).detach()) * scaled


def test_gradient_equals_the_straight_through_composition():
    torch.manual_seed(0)
    value = torch.randn(8, 3, 5, 5)
    step = (torch.rand(8) / 10 + 0.05).requires_grad_()
    v = value.clone().requires_grad_()
    expected = composed(v, step)
    upstream = torch.randn_like(value)
    expected_grads = torch.autograd.grad(expected, (v, step), upstream)
    found = lsq(v, step, -8, 7, 0, 0.1)
    found_grads = torch.autograd.grad(found, (v, step), upstream)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_grads, expected_grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_are_quantized_in_float32(dtype):
    value = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    step = torch.full((4,), 0.0371, requires_grad=True)
    out = lsq(value, step, -64, 63, 0, 1.0)
    assert out.dtype == dtype
    assert torch.equal(out, lsq(value.float(), step, -64, 63, 0, 1.0).to(dtype))
    out.sum().backward()
    assert value.grad.dtype == dtype and step.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("step", "axis", "text"),
    [
        (torch.ones(3), -1, r"expected one step size for the whole tensor, got shape \[3\] - at qdeploy::lsq"),
        (torch.ones(3), 0, r"axis 0 of a value of shape \[4, 5\], got shape \[3\] - at qdeploy::lsq"),
        (torch.ones(4), 2, r"axis 2 of a value of shape \[4, 5\], got shape \[4\]"),
    ],
)
def test_steps_that_do_not_fit_are_an_error(step, axis, text):
    with pytest.raises(InputError, match=text):
        lsq(torch.ones(4, 5), step, -8, 7, axis, 1.0)
    with pytest.raises(InputError, match=text):
        lsq_codes(torch.ones(4, 5), step, -8, 7, axis)


def curved(quantize):
    """A loss with curvature of its own behind the quantizer, and in which value and step meet."""

    def loss(value, step):
        out = quantize(value, step)
        return (out**3).sum() + (out.sum((1, 2, 3)) * step).square().sum()

    return loss


def test_hessian_vector_products_and_third_derivatives_are_those_of_the_composition():
    torch.manual_seed(0)
    inputs = torch.randn(3, 2, 2, 2), torch.rand(3) / 5 + 0.05
    along = torch.randn(3, 2, 2, 2), torch.randn(3)

    def derivatives(quantize):
        value, step = (tensor.clone().requires_grad_() for tensor in inputs)
        first = torch.autograd.grad(curved(quantize)(value, step), (value, step), create_graph=True)
        second = torch.autograd.grad(first, (value, step), along, create_graph=True)
        return *first, *second, *torch.autograd.grad(second, (value, step), along)

    found = derivatives(lambda value, step: lsq(value, step, -8, 7, 0, 0.1))
    expected = derivatives(composed)
    assert ((inputs[0] / inputs[1].reshape(-1, 1, 1, 1)).abs() > 8).sum() > 3  # some are outside the range
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_second_derivatives_with_one_step_and_in_half_precision():
    value = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    hessians = []
    for dtype in (torch.float32, torch.bfloat16):
        v, s = value.to(torch.bfloat16).to(dtype).requires_grad_(), torch.tensor(0.3, requires_grad=True)
        grads = torch.autograd.grad(lsq(v, s, 0, 15, -1, 0.5).float().square().sum(), (v, s), create_graph=True)
        hessians.append(torch.autograd.grad(grads[1], (v, s)))
        assert hessians[-1][0].dtype == dtype and hessians[-1][1].dtype == torch.float32
    for one, other in zip(*hessians, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=0.02, atol=0.02)


def test_torch_func_transforms_a_quantized_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(12, 2)).eval()
    images, classes = torch.randn(5, 2, 6, 6), torch.tensor([0, 1, 1, 0, 1])
    quantize_(net, 4, 4, calibration=images)
    parameters = dict(net.named_parameters())

    def loss(parameters, image, label):
        return nn.functional.cross_entropy(torch.func.functional_call(net, parameters, (image[None],)), label[None])

    found = torch.func.vmap(torch.func.grad_and_value(loss), (None, 0, 0))(parameters, images, classes)
    for i in range(5):
        value = nn.functional.cross_entropy(net(images[i : i + 1]), classes[i : i + 1])
        expected = torch.autograd.grad(value, [*parameters.values()])
        torch.testing.assert_close(found[1][i], value.detach())
        for name, grad in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[0][name][i], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # of torch's own forward derivatives
def test_torch_func_has_the_bits_and_the_hessian():
    torch.manual_seed(0)
    inputs = torch.randn(3, 2, 1, 2), torch.rand(3) / 5 + 0.05
    bits = torch.func.vmap(lambda value: fake_quantize(value, inputs[1][0], -8, 7, -1, 1.0))(inputs[0])
    assert torch.equal(bits, lsq(inputs[0], inputs[1][0], -8, 7, -1, 1.0))

    def in_transform(value, step):
        assert torch._C._are_functorch_transforms_active()
        return fake_quantize(value, step, -8, 7, 0, 0.1)

    found = torch.func.hessian(curved(in_transform), (0, 1))(*inputs)
    expected = torch.autograd.functional.hessian(curved(lambda v, s: lsq(v, s, -8, 7, 0, 0.1)), inputs)
    for row, other in zip(found, expected, strict=True):
        for one, two in zip(row, other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantize", [lsq, fake_quantize])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("per_slice", [False, True])
def test_kernels_of_the_cpu_have_the_bits_of_the_definition(quantize, layout, per_slice, monkeypatch):
    """More numbers than one call of a kernel takes, in slices of odd sizes; NaN and infinities stay what they are."""
    torch.manual_seed(0)
    value = torch.randn(3, 61, 17, 19).contiguous(memory_format=layout)
    value[0, 0, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    step, axis = (torch.tensor([0.02, 0.05, 0.3]), 0) if per_slice else (torch.tensor(0.05), -1)
    grad = torch.randn(3, 61, 17, 19)

    def run():
        v, s = value.clone().requires_grad_(), step.clone().requires_grad_()
        out = quantize(v, s, -64, 63, axis, 0.3)
        assert out.stride() == value.stride()
        return out.detach(), *torch.autograd.grad(out, (v, s), grad)

    assert cpu_lsq.takes(value, step, axis)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run())
    for other in found[1:]:
        assert all(torch.equal(a.nan_to_num(9.25), b.nan_to_num(9.25)) for a, b in zip(found[0], other, strict=True))
    monkeypatch.setattr(cpu_lsq, "HAS_ENGINE", False)
    out, of_value, of_step = run()
    assert np.array_equal(found[0][0].numpy().view(np.int32), out.numpy().view(np.int32))
    assert np.array_equal(found[0][1].numpy().view(np.int32), of_value.numpy().view(np.int32))
    torch.testing.assert_close(found[0][2], of_step, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", _engine.isas())
def test_gradients_of_steps_are_the_same_sums_on_every_instruction_set(isa):
    rng = np.random.default_rng(0)
    value, grad = rng.normal(size=(2, 3, 50_001)).astype(np.float32)
    step, results = np.full(3, 0.07, np.float32), []
    for name in ("scalar", isa):
        of_value, of_step = np.empty_like(value), np.empty_like(step)
        _engine.lsq_backward(grad, value, step, -8, 7, 0.1, of_value, of_step, 2, name)
        results.append((of_value.tobytes(), of_step.tobytes()))
    assert results[0] == results[1]


@pytest.mark.parametrize("isa", _engine.isas())
def test_errors_of_steps(isa):
    """Of each weight in float32, as the definition rounds it; their sum in float64."""
    rng = np.random.default_rng(0)
    value, step, found = rng.normal(size=(3, 40_003)).astype(np.float32), np.float32([0.02, 0.07, 0.3]), np.empty(3)
    _engine.lsq_errors(value, step, -8, 7, found, 2, isa)
    rounded = np.rint(np.clip(value / step[:, None], -8, 7)) * step[:, None]
    expected = [math.fsum(row) for row in np.square(rounded - value).astype(np.float64)]
    assert found == pytest.approx(expected, rel=1e-12)
    with pytest.raises(InputError, match="expected as many results as step sizes, got 2 - at lsq"):
        _engine.lsq_errors(value, step, -8, 7, np.empty(2), 1, isa)


@pytest.mark.parametrize("sizes", [(12, 5, 12), (12, 3, 11)])
def test_kernels_of_the_cpu_refuse_sizes_that_do_not_agree(sizes):
    value, step, result = (np.ones(size, np.float32) for size in sizes)
    with pytest.raises(InputError, match=r"expected rows of one size, and as many results, got 12 values"):
        _engine.lsq_forward(value, step, -8, 7, result, 1)


def test_many_values_are_quantized_one_by_one():
    values = [torch.randn(4, 3, 2), torch.randn(5).bfloat16(), torch.randn(2, 3)]
    steps = [torch.full((4,), 0.1), torch.tensor(0.3), torch.tensor(0.2)]
    found = lsq_many(values, steps, [(-8, 7), (0, 15), (-2, 1)], [1.0, 0.5, 0.1])
    assert torch.equal(found[0], lsq(values[0], steps[0], -8, 7, 0, 1.0))
    assert torch.equal(found[1], lsq(values[1], steps[1], 0, 15, -1, 0.5))
    assert torch.equal(found[2], lsq(values[2], steps[2], -2, 1, -1, 0.1))


@pytest.mark.parametrize(("shape", "axis"), [((), -1), ((1,), -1), ((4,), 0), ((3,), 1)])
def test_operator_passes_the_checks_of_torch(shape, axis):
    value = torch.randn(4, 3, 2, requires_grad=True)
    step = torch.full(shape, 0.1, requires_grad=True)
    # strides of the result follow the value's, so permuted (channels-last) weights work as well
    for v in (value, value.detach().permute(0, 2, 1).contiguous().permute(0, 2, 1).requires_grad_()):
        torch.library.opcheck(lsq, (v, step, -8, 7, axis, 0.5))


class Quantized(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3, 3, 3))
        self.step = nn.Parameter(torch.full((5,), 0.05))

    def forward(self, x):
        return torch.conv2d(x, lsq(self.weight, self.step, -64, 63, 0, 0.01))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's own tracing
def test_export_keeps_one_node(strict):
    exported = torch.export.export(Quantized(), (torch.randn(1, 3, 8, 8),), strict=strict)
    nodes = [node for node in exported.graph.nodes if node.op == "call_function"]
    assert [node.target for node in nodes] == [torch.ops.qdeploy.lsq.default, torch.ops.aten.conv2d.default]
    assert nodes[0].args[2:] == (-64, 63, 0, 0.01)
    assert nodes[1].args[1] is nodes[0]


def test_compiled_graph_has_the_gradients_of_eager():
    net, x = Quantized(), torch.randn(2, 3, 8, 8)
    eager = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x).square().sum(), list(net.parameters()))
    for a, b in zip(eager, found, strict=True):
        assert torch.equal(a, b)


def test_autocast_computes_with_bf16_and_trains_float32():
    net, x = Quantized(), torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert net.weight.grad.dtype == net.step.grad.dtype == torch.float32
    assert net.step.grad.abs().min() > 0
