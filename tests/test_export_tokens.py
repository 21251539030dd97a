"""Networks of tokens: vision transformers, windows, texts. The emulation does not round the weights of attention."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emulated import Net, check, images, ops, quantized
from torch import nn

import qdeploy
from qdeploy import ExportError, export, format, reference
from qdeploy.training import quantize_, quantizers

torch.set_num_threads(1)
WIDTH, HEADS = 16, 2


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


def nodes(graph, op):
    return [node for node in graph.members[0].nodes if node.op == op]


def dtypes(graph, op):
    return {graph.members[0].tensors[node.output].dtype for node in nodes(graph, op)}


def drawn(net):
    """Norms and embeddings with gains and shifts that matter."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net


# ---- A vision transformer --------------------------------------------------------------------------------------------


def heads(x):
    return x.reshape(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)


def merged(x):
    return x.transpose(1, 2).flatten(2)


def by_operator(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def by_products(q, k, v):
    weights = q @ k.transpose(-2, -1)  # of queries that are scaled already
    return F.dropout(weights.softmax(-1), 0.1, training=False) @ v


def vision(attend, node):
    """Class token, positions, a fused projection, LayerScale, a mean or a class token at the end."""

    def flow(net, x):
        x = net.q("conv", net.conv(x)).flatten(2).transpose(1, 2)
        x = torch.cat([net.cls.to(x.dtype).expand(x.shape[0], -1, -1), x], 1) + net.pos.to(x.dtype)
        x = net.q("cat", x)
        y = net.q("ln1", net.ln1(x))
        q, k, v = net.qkv(y).chunk(3, 2)
        q = q * (WIDTH // HEADS) ** -0.5 if attend is by_products else q
        q, k, v = (heads(net.q(name, part)) for name, part in zip(("qkv", "qkv#2", "qkv#3"), (q, k, v), strict=True))
        y = net.q(node, merged(attend(q, k, v)))
        x = net.q("proj", x + net.proj(y) * net.gamma.to(x.dtype))
        y = net.q("fc1", net.fc1(net.q("ln2", net.ln2(x))))
        x = net.q("fc2", x + net.fc2(net.q("gelu", F.gelu(y))))
        return net.head(net.q("ln", net.ln(x))[:, 0])

    modules = {
        **{"conv": nn.Conv2d(3, WIDTH, 4, 4), "qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)},
        **{"fc1": nn.Linear(WIDTH, 32), "fc2": nn.Linear(32, WIDTH), "head": nn.Linear(WIDTH, 5)},
        **{"ln1": nn.LayerNorm(WIDTH), "ln2": nn.LayerNorm(WIDTH), "ln": nn.LayerNorm(WIDTH)},
    }
    net = drawn(Net(flow, **modules))
    net.cls, net.pos = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 17, WIDTH) / 3)
    net.gamma = nn.Parameter(torch.rand(WIDTH) + 0.5)
    return quantized(net, 8)


@pytest.mark.parametrize(("attend", "node"), [(by_operator, "scaled_dot_product_attention"), (by_products, "matmul")])
def test_vision_transformer(attend, node, path):
    report, graph = check(vision(attend, node), (3, 16, 16), path, tolerance=0.02)
    linear = ["norm", "linear"]
    assert ops(graph) == [
        *("conv2d", "tokens", "position", "norm", "linear", "linear", "linear", "attention", "linear"),
        *(*linear, "table", "linear", "gather", "norm", "reshape", "linear"),
    ]
    streams = [t.name for t in graph.members[0].tensors if t.dtype == "s16"]
    assert streams == [
        "conv",
        "cat#2",
        "cat",
        "proj",
        "fc2",
        "head#2",
    ]  # the last one is the class token before its norm
    attention = nodes(graph, "attention")[0]
    assert attention.attributes["heads"] == HEADS and attention.attributes["peak"] == 32767
    assert report.output_sqnr_db > 30
    weight = np.concatenate([node.constants["weight"] for node in nodes(graph, "linear")[:3]])
    net = vision(attend, node)
    assert np.array_equal(weight, quantizers(net)["qkv.weight"].codes(net.qkv.parametrizations.weight.original).numpy())


class Attends(nn.Module):
    def __init__(self, batch_first, **options):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.head, self.options = nn.Linear(8, 5), options

    def forward(self, x):
        x = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        x = x if self.attention.batch_first else x.transpose(0, 1)
        x = x + self.attention(x, x, x, **self.options)[0]
        return self.head(x.mean(1 if self.attention.batch_first else 0))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"need_weights": False}])
