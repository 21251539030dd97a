"""Ways of quantizing a run's network, against their definitions in numpy, and their codes in the exported file."""

import io
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from qdeploy import ExportError, InputError, export, format, load_int_model, reference
from qdeploy.training import project_steps_, quantize_, quantize_like_, quantizers, step_group
from qdeploy.training.initial_steps import initial_step
from qdeploy.training.methods.inq import INQ, PowersOfTwo
from qdeploy.training.methods.obc import codes_and_step, grid_step, hessians
from qdeploy.training.methods.quantizations import LSQ, OBC, RTN, UniformNoise

UPDATES = 12


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Tiny(nn.Module):
    """A convolution, a grouped and strided one, a wide linear layer and the classifier."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4)
        self.hidden = nn.Linear(12 * 9, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        x = self.bn(self.first(x)).relu()
        x = self.grouped(x).relu()
        return self.head(self.hidden(x.flatten(1)).relu())


QUANTIZED = ("first", "grouped", "hidden")


def tiny(seed=0):
    torch.manual_seed(seed)
    return Tiny()


def minibatches(t, n=8):
    generator = torch.Generator().manual_seed(t)
    images = [torch.rand(n, 2, 6, 6, generator=generator) for _ in range(2)]
    return [(part, torch.randint(3, (n,), generator=generator)) for part in images]


def adam(net):
    return torch.optim.Adam(net.parameters(), lr=3e-3, weight_decay=1e-2)


def update(net, optimizer, quantization, t):
    """One update as a run makes it."""
    if t == quantization.start:
        quantization.attach(net, optimizer, minibatches(t))
    net.train()
    images, classes = (torch.cat(parts) for parts in zip(*minibatches(t), strict=True))
    optimizer.zero_grad()
    functional.cross_entropy(net(images), classes).backward()
    optimizer.step()
    if quantization.start is not None and t >= quantization.start:
        quantization.after_step(t)


def trained(quantization, updates=UPDATES):
    net = tiny()
    optimizer = adam(net)
    for t in range(updates):
        update(net, optimizer, quantization, t)
    if quantization.start is None:
        quantization.attach(net, None, minibatches(0, 32))
    return net.eval()


def original(net, name):
    layer = net.get_submodule(name)
    return (layer.parametrizations.weight.original if hasattr(layer, "parametrizations") else layer.weight).detach()


def exported(net, path):
    """{layer: codes} of the file, after the engine has been held against the reference."""
    images = torch.cat([part for part, _ in minibatches(0, 32)]).numpy()
    export(net, images[:1], path, images)
    graph = format.load(path)
    assert np.array_equal(load_int_model(path)(images), reference.run(graph, images))
    return {node.name: node.constants["weight"] for node in graph.members[0].nodes if "weight" in node.constants}


METHODS = {
    "lsq": lambda: LSQ(4, 4),
    "lsq_tensor_wa": lambda: LSQ(4, 4, 4, per_channel=False, init="mse"),
    "no_s": lambda: LSQ(4, 7, scope="no_s"),
    "bn_head": lambda: LSQ(4, 7, scope="bn_head", reset_optimizer=True),
    "inq": lambda: INQ(4, UPDATES, 7),
    "inq_pow2": lambda: INQ(4, UPDATES, 4, powers_of_two=True),
    "rtn": lambda: RTN(4),
    "obc": lambda: OBC(4),
    "obc_natural": lambda: OBC(4, max_columns=10),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_file_has_the_codes_of_training(method, tmp_path):
    quantization = METHODS[method]()
    quantization.check_export(tiny())
    net = trained(quantization)
    codes, found = exported(net, tmp_path / "net.safetensors"), quantizers(net)
    for name in QUANTIZED:
        weight, quantizer = original(net, name), found[f"{name}.weight"]
        assert np.array_equal(codes[name], quantizer.codes(weight).numpy())
        if isinstance(quantization, (INQ, OBC)):  # the weights themselves lie on the grid
            assert torch.equal(net.get_submodule(name).weight, weight)


FINISHED = {
    **{name: make for name, make in METHODS.items() if not name.startswith("inq")},
    "lsq_some_layers": lambda: LSQ(0, {"first": 8, "hidden": 3}, 4),
    "inq": lambda: INQ(0, 4, 7),  # after 3 of 4 updates all is on the grid
    "inq_pow2": lambda: INQ(0, 4, 4, powers_of_two=True),
    "inq_pow2_float": lambda: INQ(0, 4, 7, powers_of_two=True),
    "noise": lambda: UniformNoise(1e-2),
    "noise_half_a_step": lambda: UniformNoise(),
}


@pytest.mark.parametrize("method", FINISHED)
def test_a_finished_network_comes_back_from_its_state_alone(method):
    quantization = FINISHED[method]()
    if quantization.start is not None:
        quantization.start = 0
    net, file = trained(quantization, 3), io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = tiny(1)
    FINISHED[method]().reattach(again, None, state)
    images = minibatches(7)[0][0]
    assert torch.equal(again.eval()(images), net(images))
    assert again.state_dict().keys() == state.keys()
    assert quantizers(again).keys() == quantizers(net).keys()


def test_bits_are_those_of_each_layer():
    for quantization in (INQ(4, UPDATES, {"first": 8, "hidden": 3}), OBC({"first": 8, "hidden": 3})):
        found = quantizers(trained(quantization))
        assert {name: q.bits for name, q in found.items()} == {"first.weight": 8, "hidden.weight": 3}
        assert not any(quantizer.step.requires_grad for quantizer in found.values())


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name]().start is not None])
@pytest.mark.parametrize("stop", [2, 3, 5, 9, 10])
def test_a_run_goes_on_from_its_states(method, stop):
    expected = trained(METHODS[method]()).state_dict()
    quantization, net = METHODS[method](), tiny()
    optimizer = adam(net)
    for t in range(UPDATES):
        update(net, optimizer, quantization, t)
        if t == stop:
            file = io.BytesIO()
            torch.save([one.state_dict() for one in (net, optimizer, quantization)], file)
            file.seek(0)
            states = torch.load(file, weights_only=True)
            quantization, net = METHODS[method](), tiny(1)
            optimizer = adam(net)
            if t >= quantization.start:
                quantization.reattach(net, optimizer, states[0])
                quantization.load_state_dict(states[2])
            net.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
    got = net.state_dict()
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_network_is_loaded_from_its_state(method):
    net = trained(METHODS[method]())
    images = minibatches(0)[0][0]
    for load in (METHODS[method]().reattach, lambda net, optimizer, state: quantize_like_(net, state)):
        again = tiny(1)
        load(again, adam(again), net.state_dict())
        assert torch.equal(again.eval()(images), net(images))


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name]().start is not None])
def test_parameters_stay_where_attach_has_put_them(method):
    # DistributedDataParallel, which wraps the network after that, would not see the gradients of those that move.
    quantization, net = METHODS[method](), tiny()
    optimizer, places = adam(net), {}
    for t in range(UPDATES):
        update(net, optimizer, quantization, t)
        if t == quantization.start:
            places = {name: id(parameter) for name, parameter in net.named_parameters()}
    assert {name: id(parameter) for name, parameter in net.named_parameters()} == places


# ---- LSQ -------------------------------------------------------------------------------------------------------------


def test_lsq_is_quantize_in_a_loop_of_ones_own():
    net = tiny()
    optimizer = adam(net)
    for t in range(UPDATES):
        if t == 4:
            quantize_(net, 4)
            optimizer.add_param_group(step_group(net, 1e-4))
        update(net, optimizer, LSQ(99), t)
        project_steps_(net)
    expected, got = net.state_dict(), trained(LSQ(4, 4, lr_step_size=1e-4)).state_dict()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "scope, weights, steps", [("all", True, True), ("no_s", True, False), ("bn_head", False, False)]
)
def test_the_scope_says_what_trains(scope, weights, steps):
    quantization, net = LSQ(4, 4, scope=scope), tiny()
    optimizer, before = adam(net), {}
    for t in range(UPDATES):
        update(net, optimizer, quantization, t)
        if t == 3:
            before = {name: value.clone() for name, value in net.named_parameters()}
            before |= {f"{name}.step": initial_step(original(net, name).flatten(1), -8, 7, "lsq") for name in QUANTIZED}
    for name in QUANTIZED:
        assert torch.equal(original(net, name), before[f"{name}.weight"]) != weights
        assert torch.equal(quantizers(net)[f"{name}.weight"].step, before[f"{name}.step"]) != steps
    assert not torch.equal(net.head.weight, before["head.weight"])
    assert not torch.equal(net.bn.weight, before["bn.weight"])


def test_bn_head_freezes_the_projections_of_attention_and_embeddings():
    net = nn.ModuleDict(
        {"words": nn.Embedding(5, 8), "attention": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 2)}
    )
    LSQ(0, 4, scope="bn_head").attach(net, None, [])
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in frozen if "original" not in name} == {"step"}
    assert {name.replace("parametrizations.", "") for name in frozen if "original" in name} == {
        "words.weight.original", "attention.in_proj_weight.original", "attention.out_proj.weight.original",
    }  # fmt: skip


@pytest.mark.parametrize("method", [INQ(0, 4), OBC(), UniformNoise()], ids=lambda method: type(method).__name__)
def test_methods_without_embeddings_refuse_one_by_name(method):
    net = nn.ModuleDict({"words": nn.Embedding(5, 8), "fc": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    before = {name: value.clone() for name, value in net.state_dict().items()}
    expected = r"expected convolutions and linear layers alone \(LSQ quantizes embeddings; else allow it: allow_float\)"
    with pytest.raises(InputError, match=rf"^{expected}, got an nn.Embedding - at layer `words`$"):
        method.attach(net, None, [])
    assert {name: value.tolist() for name, value in net.state_dict().items()} == {
        name: value.tolist() for name, value in before.items()
    }
    if not isinstance(method, OBC):  # that sees images first
        method.allow_float = ("words.*",)
        method.attach(net, None, [])


def test_steps_stay_positive():
    net = trained(LSQ(4, 4, lr_step_size=10.0))
    assert all((quantizer.step >= 1e-8).all() for quantizer in quantizers(net).values())


# ---- INQ -------------------------------------------------------------------------------------------------------------


def nearest(weight, scale, bits, powers_of_two):
    """The nearest of all levels, in float64; of two, the greater."""
    if powers_of_two:
        high = math.floor(math.log2(4 * scale / 3))
        positive = [2.0**power for power in range(high + 1 - 2 ** (bits - 2), high + 1)]
    else:
        positive = [scale * code / (2 ** (bits - 1) - 1) for code in range(1, 2 ** (bits - 1))]
    levels = np.array([0.0, *positive])
    which = len(levels) - 1 - np.abs(np.abs(weight)[..., None] - levels)[..., ::-1].argmin(-1)
    return np.sign(weight) * levels[which]


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
@pytest.mark.parametrize("powers_of_two", [False, True])
def test_inq_fixes_the_largest_weights_first(bits, powers_of_two):
    quantization, net = INQ(4, UPDATES, bits, powers_of_two), tiny()
    optimizer, fractions = adam(net), {4: 0.5, 6: 0.75, 8: 0.875, 10: 1.0}
    weights = {name: net.get_submodule(name).weight for name in QUANTIZED}
    scales, fixed = {}, {name: np.zeros(weight.shape, bool) for name, weight in weights.items()}

    def now():
        return {name: weight.detach().numpy().copy() for name, weight in weights.items()}

    def check_fixed(t, before, after):
        """What is fixed at the start of update t, from the weights before and after."""
        for name, free in [(name, ~of) for name, of in fixed.items()]:
            order = np.argsort(-np.where(free, np.abs(before[name]), -1).ravel(), kind="stable")
            count = int(fractions[t] * free.size) - int((~free).sum())
            new = np.zeros(free.size, bool)
            new[order[:count]] = True
            new = new.reshape(free.shape)
            level = nearest(before[name][new].astype(np.float64), scales[name], bits, powers_of_two)
            np.testing.assert_allclose(after[name][new], level, rtol=1e-6)
            assert np.array_equal(after[name][~new], before[name][~new])
            fixed[name] |= new

    for t in range(UPDATES):
        if t == 4:
            before = now()
            scales = {name: float(np.abs(weight).max()) for name, weight in before.items()}
            quantization.attach(net, optimizer, [])
            check_fixed(4, before, now())
        before = now()
        update(net, optimizer, LSQ(99), t)
        if t >= 4:
            stepped = now()
            assert all((stepped[name] != before[name])[fixed[name]].any() for name in QUANTIZED)  # Adam moved them
            for part in quantization.parts.values():
                part.put_back()
            after = now()
            for name, of in fixed.items():
                assert np.array_equal(after[name][of], before[name][of])
                assert np.array_equal(after[name][~of], stepped[name][~of])
            quantization.after_step(t)
            if t + 1 in fractions:
                check_fixed(t + 1, after, now())
        assert quantization.eligible(t) == (t >= 10)
        made = [*quantizers(net).values()] if t >= 4 else []
        assert len(made) == (0 if t < 4 or powers_of_two and bits > 4 else 3)
        assert all(quantizer.waiting == (t < 9) for quantizer in made)
    assert all(of.all() for of in fixed.values())


@pytest.mark.parametrize("bits", range(2, 9))
def test_powers_of_two_are_the_nearest_and_of_two_the_greater(bits):
    for scale in (0.74, 0.75, 0.76, 1.0, 1.49, 1.5):
        weight = torch.cat([torch.linspace(-1.6, 1.6, 999), torch.tensor([0.0, 0.75, -0.375, 0.1875, 1e-9, 1.5, -3.0])])
        got = PowersOfTwo(scale, bits).nearest(weight)
        assert np.array_equal(got.numpy(), nearest(weight.numpy().astype(np.float64), scale, bits, True))


def test_powers_of_two_beyond_int8_are_refused_by_name():
    INQ(4, UPDATES, 4, powers_of_two=True).check_export(tiny())
    with pytest.raises(ExportError) as error:
        INQ(4, UPDATES, {"grouped": 4, "hidden": 5}, powers_of_two=True).check_export(tiny())
    expected = "powers of two of 4 bits or less (their codes are 0, +-1, +-2, +-4, +-8)"
    assert str(error.value) == f"expected {expected}, got 5 bits, whose codes reach 2^7 - at layer `hidden`"


def test_inq_takes_the_updates_that_there_are():
    quantization = INQ(3, 4, 7)
    assert quantization.times == [3, 3, 3, 3]
    net = trained(quantization, 4)
    assert len(quantizers(net)) == 3 and quantization.eligible(3)
    with pytest.raises(InputError, match=r"^expected a switch before the last of 4 updates, got 4 - at INQ$"):
        INQ(4, 4, 7)


class Tied(nn.Module):
    """Two layers with one weight, and a layer of zeros."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
        self.right.weight = self.left.weight
        self.zero, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        nn.init.zeros_(self.zero.weight)

    def forward(self, x):
        return self.head(self.zero(self.right(self.left(x).relu()).relu()))


