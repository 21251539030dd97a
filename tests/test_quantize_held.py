"""quantize_ on networks as people hold them: it does all of it, or says why not in one line and changes nothing."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import qdeploy
from qdeploy.errors import ExportError, InputError
from qdeploy.networks.quantizable import classifier
from qdeploy.training import project_steps_, quantize_, quantize_like_, quantizers, step_group, summary
from qdeploy.training.attached_quantizers import step_parameters
from qdeploy.training.quantizer import Quantizer

torch.set_num_threads(1)
X = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


def small():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )


# ---- Weights that are computed ------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A parametrization without an inverse, with a Parameter of its own."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, weight):
        return weight * self.gain


def scaled(layer):
    return parametrize.register_parametrization(layer, "weight", Scaled())


def twice(layer):
    return scaled(parametrizations.weight_norm(layer))


def bias_only(layer):
    return parametrize.register_parametrization(layer, "bias", Scaled())


COMPUTED = [
    *(parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal),
    *(scaled, twice, bias_only, lambda layer: layer),
]


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.sampled_from(COMPUTED), min_size=2, max_size=6),
    st.integers(5, 8),
    st.booleans(),
    st.booleans(),
)
def test_every_layer_has_a_quantizer_of_its_own(kinds, bits, per_channel, training):
    """And the error of its weight is that of its own grid, whatever the gains of the other layers are."""
    layers = [kind(nn.Conv2d(8, 8, 3)) for kind in kinds]
    with torch.no_grad():
        for i, layer in enumerate(layers):
            for name, parameter in layer.named_parameters():
                if name.endswith(("original0", "gain")):
                    parameter.mul_(30 ** (i % 3 - 1))
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 2)).train(training)
    before = copy.deepcopy(net).eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modules = list(net.modules())
    quantize_(net, bits, per_channel=per_channel, init="minmax")
    assert all(torch.equal(net.state_dict()[name.replace("weight", "parametrizations.weight.original")], value)
               if name not in net.state_dict() else torch.equal(net.state_dict()[name], value)
               for name, value in state.items())  # fmt: skip
    found = quantizers(net)
    assert len({id(quantizer) for quantizer in found.values()}) == len(layers)
    assert all(module.training is training for module in modules)
    net.eval()
    with torch.no_grad():
        for i, row in enumerate(summary(net)):
            weight, quantizer = before[i].weight, found[f"{i}.weight"]
            assert net[i].parametrizations.weight[-1] is quantizer  # nothing comes after it
            half = quantizer.step.reshape(-1, *[1] * (weight.dim() - 1)) / 2
            assert ((net[i].weight - weight).abs() <= half * 1.0001).all()
            assert row.error == pytest.approx(((net[i].weight - weight).norm() / weight.norm()).item(), rel=1e-4)
            assert row.shape == tuple(weight.shape) and row.clipped <= 0.01


def test_a_shared_computed_weight_has_one_quantizer():
    left, right = scaled(nn.Linear(4, 4)), nn.Linear(4, 4)
    right.weight = left.parametrizations.weight.original
    parametrize.register_parametrization(right, "weight", left.parametrizations.weight[0])
    other = nn.Linear(4, 4)
    other.weight = left.parametrizations.weight.original  # the same Parameter, used without the scale
    net = nn.Sequential(left, right, other, nn.Linear(4, 2))
    quantize_(net, 5)
    found = quantizers(net)
    assert found["0.weight"] is found["1.weight"] is not found["2.weight"]
    assert torch.equal(net[0].weight, net[1].weight)


def test_a_weight_shared_with_a_quantized_layer_keeps_its_quantizer():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    net[1].weight = net[0].weight
    with pytest.raises(
        InputError, match="the same bits for layers that share a weight, got 5 for `0` and 4 - at layer `1`"
    ):
        quantize_(net, {"0": 5, "1": 4})
    quantize_(net, {"0": 5})
    with pytest.raises(InputError, match="got 5 for `0` and 4 - at layer `1`"):
        quantize_(net, {"1": 4})
    quantize_(net, {"1": 5})
    assert quantizers(net)["0.weight"] is quantizers(net)["1.weight"]


@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_train_and_export(kind, tmp_path):
    net = small()
    net[0], net[4] = (
        kind(layer) if layer.bias is not None or kind is not bias_only else layer for layer in (net[0], net[4])
    )
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    quantize_(net, 6, 8, calibration=X)
    optimizer.add_param_group(step_group(net, 0.01))
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    net(X).square().sum().backward()
    optimizer.step()
    project_steps_(net)
    moved = {name for name, parameter in net.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for name in before if "step" in name or "weight.original" in name} <= moved
    report = qdeploy.export(net, X[:1], tmp_path / "net.safetensors", X)
    assert report.output_sqnr_db > 25


# ---- All or nothing -----------------------------------------------------------------------------------------------


class Fails(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        torch.rand(1)
        raise self.error


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return x + 0 * torch.rand(1)


def busy():
    """A network with all that could be disturbed: hooks, modes of its own, other parametrizations, tied weights."""
    net = small()
    net[1].eval()
    net[4] = parametrizations.spectral_norm(net[4])
    net.insert(0, Counts())
    net.insert(1, parametrizations.weight_norm(nn.Conv2d(3, 3, 1)))
    net[2].register_forward_hook(lambda module, args, output: None)
    net[2].weight.requires_grad_(False)
    return net


def fingerprint(net):
    """All of a network that quantize_ might change, and the random numbers."""
    modules = [
        (name, id(module), type(module), module.training, sorted(vars(module)), list(module._parameters),
         list(module._modules), {key: dict(value) for key, value in vars(module).items() if "hooks" in key})
        for name, module in net.named_modules()
    ]  # fmt: skip
    tensors = [
        (name, id(t), t.requires_grad, t.tolist()) for name, t in (*net.named_parameters(), *net.named_buffers())
    ]
    return modules, tensors, list(net.state_dict()), torch.get_rng_state().tolist()


def interrupted():
    yield X
    raise KeyboardInterrupt


FAILURES = {
    "2 to 8 bits, got 9 - at layer": dict(weight_bits=9),
    "2 to 8 bits, got True - at layer": dict(weight_bits=True),
    "2 to 8 bits, got 7.0 - at layer": dict(weight_bits=7.0),
    "2 to 8 bits, got 1 - at layer `6`": dict(weight_bits={"2": 4, "6": 1}),
    "2 to 8 bits, got 16 - at activation_bits": dict(activation_bits=16, calibration=X),
    "2 to 8 bits, got True - at activation_bits": dict(activation_bits=True, calibration=X),
    "convolutions or linear layers, got 3, fc - at quantize_": dict(weight_bits={"3": 4, "fc": 4}),
    "convolutions or linear layers, got 4 - at quantize_": dict(skip=4),
    r"convolutions or linear layers, got 4, \['0'\] - at quantize_": dict(skip=[4, ["0"]]),
    "convolutions or linear layers, got 6 - at quantize_": dict(weight_bits={6: 4}),
    "expected a convolution or linear layer to quantize, got none but what is left alone": dict(weight_bits={}),
    "expected init lsq, mse or minmax, got None": dict(init=None),
    "expected grad_scale tensor, channel or none, got 1": dict(grad_scale=1),
    "calibration batches for quantized activations, got none": dict(activation_bits=8),
    "at least one image, got none": dict(activation_bits=8, calibration=iter([])),
    "an array .* or an iterable of batches, got int": dict(activation_bits=8, calibration=8),
    "expected float32 images, got int64": dict(activation_bits=8, calibration=[X.long()]),
    "finite numbers, got NaN or infinity - at batch 1": dict(activation_bits=8, calibration=[X, X / 0]),
    r"inputs that the network takes, got RuntimeError: Given .* - at batch 0 of .*, \[32, 5, 12, 12\]":
        dict(activation_bits=8, calibration=[torch.zeros(32, 5, 12, 12)]),
    r"inputs \[N, C, ...\] in calibration, got one without a batch, \[3, 12, 12\] - at layer `1`":
        dict(activation_bits=8, calibration=list(X)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:expected a network that qdeploy.export can write")
@pytest.mark.parametrize("text", FAILURES)
def test_an_error_changes_nothing(text):
    net = busy()
    before = fingerprint(net)
    with pytest.raises(InputError, match=text) as error:
        quantize_(net, **FAILURES[text])
    assert "\n" not in str(error.value)
    assert fingerprint(net) == before


@pytest.mark.filterwarnings("ignore:expected a network that qdeploy.export can write")
@pytest.mark.parametrize("error", [ValueError("first line\nsecond line"), InputError("its own"), KeyboardInterrupt()])
def test_an_error_of_the_network_changes_nothing(error):
    net = busy().append(Fails(error))
    before = fingerprint(net)
    text = {ValueError: "got ValueError: first line - at batch 0"}.get(type(error), f"^{error}$")
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else InputError, match=text) as raised:
        quantize_(net, 7, 8, calibration=X)
    assert "\n" not in str(raised.value)
    assert fingerprint(net) == before
    del net[-1]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    quantize_(net, 7, 8, calibration=X)  # the cell of the notebook, run again
    optimizer.add_param_group(step_group(net, 0.1))
    net(X).sum().backward()
    optimizer.step()


def test_an_interrupt_while_data_are_read_changes_nothing():
    net = busy()
    before = fingerprint(net)
    with pytest.raises(KeyboardInterrupt):
        quantize_(net, 7, 8, calibration=interrupted())
    assert fingerprint(net) == before


def test_a_warning_that_is_an_error_changes_nothing():
    net = nn.Sequential(nn.Conv1d(3, 4, 1), nn.RMSNorm(4), nn.Flatten(), nn.Linear(4, 2))
    before = fingerprint(net)
    with pytest.raises(UserWarning):
        quantize_(net)
    assert fingerprint(net) == before


def test_success_leaves_buffers_modes_and_random_numbers():
    net = busy()
    before = fingerprint(net)
    np.random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(net, 7, 8, calibration=DataLoader(TensorDataset(X), batch_size=8, shuffle=True))
    after = fingerprint(net)
    kept = {name: rest for name, *rest in after[1]}
    for name, *rest in before[1]:
        assert kept.get(name, kept.get(name.replace("weight", "parametrizations.weight.original"))) == rest
    assert [entry[3] for entry in before[0]] == [entry[3] for entry in after[0] if entry[0] in dict(net.named_modules())
                                                and entry[0] in {e[0] for e in before[0]}]  # fmt: skip
    assert before[3] == after[3]


# ---- Weights that cannot be quantized -----------------------------------------------------------------------------


def with_weight(weight):
    net = small()
    net[4].weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    return net


def hooked(old):
    net = small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        net[4] = old(net[4])
    return net


def pruned():
    net = small()
    prune.l1_unstructured(net[4], "weight", 0.5)
    return net


def tampered():
    net = small()
    weight = net[4].weight
    del net[4].weight
    net[4].weight = weight.detach() * 2
    return net


REFUSED = {
    r"pruned: make that permanent with torch.nn.utils.prune.remove\(layer, 'weight'\)": pruned,
    r"of weight_norm: end that with torch.nn.utils.remove_weight_norm\(layer\)": lambda: hooked(nn.utils.weight_norm),
    r"of spectral_norm: end that with torch.nn.utils.remove_spectral_norm\(layer\)":
        lambda: hooked(nn.utils.spectral_norm),
    "got one that is computed elsewhere": tampered,
    r"a dense float weight with values, got int8 \[8, 8, 3, 3\]": lambda: with_weight(torch.ones(8, 8, 3, 3).char()),
    "got complex64": lambda: with_weight(torch.ones(8, 8, 3, 3) + 0j),
    r"got float32 \[0, 8, 3, 3\]": lambda: with_weight(torch.ones(0, 8, 3, 3)),
    r"got meta float32 \[8, 8, 3, 3\]": lambda: with_weight(torch.ones(8, 8, 3, 3, device="meta")),
    "finite weights, got NaN or infinity": lambda: with_weight(torch.full((8, 8, 3, 3), float("nan"))),
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_weights_that_cannot_be_quantized(text):
    net = REFUSED[text]()
    before = list(net.state_dict()), [type(module) for module in net.modules()]
    with pytest.raises(InputError, match=f"{text}.* - at layer `4`") as error:
        quantize_(net, 7, 8, calibration=X)
    assert "\n" not in str(error.value)
    assert (list(net.state_dict()), [type(module) for module in net.modules()]) == before


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_are_named():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LazyLinear(3))
    with pytest.raises(InputError, match="with shapes, got a lazy one .run the network once. - at `2.weight`"):
        quantize_(net, 7)
    net(torch.zeros(1, 4))
    quantize_(net, 7)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_is_no_network():
    for wrong, kind in (
        (None, "NoneType"),
        ([small()], "list"),
        (torch.jit.trace(small().eval(), X), "TopLevelTraced"),
    ):
        with pytest.raises(InputError, match=f"expected a torch.nn.Module in Python, got {kind}.* - at quantize_"):
            quantize_(wrong)
    with pytest.raises(InputError, match="a network that will train, got torch.inference_mode"), torch.inference_mode():
        quantize_(small())


def test_networks_without_layers():
    with pytest.raises(InputError, match="convolutions or linear layers, got none - at ReLU"):
        quantize_(nn.ReLU())
    with pytest.raises(InputError, match=r"to quantize, got none but what is left alone \(fc\) - at quantize_"):
        quantize_(nn.ModuleDict({"fc": nn.Linear(4, 3)}))
    net = nn.ModuleDict({"fc": nn.Linear(4, 3)})
    quantize_(net, skip=[])
    assert list(quantizers(net)) == ["fc.weight"]


def test_numbers_and_names_as_people_hold_them():
    net = small()
    quantize_(net, np.int64(5), np.uint8(6), skip="9", calibration=X)
    assert {(q.bits, type(q.qmin)) for key, q in quantizers(net).items() if "weight" in key} == {(5, int)}
    assert {q.bits for key, q in quantizers(net).items() if "input" in key} == {6}
    net = small()
    quantize_(net, {"0": np.int32(3)})
    assert quantizers(net)["0.weight"].bits == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_train(dtype):
    net = small().to(dtype)
    expected = r"float32 parameters \(call net.float\(\)\), got " + str(dtype).removeprefix("torch.")
    with pytest.warns(UserWarning, match=expected):  # it trains, and export says what to do
        quantize_(net, 7, 8, calibration=X)
    net(X.to(dtype)).square().mean().backward()
    assert all(step.grad.isfinite().all() and step.dtype == torch.float32 for step in step_parameters(net))
    assert net[0].weight.dtype == dtype


# ---- Wrapped networks ---------------------------------------------------------------------------------------------


def compiled_inside(net):
    net[0] = torch.compile(net[0], backend="eager")
    return net


WRAPPERS = {
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "compiled layer": compiled_inside,
    "compiled in place": lambda net: (net.compile(backend="eager"), net)[1],
    "data-parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "twice": lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's own tracing
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_networks(wrapper):
    plain, net = small(), WRAPPERS[wrapper](small())
    quantize_(plain, 5, 8, calibration=X)
    steps = quantize_(net, 5, 8, calibration=X)
    assert list(quantizers(net)) == list(quantizers(plain)) == ["0.weight", "0.input", "4.weight", "4.input"]
    assert [row.name for row in summary(net)] == ["0", "4"]
    assert {id(step) for step in step_group(net, 1.0)["params"]} == {id(step) for step in steps}
    with torch.no_grad():
        steps[0].fill_(-1)
    project_steps_(net)
    assert steps[0].min() > 0
    with pytest.raises(InputError, match="got one quantized before - at layer `0`"):
        quantize_(net, {"0": 4})


def test_a_failure_in_a_wrapped_network_changes_nothing():
    for wrap in WRAPPERS.values():
        net = wrap(small())
        before = list(net.state_dict()), [type(module) for module in net.modules()]
        with pytest.raises(InputError):
            quantize_(net, 7, 8, calibration=[X, X[:, :1]])
        assert (list(net.state_dict()), [type(module) for module in net.modules()]) == before


def test_distributed_data_parallel_comes_afterwards(tmp_path):
    """Its reducer knows the parameters that were there when it was made; the step sizes would drift apart."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net, other = small(), small()
        wrapped = nn.parallel.DistributedDataParallel(net)
        for held in (wrapped, nn.Sequential(nn.Linear(4, 4), net[4:])):
            with pytest.raises(
                InputError, match=r"before DistributedDataParallel \(quantize first, wrap afterwards\), got"
            ):
                quantize_(held, 7)
        assert quantizers(net) == {}
        quantize_(other, 7)
        wrapped = nn.parallel.DistributedDataParallel(other)
        assert list(quantizers(wrapped)) == ["0.weight", "4.weight"]
        quantize_(net, 7)  # nothing holds it any more
    finally:
        torch.distributed.destroy_process_group()