def test_multihead_attention(batch_first, options, path):
    net = drawn(Attends(batch_first, **options)).eval()
    quantize_(net, 7, skip=[])
    x = images((3, 16, 16))
    report = export(net, x[:1], path, x)
    graph = format.load(path)
    made = ops(graph)
    assert made.count("linear") == 4 and made.count("attention") == 1 and "gather" not in made and "add" not in made
    assert report.output_sqnr_db > 25
    quantizer = quantizers(net)["attention.in_proj_weight"]
    original = net.attention.parametrizations.in_proj_weight.original
    weight = np.concatenate([node.constants["weight"] for node in nodes(graph, "linear")[:3]])
    assert np.array_equal(weight, quantizer.codes(original).numpy())


# ---- Windows ---------------------------------------------------------------------------------------------------------


class Windows(nn.Module):
    """A block of Swin on [N, H, W, C]: shifted windows, a bias of relative positions, a mask of regions."""

    def __init__(self, side=8, window=4, shift=2):
        super().__init__()
        self.stem, self.norm, self.window, self.shift = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8), window, shift
        self.qkv, self.proj, self.merge, self.head = (
            nn.Linear(8, 24),
            nn.Linear(8, 8),
            nn.Linear(32, 8),
            nn.Linear(8, 5),
        )
        self.bias = nn.Parameter(torch.randn(2, window**2, window**2) / 2)
        self.last = nn.LayerNorm(32)
        region = torch.zeros(side, side)
        for i, rows in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
            for j, columns in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
                region[rows, columns] = 3 * i + j
        region = self.parts(region[None, :, :, None])[..., 0]
        self.register_buffer("mask", torch.where(region[:, :, None] == region[:, None], 0.0, -100.0))

    def parts(self, x):
        n, h, w, c = x.shape
        x = x.view(n, h // self.window, self.window, w // self.window, self.window, c)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.window**2, c)

    def attend(self, x):
        n, h, w, c = x.shape
        x = self.parts(x.roll((-self.shift, -self.shift), (1, 2)))
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (c // 2) ** -0.5) @ k.transpose(-2, -1) + self.bias
        count, t = len(self.mask), x.shape[1]
        scores = (scores.view(-1, count, 2, t, t) + self.mask[None, :, None]).view(-1, 2, t, t)
        x = self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(*x.shape[:2], c))
        m = self.window
        x = x.view(n, h // m, w // m, m, m, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return x.roll((self.shift, self.shift), (1, 2))

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x + self.attend(self.norm(x))
        x = torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
        return self.head(self.merge(self.last(x)).mean((1, 2)))


@pytest.mark.parametrize("shift", [2, 1])
def test_windows(shift, path):
    net = drawn(Windows(shift=shift)).eval()
    quantize_(net, 8, skip=[], init="mse")
    x = images((3, 16, 16))
    report = export(net, x[:1], path, x)
    graph = format.load(path)
    assert ops(graph)[:8] == ["conv2d", "norm", "gather", "linear", "linear", "linear", "attention", "gather"]
    (attention,) = nodes(graph, "attention")
    assert attention.attributes["block"] == 16 and attention.constants["logit_bias"].shape == (2, 16, 16)
    assert len(np.unique(attention.constants["regions"][-16:])) == 4  # the last window holds four regions
    residual = next(node for node in graph.members[0].nodes if "residual_multiplier" in node.attributes)
    assert residual.op == "conv2d" and report.output_sqnr_db > 28  # the gather is before it: [C, H, W] again


def test_masks(path):
    """A causal mask is a bias."""

    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.qkv, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 24), nn.Linear(8, 5)

        def forward(self, x):
            q, k, v = map(heads, self.qkv(self.stem(x).flatten(2).transpose(1, 2)).chunk(3, -1))
            return self.head(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True))[:, 3])

    torch.manual_seed(0)
    net = Causal().eval()
    quantize_(net, 8, skip=[])
    x = images((3, 16, 16))
    assert export(net, x[:1], path, x).output_sqnr_db > 25


# ---- Texts -----------------------------------------------------------------------------------------------------------