@pytest.mark.parametrize("make", [lambda: INQ(0, 1, 4), lambda: INQ(0, 1, 4, True), lambda: OBC(4)])
def test_layers_that_share_a_weight_share_its_codes(make):
    torch.manual_seed(0)
    net = Tied()
    make().attach(net, None, [(torch.rand(9, 6), torch.zeros(9))])
    found = quantizers(net)
    assert found["left.weight"] is found["right.weight"] and net.left.weight.equal(net.right.weight)
    assert not net.zero.weight.any() and net(torch.rand(2, 6)).isfinite().all()


def test_a_computed_weight_is_refused():
    net = tiny()
    nn.utils.parametrizations.weight_norm(net.hidden)
    for quantization in (INQ(0, 4), OBC(), UniformNoise(1e-3)):
        with pytest.raises(InputError) as error:
            quantization.attach(net, None, minibatches(0))
        got = "one that parametrizations compute"
        assert str(error.value) == f"expected a weight that is a Parameter, got {got} - at layer `hidden`"


# ---- Uniform noise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amplitude", [1e-2, None])
def test_noise_is_uniform_and_new_in_every_forward_pass(amplitude):
    net = tiny()
    weight = net.hidden.weight.detach().clone()
    UniformNoise(amplitude, 4).attach(net, None, [])
    half = torch.full((10,), 1e-2) if amplitude else initial_step(weight, -8, 7, "lsq") / 2
    net.train()
    draws = torch.stack([(net.hidden.weight - weight).detach() for _ in range(200)]) / half[:, None]
    count = draws.numel()  # 216,000: the bounds below are 5 standard errors
    assert draws.abs().max() <= 1 + 1e-4 and draws.abs().max() > 0.999
    assert draws.mean().abs() < 5 * (1 / 3 / count) ** 0.5
    assert (draws.square().mean() - 1 / 3).abs() < 5 * (4 / 45 / count) ** 0.5
    neighbours = (draws[1:] * draws[:-1]).mean()
    assert neighbours.abs() < 5 / 3 / count**0.5
    assert torch.equal(net.eval().hidden.weight, weight)