# ---- Calibration --------------------------------------------------------------------------------------------------


def test_calibration_in_any_form_gives_the_same_steps():
    forms = {
        "list of batches": [X],
        "tensor": X,
        "array": X.double().numpy(),
        "pair": (X, torch.zeros(32)),
        "dicts": [{"image": X.numpy(), "label": 3}],
        "dataset": TensorDataset(X, torch.zeros(32)),
        "loader": DataLoader(TensorDataset(X), batch_size=32),
    }
    found = {}
    for form, data in forms.items():
        torch.manual_seed(0)
        net = small()
        quantize_(net, 7, 8, calibration=data)
        found[form] = [step.tolist() for step in step_parameters(net)]
    assert all(steps == found["list of batches"] for steps in found.values())


def test_calibration_stops_after_four_batches():
    source = itertools.repeat(X)
    quantize_(small(), 7, 8, calibration=source)
    read = iter([X] * 9)
    quantize_(small(), 7, 8, calibration=read)
    assert len(list(read)) == 5


def test_a_network_may_change_its_input_in_place():
    net = nn.Sequential(nn.ReLU(inplace=True), *small())
    data = X.clone()
    quantize_(net, 7, 8, calibration=[data])
    assert torch.equal(data, X)
    frozen = X.numpy().copy()
    frozen.flags.writeable = False
    quantize_(small(), 7, 8, calibration=[frozen])