class Text(nn.Module):
    def __init__(self, vocabulary=50, longest=12):
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(longest, WIDTH)
        self.norm, self.layer = nn.LayerNorm(WIDTH), nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids):
        x = self.words(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.layer(self.norm(x))[:, 0])


def test_texts_of_any_length(path):
    net = drawn(Text()).eval()
    quantize_(net, 8, skip=["head"])
    ids = np.random.default_rng(0).integers(0, 50, (16, 12))
    report = export(net, ids[:1], path, ids)
    graph = format.load(path)
    assert graph.vocabulary == 50 and graph.variable
    assert ops(graph)[:3] == ["embedding", "norm", "linear"] and report.output_sqnr_db > 25
    embedding = nodes(graph, "embedding")[0]
    original = net.words.parametrizations.weight.original
    assert np.array_equal(embedding.constants["weight"], quantizers(net)["words.weight"].codes(original).numpy())
    assert dtypes(graph, "embedding") == {"s16"}
    short, mask = ids[:, :7], np.repeat([[1] * 7 + [0] * 5], 16, 0)
    got = reference.run(graph, short)
    assert np.array_equal(got, reference.run(graph, ids, mask=mask))
    with torch.no_grad():
        expected = net(torch.from_numpy(short)).numpy()
    assert np.square(expected).sum() / np.square(expected - got).sum() > 200


def test_ids_of_another_kind(path):
    net = Text().eval()
    quantize_(net, 8)
    with pytest.raises(qdeploy.InputError, match=r"expected token ids, integers \[N, T\], got float32 - at batch 0"):
        export(net, np.zeros((1, 12), np.int64), path, np.zeros((4, 12), np.float32))


# ---- As people hold them ---------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
PICTURES = SMALL | {"image_size": 16, "patch_size": 4, "num_labels": 5}
WORDS = {"vocab_size": 40, "max_position_embeddings": 10, "num_labels": 3}
MODELS = {
    "ViT": PICTURES,
    "DeiT": PICTURES,
    "Swin": {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4},
    "ConvNext": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 16], "num_labels": 5},
    "DistilBert": WORDS | {"n_layers": 1, "n_heads": 2, "dim": 16, "hidden_dim": 32},
    "Bert": WORDS | SMALL,
    "Roberta": WORDS | SMALL | {"max_position_embeddings": 12},  # it counts the tokens that are no padding, id 1
    "MPNet": WORDS | SMALL | {"max_position_embeddings": 12},
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name, path):
    transformers = pytest.importorskip("transformers")
    text = "vocab_size" in MODELS[name]
    kind = "ForSequenceClassification" if text else "ForImageClassification"
    torch.manual_seed(0)
    net = getattr(transformers, name + kind)(getattr(transformers, f"{name}Config")(**MODELS[name])).eval()
    side = 32 if name == "ConvNext" else 16
    x = np.random.default_rng(0).integers(2, 40, (8, 10)) if text else images((3, side, side))
    quantize_(net, 8, init="mse")
    qdeploy.check(net, x[:1])
    report = export(net, x[:1], path, x)
    assert report.output_sqnr_db > 20
    assert format.load(path).variable == text


# ---- Before training -------------------------------------------------------------------------------------------------


def test_check_says_all_at_once():
    class Odd(Text):
        def __init__(self):
            super().__init__()
            self.rnn, self.rms = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.RMSNorm(WIDTH)

        def forward(self, ids):
            return self.head(self.rms(self.rnn(self.words(ids))[0])[:, 0])

    with pytest.raises(ExportError, match=r"got 2 things .*recurrent layer at module `rnn`.*RMSNorm .*at module `rms`"):
        qdeploy.check(Odd(), np.zeros((1, 12), np.int64))


def test_check_knows_the_bounds():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8), nn.Flatten(), nn.Linear(8 * 65 * 65, 2))
    with pytest.raises(ExportError, match="a norm over at most 32767 elements, got 33800 - at module `1`"):
        qdeploy.check(net, np.zeros((1, 3, 65, 65), np.float32))


@pytest.mark.parametrize("observer", ["mse", "percentile"])
def test_ranges_that_cut_are_doubted_where_there_are_norms(observer, path):
    net = drawn(Attends(True)).eval()
    quantize_(net, 8, skip=[])
    x = images((3, 16, 16))
    with pytest.warns(UserWarning, match=f"expected observer minmax for a network with norms .*, got {observer} - at"):
        export(net, x[:1], path, x, observer=observer)