def test_noise_does_not_change_the_gradient():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1))
    UniformNoise(None, {"0": 2}).attach(net, None, [])
    upstream = torch.randn(4, 4)
    (net[0].weight * upstream).sum().backward()
    assert torch.equal(net[0].parametrizations.weight.original.grad, upstream)


@pytest.mark.parametrize("stop", [0, 5])
def test_noise_follows_from_seed_and_update(stop):
    def run(seed, stopping=None):
        net, quantization = tiny(), UniformNoise(1e-2, seed=seed)
        optimizer = adam(net)
        for t in range(UPDATES):
            update(net, optimizer, quantization, t)
            if t == stopping:
                states, quantization = quantization.state_dict(), UniformNoise(1e-2, seed=seed)
                again = tiny(1)
                fresh = adam(again)
                quantization.reattach(again, fresh, net.state_dict())
                quantization.load_state_dict(states)
                fresh.load_state_dict(optimizer.state_dict())
                net, optimizer = again, fresh
        return net.state_dict()

    expected, got, other = run(0), run(0, stop), run(1)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    name = "hidden.parametrizations.weight.original"
    assert not torch.equal(other[name], expected[name])


def test_a_network_after_noise_exports_as_a_float_one(tmp_path):
    net = trained(UniformNoise(1e-3))
    images = minibatches(0)[0][0].numpy()
    export(net, images[:1], tmp_path / "noise.safetensors", images, fallback_bits=7)
    plain = tiny(1)
    plain.load_state_dict(
        {name.replace("parametrizations.weight.original", "weight"): v for name, v in net.state_dict().items()}
    )
    export(plain.eval(), images[:1], tmp_path / "plain.safetensors", images, fallback_bits=7)
    one, other = (format.load(tmp_path / f"{name}.safetensors").members[0].nodes for name in ("noise", "plain"))
    for a, b in zip(one, other, strict=True):
        assert all(np.array_equal(a.constants[key], b.constants[key]) for key in b.constants)