class Overflows(nn.Module):
    def forward(self, x):
        return x / 0


@pytest.mark.filterwarnings("ignore:expected a network that qdeploy.export can write")
def test_inputs_of_layers_are_finite():
    with pytest.raises(InputError, match="finite inputs in calibration, got NaN or infinity - at layer `1`"):
        quantize_(nn.Sequential(Overflows(), *small()), 7, 8, calibration=X)


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(input=self.conv(input=x).mean((2, 3)))


def test_layers_may_get_their_input_by_name(tmp_path):
    net = ByName()
    quantize_(net, 6, 8, skip=[], calibration=X)
    net(X).sum().backward()
    assert all(step.grad is not None for step in step_parameters(net)) and len(step_parameters(net)) == 4
    assert qdeploy.export(net, X[:1], tmp_path / "net.safetensors", X).output_sqnr_db > 30


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (torch.ones(8, 3, 12, 12), "hold nothing but the number 1"),
        (torch.rand(1, 3, 12, 12).repeat(8, 1, 1, 1), "all the same"),
    ],
)
def test_calibration_that_says_nothing(data, words):
    with pytest.warns(UserWarning, match=f"the 8 images .*{words}: ranges .* fit no others - at the calibration data"):
        quantize_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(800, 5)), 7, 8, calibration=data)


