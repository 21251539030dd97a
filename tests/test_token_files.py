"""Files of format version 3: what they hold, and that every key is refused in one line where it is out of bounds."""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from builder import Builder, batch, small_network, small_text, small_vision, text_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import graphs, texts
from test_format import assert_equal, header_of
from test_hostile_files import CHANGES, changed, check_message, edited, mutate_bytes, mutate_json, paths, verdict
from versions import NEWEST

import qdeploy
from qdeploy import cli, format, reference
from qdeploy.errors import ModelError
from qdeploy.format import dump, load, lowest_version, parse, save
from qdeploy.graph import Activation, Graph, Node
from qdeploy.ops.op import Op

FILES = {"vision": small_vision, "text": small_text}
I32, F32 = np.int32, np.float32


@settings(max_examples=120, deadline=None)
@given(st.one_of(graphs(version=NEWEST), texts()))
def test_graph_round_trip(graph):
    assert_equal(parse(dump(graph), "m.safetensors"), graph)


@pytest.mark.parametrize("name", FILES)
def test_bits_do_not_change_on_the_way_through_a_file(tmp_path, name):
    graph = FILES[name]()
    save(graph, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    assert_equal(loaded, graph)
    rng = np.random.default_rng(0)
    x, mask = text_batch(graph, 3, rng) if graph.vocabulary else (batch(graph, 3, rng), None)
    assert reference.run(loaded, x, mask=mask).tobytes() == reference.run(graph, x, mask=mask).tobytes()


@pytest.mark.parametrize(
    ("name", "macs"),
    [("vision", 36 * (432 + 256) + 36 * 144 + 40 * 4 * 256 + 160), ("text", 10 * 4 * 144 + 12)],
)
def test_info_counts_what_the_file_holds(tmp_path, name, macs):
    """Every weight once for each pixel or token; none for the embedding."""
    save(FILES[name](), tmp_path / "m.safetensors")
    report = cli.info(argparse.Namespace(file=tmp_path / "m.safetensors"))
    assert report["members"][0]["macs"] == macs


def test_what_the_file_says(tmp_path):
    path = tmp_path / "m.safetensors"
    save(small_text(), path)
    header = header_of(path)
    metadata = header.pop("__metadata__")
    assert (metadata["format_version"], metadata["requires"]) == ("3", "0.1.0")
    dtypes = [entry["dtype"] for entry in header.values()]
    assert dtypes == sorted(dtypes)  # F32, I32, U8
    assert set(dtypes) == {"F32", "I32", "U8"}
    document = json.loads(metadata["graph"])
    assert document["input"] == {"shape": [9], "dtype": "i32", "vocabulary": 11, "variable": True, "preprocess": None}
    attention = next(node for node in document["members"][0]["nodes"] if node["op"] == "attention")
    assert (attention["block"], attention["regions"]) == (None, None)
    assert header[attention["logit_bias"]]["shape"] == [3, 10, 10]
    index = next(node["index"] for node in document["members"][0]["nodes"] if node["op"] == "gather")
    assert header[index]["dtype"] == "I32"


# ---- The lowest version ----------------------------------------------------------------------------------------------


def one_node(build: Callable[[Builder], object], shape: tuple[int, ...] = (4, 6, 6)) -> Graph:
    net = Builder(np.random.default_rng(0), shape, (0.5, 9))
    build(net)
    return Graph([net.member()])


VERSIONS = {
    "version 1": (one_node(lambda net: net.conv2d(0, 3)), 1),
    "a gate of channels": (one_node(lambda net: net.mul(0, net.avg_pool2d(0, (6, 6), (1, 1), (0, 0, 0, 0)))), 2),
    "a gate of pixels": (one_node(lambda net: net.mul(0, net.conv2d(0, 1))), 3),
    "a gate of tokens": (one_node(lambda net: net.mul(0, net.gather(0, "rows", [0])), (5, 4)), 3),
    "s16": (one_node(lambda net: net.conv2d(0, 3, dtype="s16")), 3),
    "tokens": (one_node(lambda net: net.linear(0, 3), (5, 4)), 3),
    "an op": (one_node(lambda net: net.rescale(0)), 3),
}


@pytest.mark.parametrize("case", VERSIONS)
def test_a_file_has_the_lowest_version_that_holds_it(tmp_path, case):
    graph, version = VERSIONS[case]
    path = tmp_path / "m.safetensors"
    save(graph, path)
    assert header_of(path)["__metadata__"]["format_version"] == str(version) == str(lowest_version(load(path)))
    for other in range(1, 4):
        data = path.read_bytes().replace(b'"format_version":"%d"' % version, b'"format_version":"%d"' % other)
        if version == 1:
            data = edited(lambda header: header["__metadata__"].update(requires="0.1.0"))(data)
        if other == version:
            assert_equal(parse(data, path), graph)
        else:
            with pytest.raises(ModelError) as error:
                parse(data, path)
            check_message(str(error.value))


def said_of(content: bytes, path: Path) -> str:
    """What both readers say of a file, "a model" or one line."""
    path.write_bytes(content)
    said = verdict(load, path)
    assert said == verdict(qdeploy.load_int_model, path)
    return said


OLD = {  # of a file of version 2: what it is made to hold, what is said
    "s16": (
        lambda graph: graph["members"][0]["tensors"][1].update(dtype="s16"),
        "expected dtype u8 or f32, got `s16` - at tensor `t1` of member `net`",
    ),
    "tokens": (
        lambda graph: graph["members"][0]["tensors"][1].update(shape=[4, 6]),
        "expected shape [C, H, W] or [F], got [4, 6] - at tensor `t1` of member `net`",
    ),
    "text": (
        lambda graph: graph["input"].update(dtype="i32", vocabulary=7, variable=False),
        "expected no keys but the known ones, got `dtype` - at key `input` of the graph",
    ),
    "an op": (
        lambda graph: graph["members"][0]["nodes"][2].update(op="norm"),
        "expected format version 3 for the op `norm`, got 2 - at node `table.2` of member `net`",
    ),
}


@pytest.mark.parametrize("case", OLD)
def test_a_file_of_version_2_holds_nothing_of_version_3(tmp_path, case):
    change, message = OLD[case]
    said = said_of(edited(change_graph=change)(dump(small_network())), tmp_path / "m")
    assert said == f"{message} in {tmp_path / 'm'}"


# ---- Hostile graphs --------------------------------------------------------------------------------------------------


def named(graph: Graph, op: str, number: int = 0) -> Node:
    return [node for node in graph.members[0].nodes if node.op == op][number]


def output_of(graph: Graph, op: str, number: int = 0) -> Activation:
    return graph.members[0].tensors[named(graph, op, number).output]


def attribute(op: str, number: int = 0, **values: object) -> Callable[[Graph], None]:
    return lambda graph: named(graph, op, number).attributes.update(values)


def constant(op: str, number: int = 0, **values: object) -> Callable[[Graph], None]:
    return lambda graph: named(graph, op, number).constants.update(values)


def output(op: str, number: int = 0, **values: object) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        i = named(graph, op, number).output
        graph.members[0].tensors[i] = replace(graph.members[0].tensors[i], **values)

    return change


def first(**values: object) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        graph.members[0].tensors[0] = replace(graph.members[0].tensors[0], **values)

    return change


def graph_of(**values: object) -> Callable[[Graph], None]:
    return lambda graph: [setattr(graph, key, value) for key, value in values.items()]


def only_tokens(graph: Graph, shape: tuple[int, ...]) -> None:
    """The node `tokens` alone, on an input of this shape."""
    member, node = graph.members[0], named(graph, "tokens")
    member.tensors[:] = [replace(member.tensors[0], shape=shape), member.tensors[node.output]]
    member.nodes[:] = [replace(node, inputs=[0], output=1)]


BAD_VISION = {
    # types
    "an unknown dtype": (output("norm", dtype="s8"), "dtype u8, f32, s16 or i32, got `s8` - at tensor `t2` of"),
    "an s16 zero point": (output("conv2d", zero_point=1), "zero point 0 of an s16 tensor, got 1 - at tensor `t1`"),
    "token ids inside": (output("rescale", dtype="i32"), "scale 1 and zero point 0 of an i32 tensor, got others - at"),
    "an s16 input": (first(dtype="s16", zero_point=0), "a u8 input of shape [3, 12, 12], got [3, 12, 12] - at member"),
    "a clamp of s16": (attribute("conv2d", clamp=(0, 255)), "no keys but the known ones, got `clamp` - at node `conv"),
    "s16 for a convolution": (
        lambda graph: setattr(named(graph, "conv2d", 1), "inputs", [1, 1]),
        "u8 inputs, got s16 tensor 1 - at node `conv2d.2` of member `net`",
    ),
    "s16 for a gate": (
        lambda graph: setattr(named(graph, "mul"), "inputs", [1, 5]),
        "u8 inputs, got s16 tensor 1 - at node `mul.5` of member `net`",
    ),
    "s16 for a table": (
        lambda graph: setattr(named(graph, "table"), "inputs", [20]),
        "u8 inputs, got s16 tensor 20 - at node `table.22` of member `net`",
    ),
    "s16 for attention": (
        lambda graph: setattr(named(graph, "attention"), "inputs", [16, 17, 14]),
        "u8 inputs, got s16 tensor 14 - at node `attention.18` of member `net`",
    ),
    "s16 of attention": (output("attention", dtype="s16", zero_point=0), "a u8 output, got s16 - at node `attention"),
    "s16 of a gate": (output("mul", dtype="s16", zero_point=0), "a u8 or f32 output, got s16 - at node `mul.5` of"),
    "f32 of a gather": (output("gather", dtype="f32", scale=1.0, zero_point=0), "a u8 or s16 output, got f32 - at"),
    "f32 inside": (
        lambda graph: (
            output("rescale", dtype="f32", scale=1.0, zero_point=0)(graph),
            named(graph, "rescale").attributes.pop("clamp"),
        ),
        "u8 inputs, got f32 tensor 4 - at node `mul.5` of member `net`",
    ),
    "u8 moved to s16": (
        output("gather", 1, dtype="u8"),
        "the output's dtype on every input, got s16 tensor 12 and u8 output - at node `gather.12` of member `net`",
    ),
    "another scale": (
        output("tokens", scale=0.7),
        "the output's scale and zero point on every input, got others on tensor 11 - at node `tokens.11` of member",
    ),
    # add, rescale, mul
    "a large multiplier of s16": (
        attribute("add", multipliers=(0.5, 1.0), bias=2.0**30),
        "results below 2^30, got up to 1.07e+09 - at node `add.10` of member `net`",
    ),
    "a large rescale": (attribute("rescale", multiplier=32769.0), "results below 2^30, got up to 1.07e+09 - at node"),
    "a gate of another shape": (
        lambda graph: setattr(named(graph, "mul"), "inputs", [4, 0]),
        "a second input of shape [16, 6, 6], [16, 1, 1] or [1, 6, 6], got [3, 12, 12] - at node `mul.5` of member",
    ),
    "a large residual of s16": (
        attribute("linear", 3, residual_multiplier=32769.0),
        "results below 2^30, got up to 1.07e+09 - at channel 0 of node `linear.19` of member `net`",
    ),
    # resize
    "no rows of a resize": (
        constant("resize", row_start=np.zeros(0, I32)),
        "at least one integer, got none - at key `row_start` of node `resize.8` of member `net`",
    ),
    "a window beyond the image": (
        constant("resize", row_start=I32([0, 1, 2, 4])),
        "rows from 0 to 3, got 0 to 4 - at key `row_start` of node `resize.8` of member `net`",
    ),
    "a window before the image": (
        constant("resize", column_start=I32([0, -1, 2, 4])),
        "columns from 0 to 4, got -1 to 4 - at key `column_start` of node `resize.8` of member `net`",
    ),
    "a window larger than the image": (
        constant("resize", row_start=I32([0]), row_weight=np.ones((1, 7), I32)),
        "rows from 0 to -1, got 0 to 0 - at key `row_start` of node `resize.8` of member `net`",
    ),
    "weights of other rows": (
        constant("resize", row_weight=np.ones((3, 2), I32)),
        "I32 [4, any], got I32 [3, 2] - at key `row_weight` of node `resize.8` of member `net`",
    ),
    "a large weight": (
        constant("resize", row_weight=np.full((4, 1), -32768, I32)),
        "weights in [-32767, 32767], got -32768 to -32768 - at key `row_weight` of node `resize.8` of member `net`",
    ),
    "weights that add up": (
        constant("resize", row_weight=np.full((4, 1), 4096, I32), column_weight=np.full((4, 1), 2057, I32)),
        "sums below 2^31, got up to 2148495360 - at node `resize.8` of member `net`",
    ),
    "weights of another dtype": (
        constant("resize", row_weight=np.ones((4, 1), F32)),
        "I32 [4, any], got F32 [4, 1] - at key `row_weight` of node `resize.8` of member `net`",
    ),
    "a large multiplier of a resize": (attribute("resize", multiplier=1e9), "results below 2^30, got up to "),
    "a resize to another shape": (output("resize", shape=(16, 4, 5)), "an output of shape [16, 4, 4], got [16, 4, 5]"),
    # gather, tokens, image, concat
    "an index beyond": (
        constant("gather", index=np.full(36, 16, I32)),
        "indices from -1 to 15, got 16 to 16 - at node `gather.9` of member `net`",
    ),
    "an index below": (
        constant("gather", 1, index=np.arange(-2, 14, dtype=I32)),
        "indices from -1 to 15, got -2 to 13 - at node `gather.12` of member `net`",
    ),
    "no index": (
        constant("gather", index=np.zeros(0, I32)),
        "at least one integer, got none - at key `index` of node `gather.9` of member `net`",
    ),
    "an index of two dimensions": (
        constant("gather", index=np.zeros((6, 6), I32)),
        "I32 [any], got I32 [6, 6] - at key `index` of node `gather.9` of member `net`",
    ),
    "an index of floats": (constant("gather", index=np.zeros(36, F32)), "I32 [any], got F32 [36] - at key `index` of"),
    "another axis": (
        attribute("gather", axis="columns"),
        "`rows` or `channels`, got `columns` - at key `axis` of node `gather.9` of member `net`",
    ),
    "an axis by number": (
        attribute("gather", axis=0),
        "a string, got number - at key `axis` of node `gather.9` of member `net`",
    ),
    "rows of another number": (
        output("gather", shape=(16, 6, 5)),
        "an output of 36 rows of 16 channels, got [16, 6, 5] - at node `gather.9` of member `net`",
    ),
    "rows of other channels": (
        output("gather", 2, shape=(36, 15)),
        "an output of 36 rows of 16 channels, got [36, 15] - at node `gather.20` of member `net`",
    ),
    "channels of another number": (
        output("gather", 1, shape=(36, 15)),
        "an output of shape [36, 16], got [36, 15] - at node `gather.12` of member `net`",
    ),
    "other tokens": (
        output("tokens", shape=(16, 36)),
        "an output of shape [36, 16], got [16, 36] - at node `tokens.11` of member `net`",
    ),
    "tokens of tokens": (
        lambda graph: only_tokens(graph, (3, 144)),
        "an input of shape [C, H, W], got [3, 144] - at node `tokens.11` of member `net`",
    ),
    "another image": (
        output("image", shape=(32, 6, 5)),
        "an output [C, H, W] of 36 pixels of 32 channels, got [32, 6, 5] - at node `image.24` of member `net`",
    ),
    "no axis of tokens": (
        lambda graph: named(graph, "concat").attributes.clear(),
        "the key `axis`, got none - at node `concat.23` of member `net`",
    ),
    "rows joined as channels": (
        attribute("concat", axis="rows"),
        "an output of shape [72, 16], got [36, 32] - at node `concat.23` of member `net`",
    ),
    # position
    "a negative prefix": (
        attribute("position", prefix=-1),
        "an integer in [0, 65535], got -1 - at key `prefix` of node `position.13` of member `net`",
    ),
    "another prefix": (
        attribute("position", prefix=3),
        "an output of shape [39, 16], got [40, 16] - at node `position.13` of member `net`",
    ),
    "too few rows": (
        constant("position", rows=np.zeros((39, 16), F32)),
        "F32 [40, 16], got F32 [39, 16] - at key `rows` of node `position.13` of member `net`",
    ),
    "rows without end": (
        constant("position", rows=np.full((40, 16), np.inf, F32)),
        "finite constants, got inf - at key `rows` of node `position.13` of member `net`",
    ),
    "large rows": (
        constant("position", rows=np.full((40, 16), 2.0**30, F32)),
        "results below 2^30, got up to 1.07e+09",
    ),
    # norm
    "groups that do not divide": (
        attribute("norm", groups=3),
        "groups that divide the channels, got 3 - at node `norm.1` of member `net`",
    ),
    "no groups": (attribute("norm", groups=0), "an integer in [1, 65535], got 0 - at key `groups` of node `norm.1` of"),
    "groups as text": (attribute("norm", groups="2"), "an integer in [1, 65535], got string - at key `groups` of node"),
    "no epsilon": (
        attribute("norm", epsilon=0.0),
        "an epsilon in [2^-60, 2^100], got 0 - at node `norm.1` of member `net`",
    ),
    "a negative epsilon": (attribute("norm", epsilon=-1.0), "an epsilon in [2^-60, 2^100], got -1 - at node `norm.1`"),
    "a huge epsilon": (attribute("norm", epsilon=1e31), "an epsilon in [2^-60, 2^100], got 1e+31 - at node `norm.1`"),
    "an epsilon of null": (
        attribute("norm", epsilon=None),
        "a number, got null - at key `epsilon` of node `norm.1` of",
    ),
    "an epsilon that is none": (attribute("norm", epsilon=float("nan")), "a finite f32, got nan - at key `epsilon` of"),
    "another multiplier": (
        constant("norm", multiplier=np.ones(15, F32)),
        "F32 [16], got F32 [15] - at key `multiplier` of node `norm.1` of member `net`",
    ),
    "a large multiplier of a norm": (
        constant("norm", multiplier=np.full(16, 2.0**27, F32)),
        "results below 2^30, got up to 1.61e+09 - at node `norm.1` of member `net`",
    ),
    "a norm of another shape": (
        output("norm", shape=(16, 36, 1)),
        "an output of shape [16, 6, 6], got [16, 36, 1] - a",
    ),
    # attention
    "heads that do not divide": (
        attribute("attention", heads=3),
        "heads that divide the channels, got 3 - at node `attention.18` of member `net`",
    ),
    "no heads": (
        attribute("attention", heads=0),
        "an integer in [1, 65535], got 0 - at key `heads` of node `attention",
    ),
    "no peak": (
        attribute("attention", peak=0),
        "an integer in [1, 32767], got 0 - at key `peak` of node `attention.18",
    ),
    "a large peak": (attribute("attention", peak=32768), "an integer in [1, 32767], got 32768 - at key `peak` of node"),
    "a block that does not divide": (
        attribute("attention", block=16),
        "a block that divides 40 rows, got 16 - at node `attention.18` of member `net`",
    ),
    "no block": (
        attribute("attention", block=0),
        "an integer in [1, 40], got 0 - at key `block` of node `attention.18` of member `net`",
    ),
    "a block beyond": (
        attribute("attention", block=80),
        "an integer in [1, 40], got 80 - at key `block` of node `atte",
    ),
    "a bias of another block": (
        attribute("attention", block=10),
        "F32 [4, 10, 10], got F32 [4, 20, 20] - at key `logit_bias` of node `attention.18` of member `net`",
    ),
    "a bias without end": (
        constant("attention", logit_bias=np.full((4, 20, 20), -np.inf, F32)),
        "finite constants, got -inf - at key `logit_bias` of node `attention.18` of member `net`",
    ),
    "a large bias": (
        constant("attention", logit_bias=np.full((4, 20, 20), 2.0**100, F32)),
        "logits below 2^100, got up to 1.27e+30 - at node `attention.18` of member `net`",
    ),
    "a large logit": (attribute("attention", logit_multiplier=1e26), "logits below 2^100, got up to 2.6e+31 - at node"),
    "regions of other rows": (
        constant("attention", regions=np.zeros(20, I32)),
        "I32 [40], got I32 [20] - at key `regions` of node `attention.18` of member `net`",
    ),
    "regions of floats": (constant("attention", regions=np.zeros(40, F32)), "I32 [40], got F32 [40] - at key `region"),
    "a large multiplier of attention": (
        attribute("attention", multiplier=2.0**23),
        "results below 2^30, got up to 2.14e+09 - at node `attention.18` of member `net`",
    ),
    "two inputs": (
        lambda graph: named(graph, "attention").inputs.pop(),
        "at least 3 entries, got 2 - at key `inputs` of node `attention.18` of member `net`",
    ),
    "keys of an image": (
        lambda graph: setattr(named(graph, "attention"), "inputs", [16, 2, 18]),
        "keys of shape [T, D], got [16, 6, 6] - at node `attention.18` of member `net`",
    ),
    "another output": (
        output("attention", shape=(40, 15)),
        "an output of shape [40, 16], got [40, 15] - at node `attention.18` of member `net`",
    ),
    # linear
    "an image for a linear": (
        lambda graph: setattr(named(graph, "linear"), "inputs", [2]),
        "an input of shape [F] or [T, F], got [16, 6, 6] - at node `linear.15` of member `net`",
    ),
    "another number of tokens": (output("linear", shape=(39, 16)), "an output of shape [40, 16], got [39, 16] - at no"),
    # input
    "texts without a vocabulary": (graph_of(variable=True), "token ids for texts of any length, got no vocabulary - "),
    "a vocabulary of images": (
        graph_of(vocabulary=7),
        "an i32 input of one dimension, that of the graph, got [3, 12, 12] - at member `net`",
    ),
}

BAD_TEXT = {
    "no words": (graph_of(vocabulary=0), "an integer in [1, 268435456], got 0 - at key `vocabulary` of key `input` of"),
    "half a word": (graph_of(vocabulary=1.5), "an integer in [1, 268435456], got number - at key `vocabulary` of key"),
    "variable by number": (
        graph_of(variable=1),
        "a boolean, got number - at key `variable` of key `input` of the graph",
    ),
    "numbers": (graph_of(vocabulary=None, variable=False), "a u8 input of shape [9], got [9] - at member `net`"),
    "preprocess": (
        graph_of(preprocess={"mean": [0], "std": [1]}),
        "an input of shape [C, H, W], got [9] - at key `preprocess` of key `input` of the graph",
    ),
    "a scale of ids": (
        first(scale=0.5),
        "scale 1 and zero point 0 of an i32 tensor, got others - at tensor `input` of",
    ),
    "ids for a linear": (
        lambda graph: setattr(named(graph, "linear"), "inputs", [0]),
        "u8 inputs, got i32 tensor 0 - at node `linear.3` of member `net`",
    ),
    "codes for an embedding": (
        lambda graph: setattr(graph.members[0].nodes[1], "op", "embedding"),
        "i32 inputs, got s16 tensor 1 - at node `position.1` of member `net`",
    ),
    "another vocabulary": (
        graph_of(vocabulary=12),
        "a weight of shape [12, 12], got [11, 12] - at key `weight` of node `embedding.0` of member `net`",
    ),
    "codes beyond the bits": (
        lambda graph: setattr(named(graph, "embedding"), "bits", 4),
        "codes of 4 bits, got codes from -16 to 15 - at node `embedding.0` of member `net`",
    ),
    "some multipliers": (
        constant("embedding", multiplier=np.ones(2, F32)),
        "1 or 11 multipliers, got 2 - at key `multiplier` of node `embedding.0` of member `net`",
    ),
    "fewer positions": (
        constant("embedding", rows=np.zeros((8, 12), F32)),
        "F32 [9, 12], got F32 [8, 12] - at key `rows` of node `embedding.0` of member `net`",
    ),
    "a large embedding": (
        constant("embedding", multiplier=np.full(11, 2.0**26, F32)),
        "results below 2^30, got up to 1.07e+09 - at node `embedding.0` of member `net`",
    ),
    "means of fewer rows": (
        constant("mean", multiplier=np.ones(9, F32)),
        "F32 [10], got F32 [9] - at key `multiplier` of node `mean.16` of member `net`",
    ),
    "a large mean": (
        constant("mean", multiplier=np.full(10, 2.0**19, F32)),
        "results below 2^30, got up to 1.34e+09 - at node `mean.16` of member `net`",
    ),
    "a mean of another shape": (
        output("mean", shape=(5,)),
        "an output of shape [4], got [5] - at node `mean.16` of me",
    ),
    # texts of any length
    "blocks of a text": (
        lambda graph: (
            named(graph, "attention").constants.pop("logit_bias"),
            named(graph, "attention").attributes.update(block=5),
        ),
        "inputs whose rows do not depend on a text's length, got others - at node `attention.6` of member `net`",
    ),
    "regions of a text": (
        constant("attention", regions=np.zeros(10, I32)),
        "inputs whose rows do not depend on a text's length, got others - at node `attention.6` of member `net`",
    ),
    "groups of a text": (
        attribute("norm", groups=1),
        "inputs whose rows do not depend on a text's length, got others - at node `norm.2` of member `net`",
    ),
    "a token that may not be there": (
        constant("gather", index=I32([2])),
        "rows that the shortest text has, 0 to 1, got 2 - at node `gather.11` of member `net`",
    ),
    "a reshape of a text": (
        lambda graph: (
            named(graph, "table").__setattr__("op", "reshape"),
            named(graph, "reshape").constants.clear(),
            output(
                "reshape", scale=output_of(graph, "norm", 1).scale, zero_point=output_of(graph, "norm", 1).zero_point
            )(graph),
        ),
        "inputs whose rows do not depend on a text's length, got others - at node `table.10` of member `net`",
    ),
}


# What no file that is written can hold.
NO_FILE = {"an epsilon that is none", "codes beyond the bits", "texts without a vocabulary", "no words"}


@pytest.mark.parametrize(("name", "case"), [("vision", c) for c in BAD_VISION] + [("text", c) for c in BAD_TEXT])
def test_keys_out_of_bounds(tmp_path, monkeypatch, name, case):
    graph, path = FILES[name](), tmp_path / "m.safetensors"
    change, message = {"vision": BAD_VISION, "text": BAD_TEXT}[name][case]
    change(graph)
    with pytest.raises(ModelError) as error:
        save(graph, path)
    assert str(error.value).startswith(f"expected {message}")
    check_message(str(error.value))
    assert not list(tmp_path.iterdir())
    if case not in NO_FILE:
        assert said_of_file(graph, path, monkeypatch) == f"{error.value} in {path}"


def said_of_file(graph: Graph, path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What both readers say of a file of this graph, which `save` would refuse to write."""
    with monkeypatch.context() as patch:
        patch.setattr(format, "validate", lambda graph: None)
        patch.setattr(format, "lowest_version", lambda graph: 3)
        patch.setattr(Op, "attribute_types", lambda op, node, output, keys: defaultdict(lambda: object))
        patch.setattr(format, "_attribute_json", lambda value, kind: json.loads(json.dumps(value, default=float)))
        content = dump(graph)
    return said_of(content, path)


def tokens(rows: int, channels: int, dtype: str, build: Callable[[Builder, int], object]) -> Graph:
    """What is built on tokens of this dtype."""

    def on_tokens(net: Builder) -> None:
        build(net, net.rescale(0, dtype))

    return one_node(on_tokens, (rows, channels))


def attend(rows: int, channels: int, **values: object) -> Graph:
    """One head over all rows; values of its attributes."""

    def build(net: Builder) -> None:
        net.attention(0, 0, 0, 1)
        net.nodes[-1].attributes.update(values)

    return one_node(build, (rows, channels))


def cross(**constants: np.ndarray) -> Graph:
    """Queries of two tokens, keys and values of five."""

    def build(net: Builder) -> None:
        net.attention(net.gather(0, "rows", [3, 1]), 0, 0, 1)
        net.nodes[-1].constants.update(constants)

    return one_node(build, (5, 4))


BOUNDS = {  # what fits, what does not, and what is said of it
    "the largest peak": (
        attend(257, 2, peak=32767),
        attend(258, 2, peak=32767),
        "sums of weights below 2^31, got a peak of 32767 over 258 keys - at node `attention.0`",
    ),
    "the widest head": (
        attend(1, 33_025),
        attend(1, 33_026),
        "products below 2^31, got heads of 33026 channels - at node `attention.0`",
    ),
    "queries of other rows": (
        cross(),
        cross(regions=np.zeros(5, I32)),
        "as many queries as keys, 5, got 2 - at node `a",
    ),
    "a norm of s16 rows": (
        tokens(1, 32_767, "s16", lambda net, x: net.norm(x)),
        tokens(1, 32_768, "s16", lambda net, x: net.norm(x)),
        "at most 32767 channels, got 32768 - at node `norm.1`",
    ),
    "a norm of s16 groups": (
        tokens(31, 1057, "s16", lambda net, x: net.norm(x, groups=1)),
        tokens(32, 1024, "s16", lambda net, x: net.norm(x, groups=1)),
        "at most 32767 elements with the same statistics, got 32768 - at node `norm.1`",
    ),
    "a norm of u8 groups": (
        one_node(lambda net: net.norm(0, groups=1), (1, 2901, 2902)),
        one_node(lambda net: net.norm(0, groups=1), (1, 2902, 2902)),
        "at most 8421504 elements with the same statistics, got 8421604 - at node `norm.0`",
    ),
    "a window of s16": (
        one_node(lambda net: net.avg_pool2d(net.rescale(0, "s16"), (256, 256), (1, 1), (0,) * 4, False), (1, 256, 256)),
        one_node(lambda net: net.avg_pool2d(net.rescale(0, "s16"), (257, 257), (1, 1), (0,) * 4, False), (1, 257, 257)),
        "a window with sums below 2^31, got 66049 elements - at node `avg_pool2d.1`",
    ),
    "a mean of s16": (
        tokens(65_538, 1, "s16", lambda net, x: net.mean(x)),
        tokens(65_539, 1, "s16", lambda net, x: net.mean(x)),
        "a mean with sums below 2^31, got 65539 rows - at node `mean.1`",
    ),
}


@pytest.mark.parametrize("case", BOUNDS)
def test_the_last_that_fits(tmp_path, monkeypatch, case):
    good, bad, message = BOUNDS[case]
    path = tmp_path / "m.safetensors"
    save(good, path)
    qdeploy.load_int_model(path)
    with pytest.raises(ModelError) as error:
        dump(bad)
    assert str(error.value).startswith(f"expected {message}")
    check_message(str(error.value))
    assert said_of_file(bad, path, monkeypatch) == f"{error.value} in {path}"


# ---- Hostile files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_every_single_change_of_a_file_is_refused_or_is_a_model(name):
    """Of the input, and of a tenth of the other values: each is removed or becomes each of CHANGES."""
    data = dump(FILES[name]())
    size = int.from_bytes(data[:8], "little")
    document = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["graph"])
    models = 0
    rng = np.random.default_rng(0)
    places = [path for path in paths(document) if path[0] == "input" or rng.random() < 0.1]
    for place in places:
        for value in CHANGES:
            models += is_model(edited(partial(put_graph, document=changed(document, place, value)))(data))
    assert 0 < models < len(places) * len(CHANGES) / 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mutate", [mutate_bytes, mutate_json])
def test_random_mutations_are_refused_or_are_models(name, mutate):
    data = dump(FILES[name]())
    models = sum(is_model(mutate(data, random.Random(f"{name} {i}"))) for i in range(200))
    assert 0 < models < 200


def put_graph(header: dict, document: dict) -> None:
    header["__metadata__"]["graph"] = json.dumps(document)


def is_model(content: bytes) -> bool:
    """Whether it is one, which then runs; else it is refused in one line."""
    try:
        graph = parse(content, "m")
    except ModelError as error:
        check_message(str(error))
        return False
    if max(np.prod(tensor.shape) for tensor in graph.members[0].tensors) < 10_000:
        rng = np.random.default_rng(0)
        x, mask = text_batch(graph, 1, rng) if graph.vocabulary else (batch(graph, 1, rng), None)
        reference.run(graph, x, mask=mask)
    return True


BAD_FILES = {
    "indices that are bytes": (
        edited(lambda header: header["0/gather.11/index"].update(dtype="U8", shape=[4])),
        "I32 [any], got U8 [4] - at key `index` of node `gather.11` of member `net`",
    ),
    "indices of 64 bits": (
        edited(lambda header: header["0/gather.11/index"].update(dtype="I64")),
        "dtype U8, F32 or I32, got `I64` - at tensor `0/gather.11/index`",
    ),
    "indices that are not aligned": (
        edited(lambda header: header["0/gather.11/index"].update(shape=[0], data_offsets=[1, 1])),
        "I32 data aligned to 4 bytes, got offset 1 - at tensor `0/gather.11/index`",
    ),
    "another input": (
        edited(change_graph=lambda graph: graph["input"].update(dtype="u8")),
        "dtype i32 of token ids, got `u8` - at key `input` of the graph",
    ),
    "a vocabulary of 0": (
        edited(change_graph=lambda graph: graph["input"].update(vocabulary=0)),
        "an integer in [1, 268435456], got 0 - at key `vocabulary` of key `input` of the graph",
    ),
    "no vocabulary": (
        edited(change_graph=lambda graph: graph["input"].update(vocabulary=None)),
        "an integer, got null - at key `vocabulary` of key `input` of the graph",
    ),
    "a vocabulary and no dtype": (
        edited(change_graph=lambda graph: graph["input"].pop("dtype")),
        "no keys but the known ones, got `variable` - at key `input` of the graph",
    ),
    "no key for a null": (
        edited(change_graph=lambda graph: graph["members"][0]["nodes"][6].pop("regions")),
        "the key `regions`, got none - at node `attention.6` of member `net`",
    ),
    "a null for an array": (
        edited(change_graph=lambda graph: graph["members"][0]["nodes"][11].update(index=None)),
        "a string, got null - at key `index` of node `gather.11` of member `net`",
    ),
    "a key of tomorrow": (
        edited(change_graph=lambda graph: graph["members"][0]["nodes"][6].update(causal=True)),
        "no keys but the known ones, got `causal` - at node `attention.6` of member `net`",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    change, message = BAD_FILES[case]
    assert said_of(change(dump(small_text())), tmp_path / "m") == f"expected {message} in {tmp_path / 'm'}"
