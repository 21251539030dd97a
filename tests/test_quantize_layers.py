"""Weights and inputs chosen apart, by layer; matrices that would stay float in silence."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import qdeploy
from qdeploy import export, format, reference
from qdeploy.errors import ExportError, InputError
from qdeploy.kernels.lsq import lsq_many
from qdeploy.training import one_launch, quantize_, quantize_like_, quantizers, summary
from qdeploy.training.float_matrices import check_matrices
from qdeploy.training.methods.inq import INQ
from qdeploy.training.methods.quantizations import LSQ, OBC, RTN, UniformNoise

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


class Chain(nn.Module):
    """Signed images, then what ReLU leaves; `conv2` and `side` read one tensor."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2, self.side = nn.Conv2d(8, 6, 3, stride=2), nn.Conv2d(8, 6, 3, stride=2)
        self.block = nn.Sequential(nn.Conv2d(12, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU())
        self.fc = nn.Linear(36, 5)

    def forward(self, x):
        x = self.conv1(x).relu()
        x = torch.cat([self.conv2(x).relu(), self.side(x).relu()], 1)
        return self.fc(self.block(x).flatten(1))


LAYERS = ["conv1", "conv2", "side", "block.0", "block.2", "fc"]


def images(count=16):
    return torch.randn(count, 3, 8, 8)


def bits_of(net):
    return {name: quantizer.bits for name, quantizer in quantizers(net).items()}


@pytest.mark.parametrize(
    ("weights", "inputs", "expected"),
    [
        ({"conv1": 8, "fc": 2}, None, {"conv1.weight": 8, "fc.weight": 2}),
        ({"*": 4}, None, {f"{name}.weight": 4 for name in LAYERS[:-1]}),
        ({"*": 4, "fc": 3}, None, {f"{name}.weight": 4 for name in LAYERS[:-1]} | {"fc.weight": 3}),
        ({"*": 4, "block.*": 6, "*.2": None}, None,
         {"conv1.weight": 4, "conv2.weight": 4, "side.weight": 4, "block.0.weight": 6}),
        ({"conv1": 8, "conv?": 5}, None, {"conv1.weight": 5, "conv2.weight": 5}),  # the last counts, name or pattern
        (6, {"conv1": 4}, {f"{name}.weight": 6 for name in LAYERS[:-1]} | {"conv1.input": 4}),
        ({"block.*": 6}, 3, {"block.0.weight": 6, "block.0.input": 3, "block.2.weight": 6, "block.2.input": 3}),
        ({"*": None}, {"block.0": 8}, {"block.0.input": 8}),
        ({"block.0": 3}, {"*": 4, "conv[12]": None, "side": None, "fc": 2},
         {"block.0.weight": 3, "block.0.input": 4, "block.2.input": 4, "fc.input": 2}),
    ],
)  # fmt: skip
def test_bits_by_name_and_pattern(weights, inputs, expected):
    net = Chain()
    quantize_(net, weights, inputs, calibration=images())
    assert bits_of(net) == expected


def test_numbers_and_patterns_leave_what_skip_names():
    net = Chain()
    quantize_(net, 4, {"*": 8, "side": 8}, skip=["block.0", "side"], calibration=images())
    assert "fc.weight" in bits_of(net) and not {"block.0.weight", "side.weight", "block.0.input"} & {*bits_of(net)}
    assert bits_of(net)["fc.input"] == bits_of(net)["side.input"] == 8


NAMES, SOME = (
    "expected names of convolutions or linear layers, got ",
    r" - at quantize_ \(there are conv1, conv2, side, ...\)",
)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"weight_bits": {"*": 4, "layer9.*": 8}}, NAMES + r"layer9\.\*" + SOME),
        ({"activation_bits": {"conv3": 4}}, NAMES + "conv3" + SOME),
        ({"weight_bits": {"f*": 4}}, NAMES + r"f\*, which matches `fc` alone: a pattern leaves that out, its name"),
        ({"weight_bits": {7: 4}}, NAMES + "7" + SOME),
        ({"weight_bits": {"conv1": 4, "block.*": 9}}, "expected 2 to 8 bits, got 9 - at layer `block.0`"),
        ({"activation_bits": {"*": 1}}, "expected 2 to 8 bits, got 1 - at the input of layer `conv1`"),
        ({"weight_bits": {"*": None}}, "layer to quantize, got none but what is left alone"),
        ({"activation_bits": {"conv1": 4}, "calibration": None}, "expected calibration batches"),
        ({"activation_bits": {"*": 4, "side": 8}},
         "same bits for layers that read one tensor, got 4 for `conv2` and 8 - at layer `side`"),
    ],
)  # fmt: skip
def test_errors_leave_the_network_as_it_was(arguments, text):
    net = Chain()
    before = [*net.state_dict()]
    with pytest.raises(InputError, match=text):
        quantize_(net, **{"calibration": images(), **arguments})
    assert [*net.state_dict()] == before and not any(module._forward_pre_hooks for module in net.modules())