def test_inputs_that_are_all_zero_are_named():
    with pytest.warns(UserWarning, match=r"not all zero \(.* 1e-8\), got zeros - at layer `0`, `4`$") as found:
        quantize_(small(), 7, 8, calibration=X * 0)
    assert len(found) == 1 and found[0].filename == __file__


def test_layers_that_are_never_called_are_named():
    net = small()
    net.forward = lambda x: net[0](x)
    with pytest.raises(InputError, match=r"\(skip those that the network does not call\), got no input - at layer `4`"):
        quantize_(net, 7, 8, calibration=X)


# ---- Which networks can be exported -------------------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.line, self.norm, self.fc = nn.LocalResponseNorm(2), nn.RMSNorm(144), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.norm(self.line(self.stem(x)).flatten(2)).mean(2))


def test_what_cannot_be_exported_is_said_at_once():
    """By the types of layers, or where there are calibration data by a trace: a layer that is not used is no matter."""
    with pytest.warns(UserWarning) as found:
        quantize_(Odd(), 7)
    assert [str(one.message) for one in found] == [
        "expected a network that qdeploy.export can write (this one only trains), got `line` (LocalResponseNorm); "
        "`norm` (RMSNorm) - at quantize_"
    ]
    assert found[0].filename == __file__
    with pytest.warns(UserWarning, match="got a refusal: .*`line`.*`norm`.* - at quantize_") as found:
        quantize_(Odd(), 7, 8, calibration=X)
    assert len(found) == 1
    net = small()
    net.unused = nn.RMSNorm(3)
    net.forward = lambda x: nn.Sequential(*list(net)[:-1])(x)
    quantize_(net, 7, 8, skip=["9"], calibration=X)


