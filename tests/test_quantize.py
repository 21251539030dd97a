"""Attaching quantizers to networks."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from qdeploy.errors import InputError
from qdeploy.kernels.lsq import lsq, lsq_codes, lsq_many
from qdeploy.networks.quantizable import quantizable_layers
from qdeploy.training import one_launch, quantizer
from qdeploy.training.attached_quantizers import project_steps_, quantizers, step_group, step_parameters
from qdeploy.training.initial_steps import MIN_STEP, initial_step
from qdeploy.training.models import MODELS
from qdeploy.training.quantize import quantize_, summary

pytestmark = pytest.mark.filterwarnings("ignore:expected a network that qdeploy.export can write")  # the Conv1d of Zoo


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Zoo(nn.Module):
    """What real code does: a shared module, tied weights, a residual, ReLU in place, one tensor read twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.right.weight = self.left.weight
        self.line = nn.Conv1d(8, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = functional.relu_(self.stem(x))
        x = self.shared(functional.relu(self.shared(x))) + x
        x = functional.relu(x, inplace=True)
        x = self.left(x) + self.right(x)
        return self.head(self.line(x.flatten(2)).mean(2))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_become_codes_times_steps(bits, per_channel):
    net = Zoo()
    before = {name: parameter for name, parameter in net.named_parameters()}
    steps = quantize_(net, bits, per_channel=per_channel)
    assert net.stem.parametrizations.weight.original is before["stem.weight"]
    weight, quantizer = net.stem.weight, quantizers(net)["stem.weight"]
    assert quantizer.bits == bits
    assert quantizer.step.shape == ((8,) if per_channel else ())
    codes = quantizer.codes(before["stem.weight"])
    assert codes.dtype == torch.int8
    assert codes.min() >= -(2 ** (bits - 1)) and codes.max() <= 2 ** (bits - 1) - 1
    step = quantizer.step.reshape(-1, 1, 1, 1) if per_channel else quantizer.step
    assert torch.equal(weight, codes * step)
    assert all(step.requires_grad for step in steps)


def test_classifier_is_left_alone_unless_asked():
    for skip, expected in [
        (None, ["stem", "shared", "left", "right", "line"]),
        ((), ["stem", "shared", "left", "right", "line", "head"]),
        (["stem", "head"], ["shared", "left", "right", "line"]),
    ]:
        net = Zoo()
        quantize_(net, skip=skip)
        assert list(quantizers(net)) == [f"{name}.weight" for name in expected]
    net = MODELS["resnet18"](7)
    quantize_(net)
    assert set(quantizable_layers(net)) - {key.removesuffix(".weight") for key in quantizers(net)} == {"fc"}


def test_bits_by_layer():
    net = Zoo()
    quantize_(net, {"stem": 8, "line": 2})
    assert {key: q.bits for key, q in quantizers(net).items()} == {"stem.weight": 8, "line.weight": 2}


def test_tied_weights_and_shared_modules_have_one_quantizer():
    net = Zoo()
    steps = quantize_(net)
    found = quantizers(net)
    assert found["left.weight"] is found["right.weight"]
    assert len(steps) == len(found) - 1 == 4
    assert net.left.parametrizations.weight.original is net.right.parametrizations.weight.original
    assert torch.equal(net.left.weight, net.right.weight)


def test_inputs_are_quantized_with_ranges_from_calibration():
    net = Zoo().train()
    batches = [(torch.randn(4, 3, 6, 6), None) for _ in range(2)]
    quantize_(net, 7, 8, calibration=batches, init="minmax")
    assert net.training
    found = quantizers(net)
    ranges = {key: (q.qmin, q.qmax) for key, q in found.items() if key.endswith("input")}
    assert ranges["stem.input"] == (-128, 127)  # images have both signs
    assert ranges["left.input"] == (0, 255)  # after a ReLU
    assert ranges["line.input"] == (-128, 127)  # after a sum
    assert found["left.input"] is found["right.input"]  # both read one tensor, which can have only one code
    assert found["left.input"] is not found["shared.input"]
    largest = max(max(b.max().item() / 127, -b.min().item() / 128) for b, _ in batches)
    assert found["stem.input"].step.item() == pytest.approx(largest, rel=1e-6)
    assert found["stem.input"].step.requires_grad
    seen = []
    net.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(2, 3, 6, 6)
    net(x)
    quantizer = found["stem.input"]
    assert torch.equal(seen[0], quantizer.codes(x) * quantizer.step)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's own tracing
def test_export_sees_every_quantizer(strict):
    net = Zoo().eval()
    x = torch.randn(2, 3, 6, 6)
    quantize_(net, 4, 8, calibration=[x])
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict)
    layers = [node for node in exported.graph.nodes if "conv" in str(node.target)]
    assert len(layers) == 6  # the shared convolution runs twice
    for layer in layers:
        assert [arg.target for arg in layer.args[:2]] == [torch.ops.qdeploy.lsq.default] * 2
    assert torch.equal(exported.module()(x), net(x))