def test_an_input_is_quantized_once():
    net = Chain()
    quantize_(net, {"conv1": 8}, calibration=images())
    quantize_(net, {"*": None}, {"conv1": 8}, calibration=images())  # the other half
    with pytest.raises(InputError, match="got one quantized before - at layer `conv1`"):
        quantize_(net, {"conv2": 8}, {"conv1": 8}, calibration=images())
    assert bits_of(net) == {"conv1.weight": 8, "conv1.input": 8}


def first_layer_in_float(bits):
    """As GAQAT has it: of the first convolution only the input is quantized."""
    net = Chain()
    quantize_(net, {"*": bits, "conv1": None}, {"*": bits, "fc": bits}, per_channel=False, init="mse",
              calibration=images())  # fmt: skip
    return net.eval()


def test_summary_tells_what_is_in_float():
    net = first_layer_in_float(4)
    rows = {row.name: row for row in summary(net)}
    assert [*rows] == LAYERS
    assert (rows["conv1"].shape, rows["conv1"].bits, rows["conv1"].input_bits) == ((8, 3, 3, 3), None, 4)
    assert (rows["conv1"].step, rows["conv1"].mse_step, rows["conv1"].error) == (None, None, 0)
    assert (rows["conv2"].bits, rows["conv2"].input_bits) == (4, 4) and rows["conv2"].error > 0


