"""Networks and calls as people have them: `export` writes the right file, or refuses in one line and writes none."""

import os
import subprocess
import sys
import warnings
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel

import qdeploy
from qdeploy import ExportError, InputError, ModelError, export, export_ensemble
from qdeploy.exporter import check
from qdeploy.training import quantize_, quantizers

torch.set_num_threads(1)
X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def small(classes=5):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)),
    ).eval()


class Flow(nn.Module):
    """A convolution, `flow(net, x)`, and a classifier."""

    def __init__(self, flow, **modules):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.flow = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), flow
        for name, module in modules.items():
            setattr(self, name, module)
        self.register_buffer("state", torch.ones(1))

    def forward(self, x):
        return self.fc(self.flow(self, self.conv(x)).mean((2, 3)))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


def sqnr(net, path):
    with torch.no_grad():
        expected = net.eval()(X).double().numpy()
    return 10 * np.log10(
        np.square(expected).sum() / np.square(expected - qdeploy.load_int_model(path)(X.numpy())).sum()
    )


def assert_codes_are_those_of_training(net, path):
    nodes = {node.name: node for node in qdeploy.format.load(path).members[0].nodes}
    for key, quantizer in quantizers(net).items():
        name, _, kind = key.rpartition(".")
        if kind == "weight":
            weight = net.get_submodule(name).parametrizations.weight
            before = weight.original if hasattr(weight, "original") else weight.original0
            assert np.array_equal(nodes[name].constants["weight"], quantizer.codes(before.detach()).numpy())


def refused(net, path, text, **options):
    with pytest.raises(ExportError, match=text) as error:
        export(net, X[:1], path, X, **{"fallback_bits": 8, **options})
    assert "\n" not in str(error.value) and not path.exists()
    return str(error.value)


# ---- Wrapped networks -----------------------------------------------------------------------------------------------


def any_arguments(net):
    plain = net.forward
    net.forward = lambda *args, **options: plain(*args, **options)
    return net


WRAPPERS = {
    "average": AveragedModel,
    "data_parallel": nn.DataParallel,
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "compiled_average": lambda net: torch.compile(AveragedModel(net), backend="eager"),
    "compiled_block": lambda net: nn.Sequential(
        OrderedDict({"0": torch.compile(net[0], backend="eager"), "1": net[1:]})
    ),
    "any_arguments": any_arguments,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_networks(name, path):
    net = small()
    quantize_(net, 7)
    report = export(WRAPPERS[name](net), X[:1], path, X)
    assert sqnr(net, path) > 30
    first = report.layers[0].name
    assert first == "0", first


@dataclass
class Scores:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


OUTPUTS = {
    "tuple": lambda y: (y,),
    "dict": lambda y: {"scores": y},
    "logits_of_dict": lambda y: {"features": y + 1, "logits": y},
    "dataclass": Scores,
    "dataclass_of_two": lambda y: Scores(y, y + 1),
    "nested": lambda y: {"head": {"logits": y}, "loss": None},
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_every_kind(name, path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small()

        def forward(self, x):
            return OUTPUTS[name](self.body(x))

    net = Net()
    export(net, X[:1], path, X, fallback_bits=8)
    assert sqnr(net.body, path) > 30


def test_logits_are_the_output_whatever_else_there_is(path):
    net = Flow(lambda net, x: x)
    whole = net.forward
    net.forward = lambda x: {"features": net.conv(x), "logits": whole(x)}
    export(net, X[:1], path, X, fallback_bits=8)
    assert [output["shape"] for output in qdeploy.load_int_model(path).outputs] == [(5,)]


# ---- Weights that are computed --------------------------------------------------------------------------------------


class Mask(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.register_buffer("mask", (torch.rand(*shape) > 0.5).float())

    def forward(self, weight):
        return weight * self.mask


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * 0.5, self.bias, self.stride, self.padding)


RIGHT_BEFORE = "a learned quantizer right before its conv2d or linear"


@pytest.mark.parametrize("fallback", [None, 4])
@pytest.mark.parametrize("kind", ["mask", "standardized", "scaled", "classifier"])
def test_nothing_stands_between_quantizer_and_layer(kind, fallback, path):
    net, at = small(), "3"
    if kind in ("standardized", "scaled"):
        net[3] = {"standardized": Standardized, "scaled": Scaled}[kind](8, 8, 3, padding=1)
    quantize_(net, 4, skip=[])
    if kind == "mask":
        parametrize.register_parametrization(net[3], "weight", Mask(8, 8, 3, 3))
    if kind == "classifier":
        parametrize.register_parametrization(net[8], "weight", Mask(5, 8))
        at = "8"
    refused(net, path, f"{RIGHT_BEFORE}.*, got aten.(mul|mean) of its result - at module `{at}", fallback_bits=fallback)


class Stretched(nn.Conv2d):
    """Its standardization is none of those that `quantize_` knows."""

    def forward(self, x):
        channels = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, eps=1e-3)
        return F.conv2d(x, 2 * channels.reshape_as(self.weight), self.bias, self.stride, self.padding)


def test_weights_standardized_after_the_quantizer_are_one_reason(path):
    """Whatever their shapes are."""
    net = small()
    net[0], net[3] = Stretched(3, 8, 3, padding=1), Stretched(8, 8, 3, padding=1)
    quantize_(net, 4)
    got = "weight standardization or another function of all weights after it"
    todo = "make what else is done to the weight a parametrization of it, then quantize_"
    message = refused(net, path, RIGHT_BEFORE)
    assert message == f"expected {RIGHT_BEFORE} ({todo}), got {got} - at modules `0`, `3`"


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_what_stands_before_the_quantizer_is_computed(kind, path):
    net = small()
    net[3] = getattr(parametrizations, kind)(net[3])
    quantize_(net.eval(), 4)
    report = export(net, X[:1], path, X)
    assert report.layers[1].quantizer == "learned" and report.packed_bytes < report.fp32_bytes
    quantizer = quantizers(net)["3.weight"]
    with torch.no_grad():
        codes = (net[3].weight / quantizer.step.reshape(-1, 1, 1, 1)).round()
    node = next(node for node in qdeploy.format.load(path).members[0].nodes if node.name == "3")
    assert np.array_equal(node.constants["weight"], codes.numpy())


def test_a_quantized_weight_may_be_reshaped(path):
    """A 1x1 convolution written as a matrix product: the codes stay."""

    class Pointwise(nn.Conv2d):
        def forward(self, x):
            weight = self.weight.to(x.dtype).contiguous()
            return F.linear(x.flatten(1), weight.flatten(1), self.bias)

    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), Pointwise(3, 8, 1), nn.ReLU(), nn.Linear(8, 5)).eval()
    quantize_(net, 5)
    export(net, X[:1], path, X)
    assert sqnr(net, path) > 30
    codes = quantizers(net)["1.weight"].codes(net[1].parametrizations.weight.original.detach())
    assert np.array_equal(
        qdeploy.format.load(path).members[0].nodes[-2].constants["weight"], codes.numpy().reshape(8, 3)
    )