def test_networks_copy_and_reload():
    x = torch.randn(2, 3, 6, 6)
    net = Zoo().eval()
    quantize_(net, 5, 7, calibration=[x])
    with torch.no_grad():
        net.stem.parametrizations.weight[0].step.mul_(1.5)
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))
    other = Zoo().eval()
    quantize_(other, 8, 8, calibration=[x.abs()])  # the state brings bits, ranges and steps
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    assert quantizers(other)["stem.input"].qmin == -64


def test_steps_train_and_stay_positive():
    net = Zoo()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    x = torch.randn(4, 3, 6, 6)
    net(x).square().sum().backward()
    optimizer.step()
    moments = {id(p): optimizer.state[p]["exp_avg"] for p in net.parameters()}
    quantize_(net)
    optimizer.add_param_group(step_group(net, lr=10.0))
    assert optimizer.param_groups[-1]["weight_decay"] == 0
    before = [p.clone() for p in net.parameters()]
    for _ in range(5):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
        project_steps_(net)
        assert all((step >= MIN_STEP).all() for step in step_parameters(net))
    grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for old, parameter in zip(before, net.parameters(), strict=True):
        assert id(parameter) in grouped
        assert not torch.equal(old, parameter)
    assert all(moments[key] is optimizer.state[p]["exp_avg"] for p in net.parameters() if (key := id(p)) in moments)


@pytest.fixture
def launches(monkeypatch):
    """Takes the CPU for a GPU; tells how many weights each launch quantized, and how many layers one by one."""
    seen = {"together": [], "alone": 0}

    def together(values, *rest):
        seen["together"].append(len(values))
        return lsq_many(values, *rest)

    def alone(*args):
        seen["alone"] += 1
        return lsq(*args)

    monkeypatch.setattr(one_launch, "on_gpu", lambda value: True)
    monkeypatch.setattr(one_launch, "lsq_many", together)
    monkeypatch.setattr(quantizer, "fake_quantize", alone)
    return seen


def gradients(net, x):
    return torch.autograd.grad(net(x).square().sum(), [p for p in net.parameters() if p.requires_grad])


def test_a_gpu_quantizes_all_weights_in_one_launch(launches, monkeypatch):
    net, x = Zoo(), torch.randn(2, 3, 6, 6)
    quantize_(net, {"stem": 4, "left": 3, "right": 3})
    quantize_(net, {"shared": 5, "line": 8}, per_channel=False)
    net.stem.parametrizations.weight.original.requires_grad_(False)
    quantizers(net)["shared.weight"].step.requires_grad_(False)
    launches["alone"] = 0
    found = gradients(net, x)
    assert launches == {"together": [4], "alone": 0}  # tied weights are one, the shared layer runs twice
    copied = copy.deepcopy(net)
    monkeypatch.setattr(one_launch, "on_gpu", lambda value: False)
    for a, b in zip(found, gradients(net, x), strict=True):
        assert torch.equal(a, b)
    assert launches == {"together": [4], "alone": 6}
    monkeypatch.setattr(one_launch, "on_gpu", lambda value: True)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
        assert not torch.equal(copied(x), net(x))
    assert launches == {"together": [4, 4, 4], "alone": 6}
    assert net.state_dict().keys() == copied.state_dict().keys() and "prepared" not in str(net.state_dict().keys())


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_a_layer_alone_quantizes_by_itself(launches, error):
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 2)), torch.randn(4, 3)
    quantize_(net, 4)
    expected = net[0](x)
    if error is not None:  # in the middle of the network: no result of the launch survives an update of the weights

        def fail(module, args):
            raise error

        net[1].register_forward_pre_hook(fail)
        with pytest.raises(error):
            net(x)
        with torch.no_grad():
            net[0].parametrizations.weight.original.mul_(2)
            net[0].parametrizations.weight[0].step.mul_(2)
        expected = (expected - net[0].bias) * 2 + net[0].bias
    launches["alone"] = 0
    torch.testing.assert_close(net[0](x), expected)
    assert launches["alone"] == 1