def test_copies_and_reloaded_networks_are_the_same():
    net, x = first_layer_in_float(4), images()
    reloaded = Chain()
    quantize_like_(reloaded, net.state_dict())
    for other in (reloaded.eval(), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert bits_of(other) == bits_of(net) and torch.equal(other(x), net(x))
        assert quantizers(other)["conv2.input"] is quantizers(other)["side.input"]
        other.conv1.input_quantizer.step.data *= 2
        assert not torch.equal(other(x), net(x))
    with pytest.raises(InputError, match="got one quantized before - at layer `conv1`"):
        quantize_like_(net, {name: value for name, value in net.state_dict().items() if name.startswith("conv1.")})


def test_steps_of_inputs_alone_learn():
    net = first_layer_in_float(4).train()
    functional.cross_entropy(net(images()), torch.arange(16) % 5).backward()
    assert all(quantizer.step.grad.abs().sum() > 0 for quantizer in quantizers(net).values())
    assert net.conv1.weight.grad.abs().sum() > 0


def test_one_launch_leaves_float_weights_out(monkeypatch):
    launched = []

    def together(values, *rest):
        launched.append(len(values))
        return lsq_many(values, *rest)

    net, only_inputs, x = first_layer_in_float(4), Chain().eval(), images()
    quantize_(only_inputs, {"*": None}, {"*": 4}, calibration=x)
    expected, expected_of_inputs = net(x), only_inputs(x)
    monkeypatch.setattr(one_launch, "on_gpu", lambda value: True)  # the CPU is taken for a GPU
    monkeypatch.setattr(one_launch, "lsq_many", together)
    assert torch.equal(net(x), expected) and launched == [len(LAYERS) - 2]
    assert torch.equal(only_inputs(x), expected_of_inputs) and len(launched) == 1


@pytest.mark.parametrize("bits", [3, 4])
def test_inputs_alone_export(bits, tmp_path):
    """The file is the fake-quant network whose first and last weights are rounded to 8 bits, to f32 rounding."""
    net, x, path = first_layer_in_float(bits), images(), tmp_path / "net.safetensors"
    with pytest.raises(ExportError, match="got a float32 weight - at weight of module `conv1`"):
        export(net, x[:1], path)
    export(net, x[:1], path, fallback_bits={"conv1": 8})  # no calibration data: all tensors have learned grids
    graph = format.load(path)
    got = reference.run(graph, x.numpy())
    assert np.array_equal(qdeploy.load_int_model(path)(x.numpy()), got)

    nodes = {node.name: node for node in graph.members[0].nodes}
    assert {name: nodes[name].bits for name in LAYERS} == dict.fromkeys(LAYERS, bits) | {"conv1": 8, "fc": 8}
    for name in ("conv1", "conv2", "side", "block.0", "block.2"):  # what the next layer reads
        assert nodes[name].attributes["clamp"] == [0, 2**bits - 1]
    assert nodes["conv1.input_quantizer"].constants["table"].max() == 2**bits - 1
    for name in ("conv2", "block.0"):
        codes = quantizers(net)[f"{name}.weight"].codes(net.get_submodule(name).parametrizations.weight.original)
        assert np.array_equal(nodes[name].constants["weight"], codes.numpy())

    for layer in (net.conv1, net.fc):
        step = layer.weight.detach().flatten(1).abs().amax(1).reshape(-1, *[1] * (layer.weight.dim() - 1)) / 127
        layer.weight.data = (layer.weight.data / step).round() * step
    expected = net(x).detach().numpy()
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_weights_alone_export_by_layer(tmp_path):
    net, x, path = Chain(), images(), tmp_path / "net.safetensors"
    quantize_(net, {"*": 5, "block.*": 3}, {"block.*": 4}, calibration=x)
    export(net.eval(), x[:1], path, x)
    graph = format.load(path)
    assert np.array_equal(qdeploy.load_int_model(path)(x.numpy()), reference.run(graph, x.numpy()))
    nodes = {node.name: node for node in graph.members[0].nodes}
    assert [nodes[name].bits for name in LAYERS] == [5, 5, 5, 3, 3, 8]
    assert nodes["block.0"].attributes["clamp"] == [0, 15] and nodes["conv1"].attributes["clamp"] == [0, 255]


def test_methods_take_patterns():
    batches = [(images(4), torch.arange(4))]
    for method in (LSQ(0, {"*": 4, "conv1": None}, {"*": 4}), INQ(0, 4, {"*": 4, "conv1": None}),
                   RTN({"*": 4, "conv1": None}), OBC({"*": 4, "conv1": None})):  # fmt: skip
        net = Chain()
        method.attach(net, torch.optim.SGD(net.parameters(), lr=0.1), batches)
        weights = {name: bits for name, bits in bits_of(net).items() if name.endswith("weight")}
        assert weights == {f"{name}.weight": 4 for name in LAYERS[1:-1]}


# ---- Matrices outside of layers --------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """As torchvision's ViT is written."""

    def __init__(self):
        super().__init__()
        self.conv_proj = nn.Conv2d(3, 8, 4, 4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embedding = nn.Parameter(torch.randn(1, 5, 8))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv_proj(x).flatten(2).mT
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.pos_embedding
        return self.head(self.encoder(x)[:, 0])


ATTENTION = (r"expected matrices that are weights of convolutions or linear layers, got `encoder.layers.0.self_attn."
             r"in_proj_weight` \[24, 8\], `encoder.layers.1.self_attn.in_proj_weight` \[24, 8\] "
             r"\(allow it to stay float by name: allow_float\) - at quantize_")  # fmt: skip


def test_the_projections_of_attention_are_quantized():
    net = Transformer()
    quantize_(net, {"encoder.*": 4})
    assert len(quantizers(net)) == 2 * 4  # in_proj_weight, out_proj and two linear layers
    quantizer = quantizers(net)["encoder.layers.0.self_attn.in_proj_weight"]
    assert quantizer.bits == 4 and quantizer.step.shape == (24,)
    functional.cross_entropy(net(images(4)), torch.arange(4)).backward()
    assert all(quantizer.step.grad.abs().sum() > 0 for quantizer in quantizers(net).values())
    other = Transformer()
    quantize_like_(other, net.state_dict())
    x = images(4)
    assert torch.equal(net.eval()(x), other.eval()(x))
    row = summary(net)[0]
    assert (row.name, row.shape, row.bits) == ("encoder.layers.0.self_attn", (24, 8), 4)
    with pytest.raises(InputError, match="got a MultiheadAttention - at layer `encoder.layers.0.self_attn`"):
        quantize_(Transformer(), 4, {"encoder.layers.0.self_attn": 8}, calibration=[images(4)])


def test_embeddings_are_quantized_but_for_those_of_positions():
    net = nn.ModuleDict({"words": nn.Embedding(9, 8), "pos": nn.Embedding(4, 8), "fc": nn.Linear(8, 3)})
    quantize_(net, 5, skip=[])
    assert quantizers(net).keys() == {"words.weight", "fc.weight"}
    assert quantizers(net)["words.weight"].step.shape == (9,)
    renormed = nn.ModuleDict({"words": nn.Embedding(9, 8, max_norm=1.0), "fc": nn.Linear(8, 3)})
    quantize_(renormed, 5, skip=[])
    assert quantizers(renormed).keys() == {"fc.weight"}


@pytest.mark.filterwarnings("ignore:expected a network that qdeploy.export can write")
@pytest.mark.parametrize("method", [INQ(0, 4), OBC(), UniformNoise()], ids=lambda one: type(one).__name__)
def test_methods_refuse_and_allow(method):
    batches = [(images(4), torch.arange(4))]
    net = Transformer()
    with pytest.raises(InputError, match=ATTENTION):
        method.attach(net, torch.optim.SGD(net.parameters(), lr=0.1), batches)


@pytest.mark.filterwarnings("ignore:expected a network that qdeploy.export can write")
def test_methods_allow():
    for method in (INQ(0, 4, allow_float=("*.in_proj_weight",)),
                   RTN(allow_float=("*.in_proj_weight",)), UniformNoise(allow_float=("*.in_proj_weight",)),
                   OBC({"*": 7, "*.out_proj": None}, allow_float=("*.in_proj_weight",))):  # fmt: skip
        net = Transformer()
        method.attach(net, torch.optim.SGD(net.parameters(), lr=0.1), [(images(4), torch.arange(4))])
        net.train()(images(2)).sum().backward()


def holder(**parameters):
    net = nn.Module()
    for name, shape in parameters.items():
        setattr(net, name, nn.Parameter(torch.zeros(shape)))
    return net


@pytest.mark.parametrize(
    "net",
    [
        nn.ConvTranspose2d(2, 3, 2), nn.Conv3d(2, 3, 1), nn.LSTM(2, 3), nn.Bilinear(2, 3, 2),
        nn.utils.parametrizations.spectral_norm(nn.ConvTranspose2d(2, 3, 2)),
        nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2, kdim=3, vdim=3),
        holder(proj=(8, 4)), holder(W=(2, 2)), holder(text_projection=(8, 4)), holder(weight=(1, 8, 4)),
        holder(gate_up_proj=(2, 8, 4)), holder(pos_proj=(8, 4)), holder(token_mixing_weight=(8, 4)),
        holder(core=(2, 2)), holder(transposed=(2, 3)),
    ],
    ids=lambda net: next(name for name, _ in net.named_parameters()),
)  # fmt: skip
def test_what_multiplies_is_found(net):
    name = next(name for name, value in net.named_parameters() if value.dim() > 1)
    with pytest.raises(InputError, match=f"got `at.{name}` "):
        check_matrices(nn.ModuleDict({"at": net, "fc": nn.Linear(2, 3)}), [])
    check_matrices(nn.ModuleDict({"at": net}), ["at.*"])


def test_a_matrix_beside_the_weight_of_a_linear_layer_is_found():
    layer = nn.Linear(4, 4)
    layer.lora_A = nn.Parameter(torch.zeros(2, 4))
    with pytest.raises(InputError, match="got `0.lora_A` "):
        quantize_(nn.Sequential(layer, nn.Linear(4, 4)))


@pytest.mark.parametrize(
    "net",
    [
        nn.Linear(2, 3), nn.Conv1d(2, 3, 2), nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)),
        nn.Embedding(3, 4), nn.EmbeddingBag(3, 4), nn.LayerNorm((2, 3)), nn.RMSNorm((2, 3)), nn.PReLU(3),
        holder(pos_embed=(1, 5, 8), cls_token=(1, 1, 8), mask_token=(1, 1, 8)), holder(position_embeddings=(1, 5, 8)),
        holder(positional_embedding=(5, 8), class_embedding=(8,)), holder(absolute_pos_embed=(1, 9, 8)),
        holder(relative_position_bias_table=(9, 2)), holder(attention_biases=(2, 9)), holder(rel_pos_h=(9, 4)),
        holder(gate_up_proj_bias=(4, 6)), holder(gamma=(8, 1, 1)), holder(logit_scale=(3, 1, 1)),
        holder(query_tokens=(1, 4, 8)),
    ],
    ids=lambda net: next(name for name, _ in net.named_parameters()),
)  # fmt: skip
def test_what_is_added_or_looked_up_is_not(net):
    check_matrices(nn.ModuleDict({"at": net}), [])


def test_tied_embeddings_are_no_matrices():
    net = nn.ModuleDict({"embedding": nn.Embedding(4, 3)})
    net["out"] = holder(decoder=(4, 3))
    net["out"].decoder = net["embedding"].weight
    check_matrices(net, [])