# ---- What eval does not switch off ----------------------------------------------------------------------------------

NOISE = {
    "dropout": lambda net, x: F.dropout(x, 0.3),
    "dropout_in_place": lambda net, x: F.dropout(x, 0.3, inplace=True),
    "dropout2d": lambda net, x: F.dropout2d(x),
    "alpha_dropout": lambda net, x: F.alpha_dropout(x, training=True),
    "rrelu": lambda net, x: F.rrelu(x, training=True),
    "rand_like": lambda net, x: x + torch.rand_like(x),
    "constant": lambda net, x: x + torch.randn(8, 1, 1),
    "bernoulli": lambda net, x: x * torch.bernoulli(torch.full((8, 1, 1), 0.5)),
    "in_place": lambda net, x: x * torch.zeros(1).uniform_(),
    "permutation": lambda net, x: x * torch.randperm(8).reshape(8, 1, 1),
}


@pytest.mark.parametrize("name", NOISE)
def test_noise_in_eval_mode(name, path):
    kind = r"dropout that stays on \(pass training=self.training\)" if "dropout" in name else "random numbers of"
    refused(Flow(NOISE[name]), path, f"an operator that gives the same every time, got {kind}")


QUIET = {
    "dropout": lambda net, x: F.dropout(x, 0.3, net.training),
    "dropout_of_nothing": lambda net, x: F.dropout(x, 0.0),
    "rrelu": lambda net, x: F.rrelu(x),
    "unused": lambda net, x: (torch.rand(3), x)[1],
    "counter": lambda net, x: (net.state.add_(1), x)[1],
}


@pytest.mark.parametrize("name", QUIET)
def test_noise_that_eval_mode_switches_off(name, path):
    net = Flow(QUIET[name])
    export(net, X[:1], path, X, fallback_bits=8)
    assert sqnr(net, path) > 30


@pytest.mark.parametrize(
    "flow", [lambda net, x: x * net.state.add_(1), lambda net, x: x * net.state.view(1, 1).mul_(2).reshape(())]
)
def test_state_that_every_call_changes(flow, path):
    refused(Flow(flow), path, "a forward that changes no buffer in eval mode")