# ---- The layer that is left alone ---------------------------------------------------------------------------------


class Heads(nn.Module):
    """As distilled transformers have them: two heads, of which the mean is the output."""

    def __init__(self, use):
        super().__init__()
        self.body, self.head, self.head_dist = nn.Linear(8, 16), nn.Linear(16, 5), nn.Linear(16, 5)
        self.use = use

    def forward(self, x):
        x = self.body(x).relu()
        return {"both": (self.head(x) + self.head_dist(x)) / 2, "first": self.head(x)}[self.use]


class Reversed(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(16, 5), nn.Linear(8, 16)

    def forward(self, x):
        return self.head(self.body(x).relu())


class Own(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (lambda: Heads("both"), {"body": (5, "learned"), "head": (5, "learned"), "head_dist": (8, "rounded")}),
        (lambda: Heads("first"), {"body": (5, "learned"), "head": (5, "learned")}),
        (Reversed, {"head": (5, "learned"), "body": (8, "rounded")}),
        (lambda: nn.Sequential(nn.Linear(8, 8), Own(8, 3)), {"0": (5, "learned"), "1.linear": (8, "rounded")}),
        (lambda: nn.DataParallel(Heads("both")),
         {"body": (5, "learned"), "head": (5, "learned"), "head_dist": (8, "rounded")}),
    ],
)  # fmt: skip
def test_what_quantize_leaves_alone_export_takes(net, expected, tmp_path):
    net, x = net(), torch.randn(16, 8)
    quantize_(net, 5)
    report = qdeploy.export(net, x[:1], tmp_path / "net.safetensors", x)
    assert {layer.name: (layer.bits, layer.quantizer) for layer in report.layers if layer.quantizer} == expected


