"""Networks of models.py beside torchvision's, and those that a run names otherwise."""

import copy
import pickle
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import qdeploy
from qdeploy import export, format, reference
from qdeploy.errors import InputError
from qdeploy.networks.quantizable import classifier
from qdeploy.training import project_steps_, quantize_, quantize_like_, quantizers, step_group
from qdeploy.training.methods.features import tap_features
from qdeploy.training.methods.objectives import CORAL, SelfDistillation
from qdeploy.training.models import MODELS
from qdeploy.training.networks_by_name import build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


def parameters(net):
    return sum(parameter.numel() for parameter in net.parameters())


def on_meta(name, *arguments, **options):
    with torch.device("meta"):
        return build(name, *arguments, **options)


# ---- Networks of models.py -------------------------------------------------------------------------------------------


def vgg19_parameters(classes, channels):
    widths = [channels, 64, 64, 128, 128, *[256] * 4, *[512] * 8]
    return sum(9 * a * b + 3 * b for a, b in zip(widths, widths[1:], strict=False)) + 513 * classes


def mobilenet_v1_parameters(classes, channels):
    widths = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    blocks = sum(9 * a + 2 * a + a * b + 2 * b for a, b in zip(widths, widths[1:], strict=False))
    return 9 * channels * 32 + 64 + blocks + 1025 * classes


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "count"), [("vgg19_bn_32px", vgg19_parameters), ("mobilenet_v1_32px", mobilenet_v1_parameters)]
)
def test_networks_for_32_pixels(name, count, channels):
    net = on_meta(name, 10, channels)
    assert parameters(net) == count(10, channels)
    assert net(torch.empty(2, channels, 32, 32, device="meta")).shape == (2, 10)
    assert net.features(torch.empty(2, channels, 32, 32, device="meta")).shape[2] == (1 if "vgg" in name else 2)
    assert classifier(net) == "classifier"


def test_published_sizes_of_the_networks_for_32_pixels():
    assert (vgg19_parameters(10, 3), mobilenet_v1_parameters(10, 3)) == (20_040_522, 3_217_226)


def test_a_small_mobilenet_exports(tmp_path):
    net, x = build("mobilenet_v1_32px", 5, 1, dropout=0.2), torch.randn(2, 1, 32, 32)
    net(x)
    quantize_(net, 7)
    export(net.eval(), x[:1], tmp_path / "net.safetensors", x)
    got = reference.run(format.load(tmp_path / "net.safetensors"), x.numpy())
    assert np.array_equal(qdeploy.load_int_model(tmp_path / "net.safetensors")(x.numpy()), got)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_right_before_the_classifier(name):
    usual = {"mobilenet_v2": 0.2, "vgg16_bn": 0.5}.get(name, 0)
    plain, dropping = on_meta(name, 4, 3), on_meta(name, 4, 3, dropout=0.3)
    assert {module.p for module in plain.modules() if isinstance(module, nn.Dropout)} == ({usual} if usual else set())
    assert [*plain.state_dict()] == [*dropping.state_dict()]
    if name == "vgg16_bn":  # as torchvision's, it has two
        assert [module.p for module in dropping.modules() if isinstance(module, nn.Dropout)] == [0.3, 0.3]
        return
    head = dropping.get_submodule(classifier(dropping))
    seen = []
    drop = next(module for module in dropping.modules() if isinstance(module, nn.Dropout))
    assert drop.p == 0.3
    drop.register_forward_hook(lambda module, args, output: seen.append(output))
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    dropping(torch.empty(2, 3, 64, 64, device="meta"))
    assert seen[0] is seen[1]


def test_options_reach_the_constructor():
    assert parameters(on_meta("nin", 10, 3, depth=4, width=10)) == 2_205_780
    assert parameters(on_meta("nin", 10, 3, depth=2, width=1)) == 9_530


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("nim", {}, "expected one of resnet18, .*nin, .*or timm:NAME, transformers:ClassName or "
                    "package.module:callable, got 'nim' - at --model"),
        ("nin", {"deepth": 3, "width": 1}, "options among depth, width, dropout, got deepth - at --model nin"),
        ("resnet18", {"groups": 2}, "options among dropout, got groups - at --model resnet18"),
        ("nin", {"depth": 0}, "expected depth and width of 1 or more, got 0 and 2 - at NiN"),
        ("nin", {"width": "2"}, "options that make a network, got TypeError: .* - at --model nin"),
        ("resnet50", {"dropout": 1.0}, "expected a share to drop from 0 to below 1, got 1.0 - at dropout"),
        ("mobilenet_v2", {"dropout": -1}, "expected a share to drop"),
        ("vgg16_bn", {"dropout": float("nan")}, "expected a share to drop"),
    ],
)  # fmt: skip
def test_wrong_names_and_options_are_one_line(name, options, text):
    with pytest.raises(InputError, match=text) as error:
        on_meta(name, 4, 3, **options)
    assert "\n" not in str(error.value)