def test_gradients_enabled_inside_no_grad(launches):
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 2)), torch.randn(4, 3)
    quantize_(net, 4)

    def enable(module, args):
        torch.set_grad_enabled(True)

    net[1].register_forward_pre_hook(enable)
    with torch.no_grad():
        out = net(x)
    out.sum().backward()
    assert net[1].parametrizations.weight.original.grad is not None
    assert net[0].parametrizations.weight.original.grad is None


def test_frozen_layers_stay_without_gradients(launches):
    """Else the whole network before a trained head would keep its activations, and run backward for nothing."""
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 2)), torch.randn(4, 3)
    quantize_(net, skip=[])
    net[0].requires_grad_(False)
    seen = []
    net[0].register_forward_hook(lambda module, args, output: seen.append(output))
    net(x).sum().backward()
    assert sorted(launches["together"]) == [1, 2]
    assert not seen[0].requires_grad
    assert all(parameter.grad is not None for parameter in net[1].parameters())


def test_half_precision_weights_go_one_by_one(launches):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    quantize_(net, 4)
    launches["alone"] = 0
    net.bfloat16()(torch.randn(4, 3).bfloat16())
    assert launches == {"together": [], "alone": 2}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_run_twice_alike(launches, monkeypatch, reentrant):
    class Checkpointed(Zoo):
        def forward(self, x):
            x = checkpoint(lambda x: torch.tanh(self.shared(torch.tanh(self.stem(x)))), x, use_reentrant=reentrant)
            return self.head(self.line(self.left(x).flatten(2)).mean(2))

    net, x = Checkpointed(), torch.randn(2, 3, 6, 6, requires_grad=True)
    quantize_(net, {"stem": 7, "shared": 7, "left": 7, "line": 7})
    launches["alone"] = 0
    net(x).sum().backward()
    found = {name: p.grad for name, p in net.named_parameters()}
    assert launches == {"together": [4], "alone": 4}  # two layers, two times
    net.zero_grad()
    monkeypatch.setattr(one_launch, "on_gpu", lambda value: False)
    net(x).sum().backward()
    for name, parameter in net.named_parameters():
        assert found[name] is parameter.grad is None or torch.equal(found[name], parameter.grad)


def test_threads_do_not_share_a_launch(launches):
    """Nor the autograd graph behind it."""
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(4, 3)
    quantize_(net, skip=[])
    launches["alone"] = 0
    other = []

    def call_from_thread(module, args):
        thread = threading.Thread(target=lambda: other.append(net[1](x)))
        thread.start()
        thread.join()

    net[0].register_forward_pre_hook(call_from_thread)
    net(x).sum().backward()
    other[0].sum().backward()
    assert launches == {"together": [2], "alone": 1}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # inside torch's own tracing
def test_launch_is_compiled_and_not_exported(monkeypatch):
    net, x = Zoo(), torch.randn(2, 3, 6, 6)
    quantize_(net)
    expected = gradients(net, x)
    monkeypatch.setattr(one_launch, "on_gpu", lambda value: True)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(a, b)
    monkeypatch.setattr(one_launch, "lsq_many", None)
    for strict in (False, True):
        exported = torch.export.export(net.eval(), (x,), strict=strict)
        assert len([n for n in exported.graph.nodes if n.target == torch.ops.qdeploy.lsq.default]) == 6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's own tracing