class RemembersItsInput(nn.Module):
    """As the Swin of transformers: a size of the input, by an operation of torch, stays in the module."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.side = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), 100

    def forward(self, x):
        self.side = torch.min(torch.tensor([x.shape[2], self.side]))
        self.shape = x.shape
        return self.fc(self.conv(x).mean((2, 3)))


def test_the_network_is_left_as_it_was(path):
    net, x = RemembersItsInput().train(), torch.rand(2, 3, 8, 8)
    quantize_(net, 8)
    state = {name: set(vars(module)) for name, module in net.named_modules()}
    qdeploy.export(net, x, path, x)
    assert net.training and net.side == 100 and not isinstance(net.side, torch.Tensor)
    assert {name: set(vars(module)) for name, module in net.named_modules()} == state
    first = path.read_bytes()
    assert torch.isfinite(net(x)).all()
    qdeploy.export(net, x, path, x)
    assert path.read_bytes() == first


def test_statistics_of_the_batch(path):
    class Frozen(nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(True)

    refused(
        Flow(lambda net, x: net.bn(x), bn=Frozen(8)),
        path,
        "BatchNorm with running statistics .*- at module `bn.batch_norm`",
    )


# ---- Types and devices ----------------------------------------------------------------------------------------------


class Autocast(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.body, self.options = small(), options

    def forward(self, x):
        with torch.autocast(**self.options), torch.set_grad_enabled(True):
            return self.body(x)


@pytest.mark.parametrize(
    "options", [{"device_type": "cuda", "dtype": torch.float16}, {"device_type": "cpu", "enabled": False}]
)
def test_autocast_that_changes_nothing(options, path):
    net = Autocast(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch, where there is no GPU
        quantize_(net, 7)
        export(net, X[:1], path, X)
        assert sqnr(net, path) > 30
    assert_codes_are_those_of_training(net, path)


def test_autocast_to_another_type(path):
    net = nn.Sequential(Autocast(device_type="cpu", dtype=torch.bfloat16))
    refused(
        net, path, r"float32 throughout \(autocast disabled in eval mode\), got autocast to bfloat16 - at module `0`"
    )


def test_tensors_without_float32_values(path):
    net = small()
    net[1].running_mean = net[1].running_mean.half()
    refused(net, path, r"float32 buffers \(call net.float\(\)\), got float16 - at buffer `1.running_mean`")
    with torch.device("meta"):
        net = small()
    refused(
        net,
        path,
        r"tensors with values \(load the weights first\), got one on the device meta - at parameter `0.weight`",
    )
    net = nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(5))
    refused(net, path, r"initialized parameters \(run the network once\), got a lazy one - at parameter `0.weight`")


def test_images_that_are_too_small_name_the_module(path):
    net = nn.Sequential(small()[:6], nn.Sequential(nn.MaxPool2d(4), nn.Conv2d(8, 8, 5)), nn.Flatten(), nn.Linear(8, 5))
    text = refused(net, path, "traces for any batch size, got .* - at module `1.1`")
    assert "Kernel size" in text or "kernel size" in text


# ---- All that is missing, in words ----------------------------------------------------------------------------------


class Zoo(nn.Module):
    """Blocks between operators of several kinds that the engine lacks."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.RMSNorm(6)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(5))
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.up, self.fc = nn.ConvTranspose2d(8, 8, 2), nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.stem(x))
        for block in self.blocks:
            x = block(x) * torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        tokens = self.up(x).flatten(2).transpose(1, 2)
        return self.fc(F.dropout(self.recurrent(tokens)[0].mean(1)))


def test_everything_that_is_missing_is_said_at_once(path):
    text = refused(Zoo(), path, "an operator that the engine has")
    for words in (
        "RMSNorm (LayerNorm, GroupNorm and BatchNorm are there) at module `norm`",
        "a norm of activations (GRN and the like) (LayerNorm, GroupNorm and BatchNorm are there) at module "
        "`linalg_vector_norm` (5 times)",
        "stride [1, 1] at module `up` instead of a transposed convolution by its kernel [2, 2] as stride, without",
        "a recurrent layer at module `recurrent`",
        "dropout that stays on",
    ):
        assert words in text, text
    assert "s77" not in text and "aten." not in text.split(":")[0]
    with pytest.raises(ExportError) as error:
        check(Zoo(), X[:1])
    assert str(error.value) == text


def test_only_the_error_speaks(path, capfd):
    """torch.export prints a graph and log lines before it fails."""
    refused(Flow(lambda net, x: x if x.sum() > 0 else -x), path, "got a branch or size that depends on the numbers")
    assert capfd.readouterr() == ("", "")