@pytest.mark.parametrize("amplitude", [0.0, -1e-3, math.nan, math.inf])
def test_an_amplitude_is_a_positive_number(amplitude):
    with pytest.raises(InputError) as error:
        UniformNoise(amplitude)
    assert str(error.value) == f"expected an amplitude greater than 0, got {amplitude} - at UniformNoise"


# ---- Round to nearest ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [True, False])
def test_rtn_is_rounding(per_channel):
    net = trained(RTN(3, per_channel=per_channel), 3)
    for name in QUANTIZED:
        weight, step = original(net, name), quantizers(net)[f"{name}.weight"].step
        rows = weight.flatten(1) if per_channel else weight.reshape(1, -1)
        assert torch.equal(step.reshape(-1), initial_step(rows, -4, 3, "mse"))
        scale = step.numpy().reshape(-1, *[1] * (weight.dim() - 1))
        expected = np.clip(np.rint(weight.numpy() / scale), -4, 3) * scale
        assert np.array_equal(net.get_submodule(name).weight.detach().numpy(), expected)
    assert not any(step.requires_grad for step in (q.step for q in quantizers(net).values()))


# ---- OBC -------------------------------------------------------------------------------------------------------------


def test_hessians_are_those_of_the_layers_as_matrices():
    net = tiny().eval()
    images = torch.cat([part for part, _ in minibatches(3)])
    layers = {name: [net.get_submodule(name)] for name in QUANTIZED}
    found = hessians(net, layers, images.split(5))
    with torch.no_grad():
        inputs = {"first": images}
        inputs["grouped"] = net.bn(net.first(images)).relu()
        inputs["hidden"] = net.grouped(inputs["grouped"]).relu().flatten(1)
    for name, value in inputs.items():
        value = (
            np.pad(value.numpy().astype(np.float64), [(0, 0), (0, 0), (1, 1), (1, 1)]) if value.dim() == 4 else value
        )
        if name == "hidden":
            x = value.numpy().astype(np.float64)
            expected = (2 * x.T @ x / len(x))[None]
        else:
            stride, groups = (1, 1) if name == "first" else (2, 4)
            per_group = value.shape[1] // groups
            expected = np.zeros((groups, 9 * per_group, 9 * per_group))
            for n, i, j, g in itertools.product(range(len(value)), *[range(0, 6, stride)] * 2, range(groups)):
                x = value[n, g * per_group : (g + 1) * per_group, i : i + 3, j : j + 3].ravel()
                expected[g] += 2 * np.outer(x, x) / len(value)
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert not any(layer._forward_pre_hooks for layer in net.modules())