def test_a_compiled_layer_is_compiled_once(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    net, x = Zoo(), torch.randn(2, 3, 6, 6)
    quantize_(net)
    monkeypatch.setattr(one_launch, "on_gpu", lambda value: True)
    net.stem = torch.compile(net.stem, backend=backend)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for _ in range(3):
        net(x).square().sum().backward()
        optimizer.step()
    assert len(graphs) == 1


def test_initial_steps_of_gaussian_weights():
    """Steps and errors for N(0, 1), from the closed form 2*E|v|/sqrt(qmax) and from published optimal quantizers."""
    rows = torch.randn(2, 200_000)
    for bits, lsq_step, mse_step in [(8, 0.1416, 0.0308), (7, 0.2010, 0.0571), (4, 0.6031, 0.3380), (2, 1.596, 1.049)]:
        qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        assert initial_step(rows, qmin, qmax, "lsq").tolist() == pytest.approx([lsq_step] * 2, rel=0.01)
        assert initial_step(rows, qmin, qmax, "mse").tolist() == pytest.approx([mse_step] * 2, rel=0.03)


@pytest.mark.parametrize(("qmin", "qmax"), [(-8, 7), (-64, 63), (0, 15)])
def test_mse_step_is_the_best_of_a_fine_grid(qmin, qmax):
    rows = torch.randn(3, 400) * torch.tensor([[1.0], [0.01], [30.0]])
    rows = rows.abs() if qmin == 0 else rows
    largest = initial_step(rows, qmin, qmax, "minmax")
    step = initial_step(rows, qmin, qmax, "mse")

    def error(s):
        return (lsq(rows, s, qmin, qmax, 0, 1.0) - rows).double().square().sum(1)

    best = torch.stack([error(largest * k / 2000) for k in range(400, 2001)]).amin(0)
    assert (error(step) <= best * 1.02).all()


def squared_error(values, step, qmin, qmax):
    return np.square(np.rint(np.clip(values / step, qmin, qmax)) * step - values).sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("kind", ["gauss", "laplace", "student", "outlier"])
def test_mse_step_is_the_optimum_of_any_distribution(kind, bits):
    """Against brute force in numpy: 2,000 steps between 1/128 of the largest value's and 1.5 times it."""
    rng = np.random.default_rng(0)
    values = {
        "gauss": rng.normal(0, 0.02, 20_000),
        "laplace": rng.laplace(0, 0.02, 20_000),
        "student": rng.standard_t(4, 20_000) * 0.02,
        "outlier": np.append(rng.normal(0, 0.02, 20_000), 0.5),  # one weight of 25 standard deviations
    }[kind]
    values = values.astype(np.float32).astype(np.float64)
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    largest = max(values.max() / qmax, values.min() / qmin)
    best = min(squared_error(values, step, qmin, qmax) for step in largest * np.geomspace(2**-7, 1.5, 2000))
    step = initial_step(torch.from_numpy(values).float()[None], qmin, qmax, "mse").item()
    assert squared_error(values, step, qmin, qmax) <= 1.0005 * best


def test_mse_step_may_be_larger_than_that_which_clips_nothing():
    rows = torch.tensor([[-1.05] * 100 + [1.0]])  # codes -2, -1, 0, 1: only 1 has to hold the 1.0
    assert initial_step(rows, -2, 1, "minmax").item() == 1
    assert initial_step(rows, -2, 1, "mse").item() == pytest.approx((100 * 1.05 + 1) / 101, rel=1e-4)


def test_minmax_clips_nothing():
    rows = torch.tensor([[-8.0, 3.0], [1.0, 7.0], [0.0, 0.0]])
    step = initial_step(rows, -8, 7, "minmax")
    assert step.tolist() == [1.0, 1.0, pytest.approx(MIN_STEP)]
    assert lsq_codes(rows, step, -8, 7, 0).tolist() == [[-8, 3], [1, 7], [0, 0]]


def test_a_channel_of_zeros_gives_zeros():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2))
    with torch.no_grad():
        net[0].weight[1] = 0
    for init in ("lsq", "mse", "minmax"):
        copied = copy.deepcopy(net)
        quantize_(copied, init=init)
        assert copied[0].weight[1].eq(0).all()
        assert copied[0].weight[0].ne(0).any()


def test_gradient_scales():
    for mode, scale in [("tensor", (8 * 27 * 63) ** -0.5), ("channel", (27 * 63) ** -0.5), ("none", 1)]:
        net = Zoo()
        quantize_(net, 7, grad_scale=mode)
        assert quantizers(net)["stem.weight"].grad_scale == pytest.approx(scale)


