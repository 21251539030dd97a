"""Attention as networks write it, beside q k^T of one projection: the integers against the network, and the engine
against the reference."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emulated import images
from torch import nn

import qdeploy
from qdeploy import ExportError, export, format, reference
from qdeploy.training import quantize_

torch.set_num_threads(1)
WIDTH, HEADS, SIDE = 16, 2, 4
TOKENS, OF_HEAD = SIDE * SIDE, WIDTH // HEADS


class Attends(nn.Module):
    """Tokens of patches, a norm, `attend(net, x)` from [N, T, D] to [N, T', D], and a mean."""

    def __init__(self, attend, **modules):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm, self.head = nn.Conv2d(3, WIDTH, 4, 4), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)
        self.qkv, self.attend = nn.Linear(WIDTH, 3 * WIDTH), attend
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.head(self.attend(self, self.norm(self.stem(x).flatten(2).transpose(1, 2))).mean(1))

    def parts(self, x):
        """q, k, v of [N, heads, T, channels]."""
        return self.qkv(x).reshape(x.shape[0], TOKENS, 3, HEADS, OF_HEAD).permute(2, 0, 3, 1, 4).unbind(0)


def together(x):
    return x.transpose(1, 2).flatten(2)


def learned_queries(net, x):
    _, k, v = net.parts(x)
    q = net.ask(net.latent.expand(x.shape[0], -1, -1))
    q = q.reshape(x.shape[0], 3, HEADS, OF_HEAD).transpose(1, 2)
    return together(F.scaled_dot_product_attention(q, k, v))


def pool_by_attention(net, x):
    return net.pool(net.latent.expand(x.shape[0], -1, -1), x, x)[0]


def one_head_of_keys(net, x):
    q, k, v = net.parts(x)
    return together(F.scaled_dot_product_attention(q, k[:, :1], v[:, :1]))


def rotated_halves(x):
    left, right = x.chunk(2, -1)
    return torch.cat([-right, left], -1)


def rotated_pairs(x):
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)


def rotary(rotated):
    def attend(net, x):
        angle = torch.arange(TOKENS)[:, None] / 10 ** torch.linspace(0, 1, OF_HEAD // 2)
        angle = torch.cat([angle, angle], -1) if rotated is rotated_halves else angle.repeat_interleave(2, -1)
        q, k, v = net.parts(x)
        q, k = (y * angle.cos() + rotated(y) * angle.sin() for y in (q, k))
        return together(F.scaled_dot_product_attention(q, k, v))

    return attend


def cosines(net, x):
    q, k, v = net.parts(x)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * net.temperature.exp() + net.bias
    return together(scores.softmax(-1) @ v)


def channels_with_channels(net, x):
    q, k, v = (part.transpose(-2, -1) for part in net.parts(x))
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * net.temperature.exp()
    return (scores.softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2)


def einsum(net, x):
    q, k, v = net.parts(x)
    scores = torch.einsum("b h i d, b h j d -> b h i j", q * OF_HEAD**-0.5, k)
    return together(torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v))


def parameters(**shapes):
    return {name: nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(3)))
            for name, shape in shapes.items()}  # fmt: skip


FORMS = {
    "learned_queries": (learned_queries, lambda: {"ask": nn.Linear(WIDTH, WIDTH), **parameters(latent=(1, 3, WIDTH))}),
    "pool_by_attention": (
        pool_by_attention,
        lambda: {"pool": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), **parameters(latent=(1, 2, WIDTH))},
    ),
    "one_head_of_keys": (one_head_of_keys, dict),
    "rotary_halves": (rotary(rotated_halves), dict),
    "rotary_pairs": (rotary(rotated_pairs), dict),
    "cosines": (cosines, lambda: parameters(temperature=(HEADS, 1, 1), bias=(HEADS, TOKENS, TOKENS))),
    "channels": (channels_with_channels, lambda: parameters(temperature=(HEADS, 1, 1))),
    "einsum": (einsum, dict),
}


@pytest.mark.parametrize("name", FORMS)
def test_form(name, tmp_path):
    attend, modules = FORMS[name]
    net, path, x = Attends(attend, **modules()).eval(), tmp_path / "net.safetensors", images((3, 16, 16))
    quantize_(net, 8, skip=[], allow_float=["latent"])
    report = export(net, x[:1], path, x)
    graph = format.load(path)
    assert [node.op for node in graph.members[0].nodes].count("attention") == 1
    assert np.array_equal(qdeploy.load_int_model(path)(x), reference.run(graph, x))
    assert report.output_sqnr_db > 28


def test_heads_that_are_mixed(tmp_path):
    """Scores of several heads in one have no integer form; the softmax and what follows are no reasons of their own."""

    def talking(net, x):
        q, k, v = net.parts(x)
        scores = net.talk((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return together(scores.softmax(-1) @ v)

    net = Attends(talking, talk=nn.Linear(HEADS, HEADS)).eval()
    with pytest.raises(ExportError) as error:
        qdeploy.check(net, images((3, 16, 16)))
    expected, got = "attention scores of each head by itself", "scores of several heads mixed (talking heads)"
    assert str(error.value) == f"expected {expected}, got {got} - at module `permute` (aten.permute)"