# ---- One's own -------------------------------------------------------------------------------------------------------


def tiny(classes, in_channels, hidden=4, *, bias=True):
    return nn.Sequential(nn.Conv2d(in_channels, hidden, 3), nn.Flatten(), nn.LazyLinear(classes, bias=bias))


@pytest.fixture
def own(monkeypatch):
    """A module of the user's own."""
    module = types.ModuleType("own_networks")
    module.tiny, module.number, module.anything = tiny, 3, lambda classes, **options: tiny(classes, **options)
    module.words, module.broken = (lambda classes, in_channels: "a network"), (lambda classes, in_channels: 1 / 0)
    module.ready = partial(tiny, bias=False)
    monkeypatch.setitem(sys.modules, "own_networks", module)


def test_a_callable_by_its_path(own):
    assert build("own_networks:tiny", 5, 2, hidden=3)[0].weight.shape == (3, 2, 3, 3)
    assert build("own_networks:anything", 5, 1, bias=False)[2].bias is None
    assert build("own_networks:ready", 5, 1)[2].bias is None


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("no_such.package:f", {}, "expected a module to import, got ModuleNotFoundError: No module named "
                                  "'no_such' - at --model no_such.package:f"),
        (":f", {}, "expected a module to import, got ValueError"),
        ("own_networks:small", {}, "expected a callable `small` in own_networks, got none - at --model own_net"),
        ("own_networks:number", {}, "expected a callable `number` in own_networks, got a int"),
        ("own_networks:tiny", {"width": 1}, "options among hidden, bias, got width - at --model own_networks:tiny"),
        ("own_networks:anything", {"width": 1}, "got TypeError: .* unexpected keyword argument 'width'"),
        ("own_networks:words", {}, "expected a torch.nn.Module, got str - at --model own_networks:words"),
        ("own_networks:words", {"x": 1}, "expected no options, got x - at --model own_networks:words"),
        ("own_networks:broken", {}, "got ZeroDivisionError: division by zero - at --model own_networks:broken"),
    ],
)  # fmt: skip
def test_wrong_callables_are_one_line(own, name, options, text):
    with pytest.raises(InputError, match=text) as error:
        build(name, 4, 3, **options)
    assert "\n" not in str(error.value)


# ---- timm: a stand-in. The package needs torchvision, whose wheels load beside one version of torch alone ------------


class OfTimm(nn.Module):
    def __init__(self, num_classes=1000, in_chans=3, depth=1, drop_rate=0.0, **rest):
        super().__init__()
        if rest:
            raise TypeError(f"OfTimm.__init__() got an unexpected keyword argument {next(iter(rest))!r}")
        self.stem, self.head = nn.Conv2d(in_chans, 4 * depth, 4), nn.Linear(4, num_classes)


class Strict(OfTimm):
    def __init__(self, num_classes=1000, in_chans=3, depth=1, drop_rate=0.0):
        super().__init__(num_classes, in_chans, depth, drop_rate)


@pytest.fixture
def timm(monkeypatch):
    module = types.ModuleType("timm")
    known = {"deit_small_patch16_224": Strict, "deit_tiny_patch16_224": OfTimm}
    module.is_model, module.list_models = known.__contains__, lambda: [*known]
    module.calls = []

    def create_model(name, pretrained=True, **options):
        module.calls.append((name, pretrained))
        return known[name](**options)

    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


def test_a_network_of_timm_is_never_pretrained(timm):
    net = build("timm:deit_small_patch16_224", 5, 1, depth=2)
    assert (net.stem.weight.shape, net.head.out_features) == ((8, 1, 4, 4), 5)
    with pytest.raises(InputError, match=r"options among depth, drop_rate, got dropout - at --model timm:deit_small"):
        build("timm:deit_small_patch16_224", 5, 1, dropout=2)
    with pytest.raises(
        InputError, match="got TypeError: .*unexpected keyword argument 'dropout' - at --model timm:deit_ti"
    ):
        build("timm:deit_tiny_patch16_224", 5, 1, dropout=2)
    with pytest.raises(
        InputError, match=r"expected a network of timm \(deit_small_patch16_224, .*\), got 'deit_smal_patch"
    ):
        build("timm:deit_smal_patch16_224", 5, 1)
    assert timm.calls and not any(pretrained for _, pretrained in timm.calls)


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_a_package_that_is_not_there(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf'expected the package {name} \(pip install "qdeploy\[models\]"\), got '):
        build(f"{name}:x", 4, 3)