def test_summary_tells_bits_and_error():
    net = Zoo()
    quantize_(net, 7, 8, calibration=[torch.randn(2, 3, 6, 6)], init="mse")
    rows = {row.name: row for row in summary(net)}
    assert list(rows) == ["stem", "shared", "left", "right", "line"]
    stem = rows["stem"]
    assert (stem.shape, stem.bits, stem.input_bits) == ((8, 3, 3, 3), 7, 8)
    assert stem.step == pytest.approx(stem.mse_step)
    assert 0 < stem.error < 0.02 and 0 <= stem.clipped < 0.1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"weight_bits": 9}, "expected 2 to 8 bits, got 9 - at layer `stem`"),
        ({"weight_bits": {"stem": 1}}, "expected 2 to 8 bits, got 1 - at layer `stem`"),
        ({"weight_bits": {"stme": 4}}, "expected names of convolutions or linear layers, got stme - at quantize_"),
        ({"skip": ["nothing"]}, "got nothing - at quantize_"),
        ({"weight_bits": {"stem": 4}, "skip": ["line"]}, "got both - at quantize_"),
        ({"init": "best"}, "expected init lsq, mse or minmax, got 'best'"),
        ({"grad_scale": "x"}, "expected grad_scale tensor, channel or none, got 'x'"),
        ({"activation_bits": 8}, "expected calibration batches for quantized activations, got none"),
        ({"activation_bits": 16, "calibration": []}, "expected 2 to 8 bits, got 16 - at activation_bits"),
        ({"activation_bits": 8, "calibration": []}, "expected at least one image, got none - at the calibration data"),
    ],
)
def test_errors_name_the_layer(arguments, text):
    with pytest.raises(InputError, match=text):
        quantize_(Zoo(), **arguments)


def test_quantizing_twice_is_an_error():
    net = Zoo()
    quantize_(net)
    with pytest.raises(InputError, match="got one quantized before - at layer `stem`"):
        quantize_(net)


PUBLISHED = {  # parameters for 1000 classes and 3 channels, as torchvision documents them
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "resnext50_32x4d": 25_028_904,
    "mobilenet_v2": 3_504_872,
    "vgg16_bn": 138_365_992,
    "densenet121": 7_978_856,
}
STATE_NAMES = {  # a deep name of each kind, from torchvision's checkpoints
    "resnet18": ["conv1.weight", "layer4.1.bn2.running_var", "layer2.0.downsample.0.weight", "fc.bias"],
    "resnet50": ["layer1.0.downsample.1.num_batches_tracked", "layer3.5.conv3.weight", "layer4.2.bn3.bias"],
    "resnext50_32x4d": ["layer1.0.conv2.weight"],
    "mobilenet_v2": ["features.0.0.weight", "features.1.conv.0.0.weight", "features.1.conv.1.weight",
                     "features.17.conv.3.running_mean", "features.18.1.weight", "classifier.1.bias"],
    "vgg16_bn": ["features.0.bias", "features.41.running_mean", "classifier.0.weight", "classifier.6.bias"],
    "densenet121": ["features.conv0.weight", "features.denseblock4.denselayer16.conv2.weight",
                    "features.transition3.conv.weight", "features.norm5.bias", "classifier.weight"],
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_the_published_size_and_names(name):
    with torch.device("meta"):
        net = MODELS[name](1000)
        assert sum(p.numel() for p in net.parameters()) == PUBLISHED[name]
        assert set(STATE_NAMES[name]) <= set(net.state_dict())
        size = 32 if name != "vgg16_bn" else 64
        assert net(torch.zeros(2, 3, size, size)).shape == (2, 1000)


@pytest.mark.parametrize(
    ("depth", "width", "channels", "count"),
    [(2, 2, 1, 34_380), (2, 2, 3, 35_280), (2, 1, 3, 9_530), (2, 8, 3, 531_030), (4, 10, 3, 2_205_780)],
)
def test_nin_has_the_published_size(depth, width, channels, count):
    with torch.device("meta"):
        net = MODELS["nin"](10, channels, depth=depth, width=width)
    assert sum(p.numel() for p in net.parameters()) == count


@torch.no_grad()
def randomize_(net: nn.Module, seed: int, shape: tuple[int, ...]) -> nn.Module:
    """Gives a network weights as if trained: random weights, BatchNorm gains in [0.5, 1.5] and shifts, and running
    statistics that match the activations of a random batch of `shape`, so that nothing grows, dies or saturates on the
    way. Returns the network in eval mode."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.05)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [m.momentum for m in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = 1.0
        net.train()(torch.randn(shape))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return net.eval()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_random_networks_keep_their_activations_in_scale(name):
    net = randomize_(MODELS[name](10), seed=1, shape=(2, 3, 96, 96))
    again = randomize_(MODELS[name](10), seed=1, shape=(2, 3, 96, 96))
    x = torch.randn(2, 3, 96, 96)
    spread = []
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda module, args, out: spread.append(out.std().item()))
    with torch.no_grad():
        assert torch.equal(net(x), again(x))
    assert 0.3 < min(spread) and max(spread) < 5