def rounded(weight, step, bits):
    return np.clip(np.rint(weight / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step


def best_of_the_rest(weight, hessian, fixed):
    """The weights of least error where those in `fixed` {index: value} are what they are: a linear system."""
    free = [i for i in range(len(weight)) if i not in fixed]
    result = weight.copy()
    for i, value in fixed.items():
        result[i] = value
    if free and fixed:
        moved = sum(hessian[free, i] * (value - weight[i]) for i, value in fixed.items())
        result[free] = weight[free] - np.linalg.solve(hessian[np.ix_(free, free)], moved)
    return result


def error_of(weight, values, hessian):
    return (weight - values) @ hessian @ (weight - values) / 2


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_obc_on_six_weights(seed, bits):
    random = np.random.default_rng(seed)
    x = random.normal(size=(6, 40)) * random.uniform(0.3, 2, (6, 1)) + random.normal(size=40)
    hessian, weight = 2 * x @ x.T, random.normal(size=6).astype(np.float32)
    codes, step = codes_and_step(torch.from_numpy(weight)[None], torch.from_numpy(hessian)[None], bits)
    weight, scale = weight.astype(np.float64), step.double().numpy()[0]

    # Greedy by trial: fix each weight in turn, solve for the others, and keep the one that costs the least.
    fixed = {}
    while len(fixed) < 6:
        now = best_of_the_rest(weight, hessian, fixed)
        off = {i: abs(now[i] - rounded(now[i], scale, bits)) for i in range(6) if i not in fixed}
        outliers = [i for i in off if off[i] > scale / 2 * (1 + 1e-9)]
        if outliers:
            chosen = max(outliers, key=off.get)
        else:
            tried = {i: {**fixed, i: rounded(now[i], scale, bits)} for i in off}
            errors = {
                i: error_of(weight, best_of_the_rest(weight, hessian, those), hessian) for i, those in tried.items()
            }
            chosen = min(errors, key=errors.get)
        fixed[chosen] = rounded(now[chosen], scale, bits)
    expected = np.array([fixed[i] for i in range(6)])
    got = codes.numpy()[0] * scale
    np.testing.assert_allclose(got, expected, atol=1e-9)

    errors = []  # of all 720 orders; this one is not always the best of them
    for order in itertools.permutations(range(6)):
        fixed = {}
        for i in order:
            fixed[i] = rounded(best_of_the_rest(weight, hessian, fixed)[i], scale, bits)
        errors.append(error_of(weight, np.array([fixed[i] for i in range(6)]), hessian))
    assert np.isclose(errors, error_of(weight, got, hessian)).any()


def correlated(rows, columns, seed):
    """A weight, and the H of inputs that depend on each other."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(columns, 4 * columns)) + 2 * random.normal(size=4 * columns)
    return random.normal(size=(rows, columns)).astype(np.float32), x @ x.T / columns


@pytest.mark.parametrize("natural_order", [False, True])
def test_obc_beats_rounding_on_the_inputs_of_the_layer(natural_order):
    weight, hessian = correlated(70, 24, 0)  # rows in three parts
    codes, step = codes_and_step(torch.from_numpy(weight), torch.from_numpy(hessian)[None], 3, natural_order)
    assert codes.min() >= -4 and codes.max() <= 3 and torch.equal(codes, codes.round())
    scale = step.double().numpy()[:, None]
    ours, nearest = codes.numpy() * scale, rounded(weight.astype(np.float64), scale, 3)

    def errors(values):
        return np.einsum("ri,ij,rj->r", weight - values, hessian, weight - values)

    assert errors(ours).sum() < 0.4 * errors(nearest).sum()
    alone = [
        codes_and_step(torch.from_numpy(weight[i : i + 1]), torch.from_numpy(hessian)[None], 3, natural_order)[0]
        for i in range(70)
    ]
    assert torch.equal(torch.cat(alone), codes)  # a row does not depend on the others


def test_natural_order_is_from_the_first_column_to_the_last():
    weight, hessian = correlated(5, 7, 1)
    codes, step = codes_and_step(torch.from_numpy(weight), torch.from_numpy(hessian)[None], 4, natural_order=True)
    for row in range(5):
        fixed, scale = {}, step[row].double().item()
        for i in range(7):
            fixed[i] = rounded(best_of_the_rest(weight[row].astype(np.float64), hessian, fixed)[i], scale, 4)
        np.testing.assert_allclose(codes[row].double().numpy() * scale, [fixed[i] for i in range(7)], atol=1e-9)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_grid_of_a_row_is_the_best_of_80(bits):
    random = np.random.default_rng(bits)
    rows = random.normal(size=(6, 50)) * np.array([1, 1, 3, 1e-3, 1, 0])[:, None]
    rows[4] = np.abs(rows[4])  # without negative weights: the grid stays symmetric
    rows[2, 0] = 40
    for row, step in zip(rows, grid_step(torch.from_numpy(rows), bits).numpy(), strict=True):
        steps = [(1 - i / 100) * 2 * np.abs(row).max() / (2**bits - 1) for i in range(80)]
        if not row.any():
            assert step == 1e-8
            continue
        errors = [(np.abs(rounded(row, one, bits) - row) ** 2.4).sum() for one in steps]
        assert math.isclose(step, steps[int(np.argmin(errors))], rel_tol=1e-9)


def test_inputs_that_are_always_zero_get_weight_zero():
    weight, hessian = correlated(4, 6, 2)
    hessian[2], hessian[:, 2] = 0, 0
    codes, step = codes_and_step(torch.from_numpy(weight), torch.from_numpy(hessian)[None], 4)
    assert not codes[:, 2].any() and codes.any()
    others = [0, 1, 3, 4, 5]
    scale = step.double().numpy()
    of_largest = 2 * np.abs(weight).max(1) / 15
    assert (scale <= of_largest * (1 + 1e-6)).all()  # the grid is that of all weights
    assert np.isfinite(codes[:, others].numpy()).all()


@pytest.mark.parametrize("natural_order", [False, True])
def test_inputs_that_depend_on_each_other_are_damped(natural_order):
    x = np.random.default_rng(0).normal(size=(2, 30))
    x = np.concatenate([x, x])  # rank 2 of 4
    hessian = torch.from_numpy(2 * x @ x.T)[None]
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    codes, _ = codes_and_step(weight, hessian, 4, natural_order)
    damped, _ = codes_and_step(weight, hessian + torch.eye(4), 4, natural_order)
    assert torch.equal(codes, damped)


def test_wide_layers_are_named():
    quantization = OBC(4, max_columns=20)
    trained(quantization, 1)
    assert quantization.natural_order == ["hidden"]  # 108 columns; the convolutions have 18 each


def test_images_have_to_reach_every_layer():
    net = tiny()
    net.unused, net.last = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(InputError) as error:
        OBC().attach(net, None, minibatches(0))
    got = "no input - at layer `unused`"
    assert str(error.value) == f"expected images that reach every layer to quantize, got {got}"
    assert not quantizers(net)