def test_a_package_that_does_not_load_says_why(monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text("import torchvision_of_another_torch")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="got No module named 'torchvision_of_another_torch' - at --model timm:"):
        build("timm:x", 4, 3)


# ---- transformers ----------------------------------------------------------------------------------------------------

VIT = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
)
SWIN = dict(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
NETWORKS = {"ViTForImageClassification": VIT, "DeiTForImageClassification": VIT, "SwinForImageClassification": SWIN}


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="the `models` extra is not installed")


def images(channels=3):
    return torch.randn(4, channels, 16, 16)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_transformers_gives_logits(transformers, name):
    net = build(f"transformers:{name}", 5, 1, **NETWORKS[name]).eval()
    x = images(1)
    inner = getattr(transformers, name)(net.config).eval()
    inner.load_state_dict(net.state_dict())  # its own names, without one of a wrapper
    assert torch.equal(net(x), inner(x).logits) and net(x).shape == (4, 5)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), net(x))


@pytest.mark.filterwarnings("ignore:expected a network that qdeploy.export can write")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_transformers_trains_quantized(transformers, name):
    net = build(f"transformers:{name}", 5, 3, **NETWORKS[name])
    assert classifier(net) == "classifier"
    x, classes = images(), torch.arange(4)
    quantize_(net, 4, 8, calibration=x)  # no matrix is left over but the classifier's
    names = {key.rpartition(".")[0] for key in quantizers(net)}
    linear = {key for key, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert names == linear - {"classifier"}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    optimizer.param_groups.clear()
    steps = step_group(net, 1e-4)
    others = [one for one in net.parameters() if all(one is not step for step in steps["params"])]
    for group in ({"params": others}, steps):
        optimizer.add_param_group(group)
    losses = []
    for _ in range(8):
        loss = functional.cross_entropy(net(x), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        project_steps_(net)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    again = build(f"transformers:{name}", 5, 3, **NETWORKS[name])
    quantize_like_(again, net.state_dict())
    assert torch.equal(again.eval()(x), net.eval()(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_features_of_transformers_are_what_the_classifier_reads(transformers, name):
    net = build(f"transformers:{name}", 5, 3, **NETWORKS[name]).eval()
    with tap_features(net) as tapped:
        logits = net(images())
    assert tapped.value.shape == (4, 16) and torch.equal(net.classifier(tapped.value), logits)
    loss = CORAL().loss(net, [(images(), torch.arange(4)), (images(), torch.arange(4))], torch.Generator())
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("name", "body"), [("ViTForImageClassification", "vit"), ("DeiTForImageClassification", "deit")]
)
def test_self_distillation_of_transformers(transformers, name, body):
    net = build(f"transformers:{name}", 5, 3, **VIT, initializer_range=0.5).eval()
    blocks = next(key for key, module in net.named_modules() if isinstance(module, nn.ModuleList))
    objective = SelfDistillation(0.5, 3.0, blocks, f"{body}.layernorm", "classifier")
    x, classes = images(), torch.arange(4)
    plain = functional.cross_entropy(net(x), classes)
    losses = [objective.loss(net, [(x, classes)], torch.Generator().manual_seed(seed)) for seed in range(8)]
    last = [loss for loss in losses if torch.allclose(loss, plain, rtol=1e-5)]
    assert 0 < len(last) < 8 and all(loss > plain - 1e-5 for loss in losses)  # the last block knows what it knows


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("ViTForImageClasification", {}, r"expected a network of transformers \(ViTForImageClassification, .*\), got "
                                         "'ViTForImageClasification' - at --model transformers:"),
        ("ViTConfig", {}, "got 'ViTConfig'"),
        ("ViTForImageClassification", {"hidden": 3}, "options among hidden_size, .*, got hidden - at --model transf"),
        ("ViTForImageClassification", {"num_channels": 3}, "got num_channels - at --model transf"),
        ("ViTForImageClassification", {"num_labels": 3}, "got num_labels - at --model transf"),
        ("ViTForImageClassification", {"hidden_size": "x"}, "expected options that make a network, got "),
    ],
)  # fmt: skip
def test_wrong_networks_of_transformers_are_one_line(transformers, name, options, text):
    with pytest.raises(InputError, match=text) as error:
        build(f"transformers:{name}", 4, 3, **options)
    assert "\n" not in str(error.value)


def test_a_network_of_transformers_without_logits(transformers):
    net = build("transformers:ViTModel", 4, 3, **VIT)
    with pytest.raises(
        InputError, match="expected an output with logits .* got BaseModelOutputWithPooling of ViTModel"
    ):
        net(images())