def test_export_takes_nothing_else(tmp_path):
    net, x = Heads("both"), torch.randn(16, 8)
    assert classifier(net) == "head_dist"
    quantize_(net, 5, skip=["head"])
    with pytest.raises(ExportError, match="got a float32 weight - at weight of module `head`"):
        qdeploy.export(net, x[:1], tmp_path / "net.safetensors", x)
    for bare in (nn.Linear(8, 5), Own(8, 5)):
        assert qdeploy.export(bare, x[:1], tmp_path / "net.safetensors", x).layers[-1].quantizer == "rounded"


# ---- States -------------------------------------------------------------------------------------------------------


RANGES = [(qmin, qmin + 2**bits - 1) for bits in range(2, 9) for qmin in (0, -(2 ** (bits - 1)))]


def averaged(states, how, dtype):
    """As soups and moving averages compute it, of states that were stored in `dtype`, and stored so again."""
    terms = [{name: value.to(dtype).float() for name, value in state.items()} for state in states]
    average = terms[0]
    for term in terms[1:]:
        average = {name: 0.9 * average[name] + 0.1 * term[name] for name in term}
    if how == "mean":
        average = {name: torch.stack([term[name] for term in terms]).mean(0) for name in average}
    elif how == "sum":
        average = {name: sum(term[name] / len(terms) for term in terms) for name in average}
    return {name: value.to(dtype) for name, value in average.items()}