def test_what_is_no_network(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(small())
    for net, kind in ((scripted, "RecursiveScriptModule"), (small, "function"), (small().state_dict(), "OrderedDict")):
        refused(net, path, f"expected a torch.nn.Module in Python, got {kind} - at the network")


def test_no_symbols_of_torch(path):
    text = refused(
        Flow(lambda net, x: F.max_pool2d(x.reshape(-1, 4, 6, 6), 6).reshape(-1, 8, 1, 1)),
        path,
        r"expected a tensor \[N, C, H, W\] or .*, got one that has more in dimension 0",
    )
    assert "s77" not in text


def test_check_accepts_what_export_accepts():
    assert check(small(), X[:1]) is None


# ---- Calls ----------------------------------------------------------------------------------------------------------


def test_a_report_that_fails_leaves_no_file(path, monkeypatch):
    monkeypatch.setattr(qdeploy.exporter.report, "_sqnr", lambda expected, got: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(small(), X[:1], path, X, fallback_bits=8)
    assert not path.exists()


def test_a_path_that_cannot_be_written_is_refused_before_calibration(tmp_path):
    def calibration():
        raise AssertionError("calibration began")
        yield

    for path, reason in ((tmp_path, "not a regular file"), (tmp_path / "no" / "net", "folder that does not exist")):
        with pytest.raises(ModelError, match=reason):
            export(small(), X[:1], path, calibration(), fallback_bits=8)
    for path, reason in ((None, "NoneType"), (3, "int"), ("a\0b", "one with a byte 0"), ("", "an empty one")):
        with pytest.raises((InputError, ModelError), match=f"expected a path, got {reason} - at path"):
            export(small(), X[:1], path, calibration(), fallback_bits=8)


def test_paths_of_every_kind(tmp_path):
    plain = tmp_path / "plain"
    export(small(), X[:1], plain, X, fallback_bits=8)
    for name in (os.fsencode(tmp_path) + b"/\xff", os.fsdecode(os.fsencode(tmp_path) + b"/\xfe")):
        export(small(), X[:1], name, X, fallback_bits=8)
        with open(name, "rb") as file:
            assert file.read() == plain.read_bytes()


def test_ensembles_as_people_hold_them(path):
    nets = [small(), small()]
    for held in (iter(nets), tuple(nets), nn.ModuleList(nets), (net for net in nets)):
        export_ensemble(held, X[:1], path, X, fallback_bits=8)
        assert qdeploy.load_int_model(path).members == ["member0", "member1"]
    with pytest.raises(InputError, match="expected two or more networks, got one Sequential - at export_ensemble"):
        export_ensemble(small(), X[:1], path, X)
    with pytest.raises(ExportError, match="got RMSNorm .* of member1"):
        export_ensemble([small(), Flow(lambda net, x: net.n(x), n=nn.RMSNorm(6))], X[:1], path, X, fallback_bits=8)
    with pytest.raises(InputError, match=r"outputs of one shape, got \[5\] of member0, \[6\] of member1"):
        export_ensemble([small(), small(6)], X[:1], path, X, fallback_bits=8)


NAMES = ["ant", "bee", "cat", "dog", "elk"]


@pytest.mark.parametrize(
    "classes",
    [
        NAMES,
        np.array(NAMES),
        dict(enumerate(NAMES)),
        {name: i for i, name in enumerate(NAMES)},
        {i: NAMES[i] for i in (4, 3, 2, 1, 0)},
    ],
)
def test_names_of_classes(classes, path):
    export(small(), X[:1], path, X, fallback_bits=8, classes=classes)
    assert qdeploy.load_int_model(path).classes == NAMES


def test_names_that_are_no_names_of_classes(path):
    for classes, text in (
        ("abcde", "a list of names, got 'abcde'"),
        ({1: "a", 2: "b"}, r"classes 0 to 4, got \[1, 2\]"),
    ):
        with pytest.raises(InputError, match=text):
            export(small(), X[:1], path, X, fallback_bits=8, classes=classes)


# ---- Raw images -----------------------------------------------------------------------------------------------------

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def pixels(count=16):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)


def normalized(images):
    return ((images.astype(np.float32) / 255 - MEAN) / STD).transpose(0, 3, 1, 2)


def test_mean_and_std_of_pixels_are_refused(path):
    raw = pixels()
    for data in (normalized(raw), raw):
        with pytest.raises(
            InputError, match=r"mean of images in 0..1 \(divide mean and std of pixels in 0..255 by 255\)"
        ):
            preprocess = {"mean": (MEAN * 255).tolist(), "std": (STD * 255).tolist()}
            export(small(), X[:1], path, data, fallback_bits=8, preprocess=preprocess)


@pytest.mark.parametrize(
    "preprocess",
    [
        {"mean": 0, "std": 1},
        {"mean": MEAN, "std": STD * 255},
        {"mean": MEAN - 0.3, "std": STD},
        {"mean": 0, "std": 1 / 255},
    ],
)
def test_images_are_compared_with_what_mean_and_std_make_of_pixels(preprocess, path):
    dark = normalized(pixels() // 200)  # less than 2 of the 256 levels
    data = dark if preprocess["std"] is not STD and np.min(preprocess["std"]) < 0.1 else normalized(pixels())
    with pytest.raises(InputError, match="expected calibration images as mean and std make them of pixels, .* got"):
        export(small(), X[:1], path, data, fallback_bits=8, preprocess=preprocess)
    assert not path.exists()


def test_raw_images_give_what_floats_give(path):
    raw = pixels()
    export(small(), X[:1], path, normalized(raw), fallback_bits=8, preprocess={"mean": MEAN, "std": STD})
    model = qdeploy.load_int_model(path)
    assert np.abs(model(raw) - model(normalized(raw))).max() < 0.02 * np.abs(model(raw)).max()


# ---- One logit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flat", [lambda y: y, lambda y: y.squeeze(1), lambda y: y.flatten(0), lambda y: torch.sigmoid(y)]
)
def test_one_logit(flat, path):
    """It may come out as [N, 1] or as [N]; in the file it is [N, 1]. Of one score there is no largest."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small(1)

        def forward(self, x):
            return flat(self.body(x))

    net = Net()
    report = export(net, X[:1], path, X, fallback_bits=8)
    model = qdeploy.load_int_model(path)
    with torch.no_grad():
        expected = net(X).numpy().reshape(-1, 1)
    assert np.abs(model(X.numpy()) - expected).max() < 0.05 * np.abs(expected).max()
    assert report.output_sqnr_db > 20
    with pytest.raises(InputError, match=r"two or more scores, got one \(its sign says the class\) - at predict"):
        model.predict(X.numpy())
    with pytest.raises(InputError, match="members with two or more logits, .* got one logit"):
        export_ensemble([net, net], X[:1], path, X, fallback_bits=8)


# ---- The report -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [nn.Identity(), nn.MaxPool2d(2)])
def test_layers_are_compared_behind_their_quantizer(pool, path):
    """What training rounded is no error of the integers."""
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), pool, nn.Conv2d(8, 8, 3), nn.ReLU(), *head).eval()
    quantize_(net, 4, 2, calibration=[X], init="minmax")
    report = export(net, X[:1], path, X)
    _, taps = qdeploy.load_int_model(path)(X.numpy(), taps=["0"])
    with torch.no_grad():
        expected = quantizers(net)["3.input"].codes(net[1](net[0](X))).numpy()
    assert np.array_equal(taps["0"], expected)
    assert report.layers[0].sqnr_db is None  # no error


@pytest.mark.parametrize(
    "data, words",
    [
        (torch.zeros(8, 3, 8, 8), "the 8 images hold nothing but the number 0"),
        (torch.full((8, 3, 8, 8), 0.5), "the 8 images hold nothing but the number 0.5"),
        (X[:1].repeat(8, 1, 1, 1), "the 8 images are all the same"),
    ],
)
def test_calibration_that_says_nothing(data, words, path):
    with pytest.warns(UserWarning, match=words):
        report = export(small(), X[:1], path, data, fallback_bits=8)
    assert words in str(report)


def test_agreement_on_one_class_is_said_to_be_none(path):
    net = small()
    with torch.no_grad():
        net[8].bias[2] += 100
    report = export(net, X[:1], path, X, fallback_bits=8)
    assert "warning: all 16 images are of one class for the network" in str(report)


def test_a_sign_is_the_class_of_one_logit(path):
    net = small(1)
    with torch.no_grad():
        net[8].bias -= net(X).median()
    report = export(net, X[:1], path, X, fallback_bits=8)
    assert not report.warnings and report.top1_agreement > 0.8


def test_torch_says_nothing_beside_the_error():
    """It logs what fails while it traces, at the level of errors; pytest would swallow that in its own process."""
    code = (
        "import qdeploy, torch\n"
        "try:\n    qdeploy.check(torch.nn.Linear(3, 3), torch.zeros(1, 4))\n"
        "except qdeploy.ExportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("expected a network that torch.export traces ") and done.stderr == ""