@given(
    st.lists(st.sampled_from(RANGES), min_size=1, max_size=8),
    st.integers(2, 20),
    st.sampled_from(["mean", "sum", "moving"]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_average_of_equal_states_is_that_state(ranges, count, how, dtype):
    made = [Quantizer(torch.ones(()), *found, 0.01, bundle) for bundle, found in enumerate(ranges)]
    state = nn.ModuleList(made).state_dict()
    other = nn.ModuleList([Quantizer(torch.zeros(()), -2, 1, 9.0) for _ in ranges])
    other.load_state_dict(averaged([state] * count, how, dtype))
    values = torch.linspace(-300, 300, 1201) + 0.123  # none halfway between two codes
    for a, b in zip(made, other, strict=True):
        assert (a.qmin, a.qmax, a.bundle) == (b.qmin, b.qmax, b.bundle)
        assert b.grad_scale == pytest.approx(0.01, rel=0.01)
        assert torch.equal(a.codes(values), b.codes(values))


@given(
    st.lists(st.sampled_from(RANGES), min_size=2, max_size=12).filter(lambda ranges: len(set(ranges)) > 1),
    st.sampled_from(["mean", "sum"]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_average_of_different_ranges_is_refused(ranges, how, dtype):
    states = [nn.ModuleList([Quantizer(torch.ones(()), *found, 0.01)]).state_dict() for found in ranges]
    other = nn.ModuleList([Quantizer(torch.zeros(()), -2, 1, 9.0)])
    with pytest.raises(InputError, match="state of a quantizer of 2 to 8 bits, got .* - at quantizer `0`") as error:
        other.load_state_dict(averaged(states, how, dtype))
    assert "\n" not in str(error.value)
    assert (other[0].step, other[0].qmin, other[0].qmax) == (0, -2, 1)


def test_a_soup_of_networks_keeps_their_ranges():
    nets = [small() for _ in range(4)]
    for net in nets:
        quantize_(net, 5)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(nets[0].get_parameter(next(n for n, p in net.named_parameters() if p is parameter)))
    state = averaged([net.state_dict() for net in nets], "mean", torch.float32)
    nets[1].load_state_dict(state)
    assert torch.equal(nets[1].eval()(X), nets[0].eval()(X))
    quantize_(other := small(), 4)
    with pytest.raises(InputError, match="- at quantizer `0.parametrizations.weight.0`"):
        nets[1].load_state_dict(averaged([nets[0].state_dict(), other.state_dict()], "mean", torch.float32))


@pytest.mark.parametrize(
    "wrong",
    [
        [-64, 191, 7, 0.1, 0], [0, 0, 2, 0.1, 0], [-1, 0, 2, 0.1, 0], [-256, 255, 9, 0.1, 0], [-64, 63, 7, 0, 0],
        [-64, 63, 7, -1, 0], [-64, 63, 7, float("nan"), 0], [float("inf"), 63, 7, 1, 0], [-63.3, 62.3, 7, 1, 0],
        [-64, 63, 7, 1, 0.5], [-64, 63, 7, 1, -1], [-64, 63, 6, 1, 0], [-64, 63, 1], [-64, 63, 7, 1, 0, 0],
    ],
)  # fmt: skip
def test_what_is_no_range_is_refused(wrong):
    with pytest.raises(InputError, match="expected the state of a quantizer of 2 to 8 bits, got .* - at a quantizer"):
        Quantizer(torch.ones(()), -8, 7, 1.0).set_extra_state(torch.tensor(wrong, dtype=torch.float64))
    with pytest.raises(InputError, match="got NoneType - at a quantizer"):
        Quantizer(torch.ones(()), -8, 7, 1.0).set_extra_state(None)


class Residual(nn.Module):
    """Two layers read one tensor, and two share a weight."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.right.weight = self.left.weight
        self.norm = parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).clamp(0, 6)
        return self.fc(self.norm((self.left(x) + self.right(x)).clamp(0, 6)).mean((2, 3)))


@pytest.mark.parametrize("activation_bits", [None, 6])
def test_a_state_brings_its_quantizers(activation_bits, tmp_path):
    """Also which layers read one tensor: equal step sizes do not tell, as after two clamps to [0, 6]."""
    net = Residual()
    quantize_(net, {"stem": 8, "left": 3, "right": 3}, activation_bits, init="minmax", calibration=X * 9)
    quantize_(net, {"norm": 4}, activation_bits, init="minmax", calibration=X * 9)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other = Residual()
    parameters = {name: id(parameter) for name, parameter in other.named_parameters()}
    steps = quantize_like_(other, torch.load(tmp_path / "net.pt"))
    assert torch.equal(other.eval()(X), net.eval()(X))
    assert len(steps) == len(step_parameters(net)) == (3 if activation_bits is None else 6)
    for found in (quantizers(net), quantizers(other)):
        assert found["left.weight"] is found["right.weight"]
        if activation_bits:
            assert found["left.input"] is found["right.input"] is not found["norm.input"]
    assert id(other.stem.parametrizations.weight.original) == parameters["stem.weight"]
    assert other.state_dict().keys() == net.state_dict().keys()


def test_states_of_wrapped_networks_fit():
    net = small()
    quantize_(net, 5, 8, calibration=X)
    for state in (
        nn.DataParallel(AveragedModel(net)).state_dict(),
        {f"_orig_mod.{k}": v for k, v in net.state_dict().items()},
    ):
        other = small()
        quantize_like_(nn.DataParallel(other), state)
        assert torch.equal(other.eval()(X), net.eval()(X))


def test_states_that_do_not_fit_change_nothing():
    net, wide = small(), small()
    wide[0] = nn.Conv2d(3, 16, 3)
    for other in (net, wide):
        quantize_(other, 7, 8, calibration=X) if other is net else quantize_(other, {"0": 7})
    state = net.state_dict()
    for text, wrong in {
        "expected the state of a quantized network, got no quantizers in it": small().state_dict(),
        "expected a state dict, got list - at quantize_like_": [],
        r"one step size, or one for each of 8 channels, got shape \[16\] - at layer `0`": wide.state_dict(),
        r"state of a Sequential, got 0.weight too much - at": {**state, "0.weight": torch.ones(1)},
        r"got 9.weight \[4, 8\] - at": {**state, "9.weight": torch.ones(4, 8)},
        "got no 1.bias - at": {name: value for name, value in state.items() if name != "1.bias"},
        "a quantizer of 2 to 8 bits.*at quantizer `4.input_quantizer`": {
            **state, "4.input_quantizer._extra_state": torch.tensor([0.0, 200.0, 8.0, 1.0, 0.0])},
    }.items():  # fmt: skip
        fresh = small()
        before = fingerprint(fresh)
        with pytest.raises(InputError, match=text) as error:
            quantize_like_(fresh, wrong)
        assert "\n" not in str(error.value)
        assert fingerprint(fresh) == before


# ---- docs/training.md ------------------------------------------------------------------------------------------------


def blocks_of_the_docs():
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_the_lines_of_the_docs_run(tmp_path, monkeypatch):
    """One block after the other, with a network and an optimizer as a reader would have them."""
    monkeypatch.chdir(tmp_path)
    train, equalize, schedule, save, distribute = blocks_of_the_docs()
    net = small()
    known = {"torch": torch, "net": net, "optimizer": torch.optim.Adam(net.parameters()), "make_net": small}
    exec(train, known)
    assert list(quantizers(net)) == ["0.weight", "4.weight"] and len(known["optimizer"].param_groups) == 2
    normed = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4))
    exec(equalize, {"net": normed, "loader": [torch.randn(8, 4)]})
    assert list(quantizers(normed)) == ["0.weight", "2.weight"]
    known["net"] = net = small()
    exec(schedule, known)
    assert known["optimizer"].param_groups[1]["params"] == step_parameters(net)
    state = net.state_dict()
    exec(save, known)
    assert known["net"] is not net and len(step_parameters(known["net"])) == 2
    assert all(torch.equal(value, state[name]) for name, value in known["net"].state_dict().items())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        kind = nn.parallel.DistributedDataParallel
        known |= {"DistributedDataParallel": kind, "wrapped": kind(small())}
        exec(distribute, known)
        known["wrapped"](X).sum().backward()
        assert all(step.grad is not None for step in step_parameters(known["wrapped"]))
    finally:
        torch.distributed.destroy_process_group()


schedulers = torch.optim.lr_scheduler
SCHEDULERS = {
    "CosineAnnealingLR": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 10),
    "LambdaLR": lambda optimizer: schedulers.LambdaLR(optimizer, lambda t: 0.9**t),
    "OneCycleLR": lambda optimizer: schedulers.OneCycleLR(optimizer, [0.1, 0.01], total_steps=20),
    "SequentialLR": lambda optimizer: schedulers.SequentialLR(
        optimizer, [schedulers.LinearLR(optimizer, 0.1), schedulers.CosineAnnealingLR(optimizer, 10)], [2]
    ),
    "CosineAnnealingWarmRestarts": lambda optimizer: schedulers.CosineAnnealingWarmRestarts(optimizer, 5),
    "CyclicLR": lambda optimizer: schedulers.CyclicLR(optimizer, [0.01, 0.001], [0.1, 0.01]),
    "MultiplicativeLR": lambda optimizer: schedulers.MultiplicativeLR(optimizer, lambda t: 0.9),
    "ReduceLROnPlateau": lambda optimizer: schedulers.ReduceLROnPlateau(optimizer),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_made_before_the_step_sizes(name):
    """As documented: the group is there, and empty, when the scheduler is made."""
    net = small()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer.add_param_group(step_group(net, lr=0.01))
    scheduler = SCHEDULERS[name](optimizer)
    arguments = [1.0] if name == "ReduceLROnPlateau" else []
    for update in range(4):
        if update == 2:
            quantize_(net, 7)
            optimizer.param_groups[-1]["params"] += step_group(net, lr=0.01)["params"]
            before = [step.clone() for step in step_parameters(net)]
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()
        scheduler.step(*arguments)
    assert all(not torch.equal(a, b) for a, b in zip(before, step_parameters(net), strict=True))
    assert optimizer.param_groups[1]["lr"] < optimizer.param_groups[0]["lr"]


def test_a_quantized_network_is_pickled_and_goes_on_training(tmp_path):
    net = small()
    quantize_(net, 7, 8, calibration=[X])
    torch.save(net, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    for copied in (loaded, pickle.loads(pickle.dumps(net)), pickle.loads(pickle.dumps(loaded)), copy.deepcopy(net)):
        assert torch.equal(copied.eval()(X), net.eval()(X))
        assert {*quantizers(copied)} == {*quantizers(net)}
        assert copied.state_dict().keys() == net.state_dict().keys()
        optimizer = torch.optim.SGD([*copied.parameters()], lr=0.1)
        before = [step.detach().clone() for step in step_parameters(copied)]
        copied(X).square().mean().backward()
        optimizer.step()
        assert all(not torch.equal(a, b) for a, b in zip(before, step_parameters(copied), strict=True))
        assert not torch.equal(copied(X), net(X))  # a copy of its own


def test_other_parametrizations_are_pickled_with_the_quantizers():
    net = small()
    scaled(net[0])
    parametrize.register_parametrization(net[4], "bias", Scaled())
    quantize_(net, 7)
    loaded = pickle.loads(pickle.dumps(net))
    assert torch.equal(loaded.eval()(X), net.eval()(X))
    assert type(loaded[0]) is not type(net[0]) and type(loaded[0]).__name__ == type(net[0]).__name__
    parametrize.remove_parametrizations(loaded[4], "weight")
    assert torch.equal(net(X), pickle.loads(pickle.dumps(net))(X))  # whose classes are their own
