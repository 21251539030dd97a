"""docs/format.md sentence by sentence: small changes of a file, and what both readers say of it."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from builder import Builder, small_network
from draft import Draft, Object, Raw, read
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import members
from oracle import check

import qdeploy
from qdeploy import _engine, reference
from qdeploy.format import load, save
from qdeploy.graph import Graph

MODEL = ""  # what is said of one

# ---- Changes of the draft of `small_network` ------------------------------------------------------------------------

Change = Callable[[Draft], object]


def node(draft: Draft, op: str) -> Object:
    """The last node of this op: the convolution with a residual."""
    return [node for node in members(draft)[0].get("nodes") if node.get("op") == op][-1]


def activation(draft: Draft, i: int) -> Object:
    return members(draft)[0].get("tensors")[i]


def set_node(op: str, **values: object) -> Change:
    return lambda draft: [node(draft, op).set(key, value) for key, value in values.items()]


def set_activation(i: int, **values: object) -> Change:
    return lambda draft: [activation(draft, i).set(key, value) for key, value in values.items()]


def set_entry(**values: object) -> Change:
    """Of the tensor of the first bias."""
    return lambda draft: [draft.header.get("0/conv2d.0/bias").set(key, value) for key, value in values.items()]


def set_metadata(**values: object) -> Change:
    return lambda draft: [draft.header.get("__metadata__").set(key, value) for key, value in values.items()]


def set_graph(**values: object) -> Change:
    return lambda draft: [draft.graph.set(key, value) for key, value in values.items()]


def set_input(**values: object) -> Change:
    return lambda draft: [draft.graph.get("input").set(key, value) for key, value in values.items()]


def extra(name: str = "extra", dtype: str = "U8", shape: tuple = (), content: bytes = b"\7") -> Change:
    """One more tensor, that the graph does not name."""

    def change(draft: Draft) -> None:
        offsets = [len(draft.data), len(draft.data) + len(content)]
        draft.header.append([name, Object([["dtype", dtype], ["shape", list(shape)], ["data_offsets", offsets]])])
        draft.data += content

    return change


def empty_at(position: int) -> Change:
    offsets = [position, position]
    entry = Object([["dtype", "U8"], ["shape", [0]], ["data_offsets", offsets]])
    return lambda draft: draft.header.append(["empty", entry])


def rename_constant(name: str) -> Change:
    def change(draft: Draft) -> None:
        next(pair for pair in draft.header if pair[0] == "0/conv2d.0/bias")[0] = name
        members(draft)[0].get("nodes")[0].set("bias", name)

    return change


def named(name: str) -> Change:
    return lambda draft: members(draft)[0].set("name", name)


def deep(levels: int) -> Change:
    """A value in the header with so many arrays in each other, two levels below the outermost object."""
    return set_entry(extra=Raw("[" * levels + "]" * levels))


def twice(key: str) -> Change:
    return lambda draft: activation(draft, 1).append([Raw(key), 1])


def around(before: str, behind: str) -> Change:
    return lambda draft: setattr(draft, "around_graph", (before, behind))


def one_name(draft: Draft) -> None:
    draft.graph.set("classes", ["cat", "cat"])


def flat_gate(draft: Draft) -> None:
    """A second input of mul of another rank."""
    node(draft, "mul").set("inputs", [5, 1])


def floats(name: str, *values: float) -> Change:
    """Other numbers in a tensor, from its first on."""

    def change(draft: Draft) -> None:
        struct.pack_into(f"<{len(values)}f", draft.data, draft.header.get(name).get("data_offsets")[0], *values)

    return change


def both(*changes: Change) -> Change:
    return lambda draft: [change(draft) for change in changes]


HALF, BELOW = 2.0**29, float(np.nextafter(np.float32(2.0**30), np.float32(0)))
NAME = "a name of 1 to 512 bytes without control characters"
JSON = "JSON in UTF-8 with finite numbers"
KNOWN = "no keys but the known ones"
RULES: dict[str, tuple[Change, str]] = {  # what is done, and how the text begins after "expected"
    # 1. Container
    "an extra key of an entry": (set_entry(extra=7), MODEL),
    "an unnamed tensor": (extra(), MODEL),
    "an unnamed tensor of another dtype": (extra(dtype="I8"), "dtype U8 or F32, got `I8`"),
    "an unnamed tensor of a wrong size": (extra(content=b"12"), "1 bytes inside"),
    "rank 0": (extra(shape=()), MODEL),
    "rank 8": (extra(shape=(1,) * 8), MODEL),
    "rank 9": (extra(shape=(1,) * 9), "at most 8 entries, got 9"),
    "a size of 2^40": (extra(shape=(0, 2**40), content=b""), MODEL),
    "a size above 2^40": (extra(shape=(0, 2**40 + 1), content=b""), "an integer in [0, 1099511627776]"),
    "a product of 2^48": (extra(shape=(0, 2**40, 2**8), content=b""), MODEL),
    "a product above 2^48": (extra(shape=(0, 2**40, 2**8 + 1), content=b""), "a tensor that fits a file"),
    "no elements at 0": (empty_at(0), MODEL),
    "no elements at the end": (extra(shape=(0,), content=b""), MODEL),
    "no elements inside another": (empty_at(1), "tensors without holes or overlap, got one at"),
    "an F32 at an odd offset": (both(extra("a"), extra("b", "F32", (1,), bytes(4))), "F32 data aligned to 4 bytes"),
    "an overlap": (set_entry(data_offsets=[0, 24]), "tensors without holes or overlap"),
    "a constant of no name": (rename_constant(""), MODEL),
    "a constant with a control character": (rename_constant("a\x1b\x00\x9b"), MODEL),
    "a note": (set_metadata(note="\x00\x1b\ufeff"), MODEL),
    "a note that is a number": (set_metadata(note=7), "a string, got number - at key `note` of __metadata__"),
    "a key of a note with control characters": (set_metadata(**{"\x1b\n": 7}), "a string, got number - at key `??` of"),
    "requires in any words": (set_metadata(requires="soon"), MODEL),
    "version 2.0": (set_metadata(format_version="2.0"), "format_version 1 to 4, got `2.0`"),
    # JSON
    "white space around the graph": (around(" \r\n\t", "\n "), MODEL),
    "a byte order mark": (around("\ufeff", ""), JSON),
    "a byte 0": (around("", "\0"), JSON),
    "a form feed": (around("\f", ""), JSON),
    "two objects": (around("", "{}"), JSON),
    "16 levels": (deep(14), MODEL),
    "17 levels": (deep(15), "JSON nested at most 16 deep, got deeper"),
    "a key twice": (twice('"scale"'), "unique keys, got the key `scale` twice"),
    "a key twice in other characters": (twice('"sc\\u0061le"'), "unique keys, got the key `scale` twice"),
    "a key in other characters": (lambda draft: activation(draft, 1)[3].__setitem__(0, Raw('"sc\\u0061le"')), MODEL),
    "a surrogate pair": (named(Raw('"\\ud83d\\ude00"')), MODEL),
    "half a surrogate pair": (set_metadata(note=Raw('"\\ud83d"')), JSON),
    "an escaped 0 that is no name": (set_metadata(note=Raw('"\\u0000"')), MODEL),
    "a raw control character in a string": (set_metadata(note=Raw('"a\nb"')), JSON),
    "an ignored number of 10^308": (set_entry(extra=10**308), MODEL),
    "an ignored number of 1e400": (set_entry(extra=Raw("1e400")), JSON),
    "an ignored integer of 10^400": (set_entry(extra=Raw("1" + "0" * 400)), JSON),
    "NaN": (set_entry(extra=Raw("NaN")), JSON),
    "Infinity": (set_entry(extra=Raw("Infinity")), JSON),
    "a leading zero": (set_entry(extra=Raw("01")), JSON),
    "an integer with a fraction": (set_activation(1, zero_point=Raw("7.0")), "an integer in [0, 255], got number"),
    "an integer with an exponent": (set_activation(1, zero_point=Raw("1e2")), "an integer in [0, 255], got number"),
    "an integer in quotes": (set_activation(1, zero_point="7"), "an integer in [0, 255], got string"),
    "an integer that is true": (set_activation(1, zero_point=True), "an integer in [0, 255], got boolean"),
    "an integer -0": (set_activation(5, zero_point=Raw("-0")), MODEL),
    "an integer -1": (set_activation(5, zero_point=-1), "an integer in [0, 255], got -1"),
    "an integer of 2^53 + 1": (
        set_entry(data_offsets=[2**53 + 1, 2**53 + 25]),
        "24 bytes inside 1252, got [90071992547409",
    ),
    "an integer of 2^63": (
        set_entry(data_offsets=[2**63, 2**63]),
        "an integer in [0, 9223372036854775807], got 92233720",
    ),
    "an integer of 2^64": (
        set_entry(data_offsets=[2**64, 2**64]),
        "an integer in [0, 9223372036854775807], got number",
    ),
    "a number without a fraction": (set_node("mul", bias=7), MODEL),
    "a number of 1e-46": (set_node("mul", bias=Raw("1e-46")), MODEL),
    "a number of -0": (set_node("mul", bias=Raw("-0")), MODEL),
    "a number that rounds to infinity": (
        set_node("mul", bias=Raw("3.4028235677973366e38")),
        "a finite f32, got 3.4e+38",
    ),
    "a number that rounds to less": (set_node("mul", bias=Raw("3.4028235677973362e38")), "results below 2^30"),
    "an integer beyond f32": (set_node("mul", bias=2**128), "a finite f32, got 3.4e+38"),
    "a number in quotes": (set_node("mul", bias="7"), "a number, got string"),
    # 3. Graph
    "an extra key of the graph": (set_graph(extra=1), f"{KNOWN}, got `extra` - at the graph"),
    "an extra key of the input": (set_input(extra=1), f"{KNOWN}, got `extra` - at key `input` of the graph"),
    "an extra key of a node": (set_node("add", extra=1), f"{KNOWN}, got `extra` - at node `add.4`"),
    "classes that repeat": (one_name, MODEL),
    "a class too few": (set_graph(classes=["cat"]), "2 class names, got 1"),
    "combine of one member": (set_graph(combine="logits"), "combine null for one member, got string"),
    "a scale of 2^126": (set_activation(5, scale=2.0**126), MODEL),
    "a scale that rounds to 2^126": (set_activation(5, scale=2.0**126 * (1 + 2**-25)), MODEL),
    "a scale above 2^126": (set_activation(5, scale=2.0**126 * (1 + 2**-23)), "a scale in [2^-126, 2^126]"),
    "a scale of 2^-126": (set_activation(5, scale=2.0**-126), MODEL),
    "a scale below 2^-126": (set_activation(5, scale=2.0**-126 * (1 - 2**-23)), "a scale in [2^-126, 2^126]"),
    "a scale of -0": (set_activation(5, scale=-0.0), "a scale in [2^-126, 2^126], got -0"),
    "another grid on one input of a concat": (set_activation(2, zero_point=1), "the output's scale and zero point on"),
    "a std of 0": (set_input(preprocess=Object([["mean", [0] * 3], ["std", [1, 1, 0]]])), "a positive std, got 0"),
    "a name of 512 bytes": (named("é" * 256), MODEL),
    "a name of 513 bytes": (named("é" * 256 + "x"), NAME),
    "an empty name": (named(""), NAME),
    "a name with U+001F": (named("\x1f"), NAME),
    "a name with U+0020": (named(" "), MODEL),
    "a name with U+007F": (named("\x7f"), NAME),
    "a name with U+0080": (named("\x80"), NAME),
    "a name with U+009F": (named("a\x9f"), NAME),
    "a name with U+00A0": (named("\xa0"), MODEL),
    "a name with U+00C2": (named("\xc2\xc2"), MODEL),
    "a name of a node with a slash": (set_node("mul", name="a/b"), MODEL),
    "a name of a member with a slash": (named("a/b"), "a name without `/`, got `a/b` - at key `name` of member 0"),
    "a class with U+009B": (set_graph(classes=["cat", "\x9b31m"]), NAME),
    "an escaped 0 in a name": (named(Raw('"\\u0000"')), NAME),
    "an activation named like another": (set_activation(1, name="input"), MODEL),
    "groups that do not divide": (set_node("conv2d", groups=2), "groups that divide the channels, got 2"),
    "a residual of another shape": (set_node("conv2d", inputs=[0, 0]), "a residual of shape [6, 3, 5], got [3, 6, 5]"),
    "add of two shapes": (set_node("add", inputs=[4, 1]), "a second input of shape [12, 3, 5], got [6, 3, 5]"),
    "mul with another shape": (flat_gate, "a second input of shape [12, 3, 5] or [12, 1, 1], got [6, 3, 5]"),
    "a declared f32 that is none": (set_activation(1, dtype="f32"), "scale 1 and zero point 0 of an f32 tensor"),
    "a clamp the wrong way": (set_node("add", clamp=[9, 8]), "clamp [lo, hi] with lo <= hi, got [9, 8]"),
    "a stride of 65,536": (set_node("conv2d", stride=[65_536, 1]), "an integer in [1, 65535], got 65536"),
    # Bounds
    "2^30": (set_node("mul", multiplier=0, bias=2.0**30), "results below 2^30, got up to 1.07e+09 - at node `mul.5`"),
    "below 2^30": (set_node("mul", multiplier=0, bias=BELOW), MODEL),
    "-2^30": (set_node("add", multipliers=[0, 0], bias=-(2.0**30)), "results below 2^30, got up to 1.07e+09"),
    "2^30 by sums": (set_node("add", multipliers=[HALF / 255, -HALF / 255], bias=0), "results below 2^30"),
    "NaN in a tensor": (floats("0/conv2d.0/bias", math.nan), "finite constants, got nan - at key `bias` of node"),
    "-infinity in a tensor": (floats("0/conv2d.0/bias", -math.inf), "finite constants, got -inf"),
    "a subnormal number": (floats("0/conv2d.0/multiplier", 1e-45), MODEL),
    "2^100 of an f32 output": (floats("0/linear.9/bias", 2.0**100), "results below 2^100, got up to 1.27e+30"),
}


def said_of(path, graph: Graph, change: Change) -> str:
    save(graph, path)
    draft = read(path.read_bytes())
    change(draft)
    path.write_bytes(draft.to_bytes())
    return check(path, _engine.isas()[-1], 1)


@pytest.mark.parametrize("rule", RULES)
def test_rules(tmp_path, rule):
    change, text = RULES[rule]
    said = said_of(tmp_path / "m.safetensors", small_network(), change)
    assert said.startswith(f"expected {text}") if text else said == MODEL


def header_with(length: int | None = None, text: bytes = b"", before: bytes = b"") -> Callable[[bytes], bytes]:
    """A change of a file's bytes: another length, other text around the header."""

    def change(content: bytes) -> bytes:
        size = int.from_bytes(content[:8], "little")
        header = before + content[8 : 8 + size] + text
        return (len(header) if length is None else length).to_bytes(8, "little") + header + content[8 + size :]

    return change


WHOLE = "a whole safetensors file, got"
HEADERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "8 more spaces": (header_with(text=b" " * 8), MODEL),
    "other white space behind": (header_with(text=b"\n\t\r     "), MODEL),
    "white space before": (header_with(before=b" " * 8), WHOLE),
    "a length that is no multiple of 8": (header_with(text=b" "), WHOLE),
    "a length of 0": (header_with(length=0), WHOLE),
    "a length beyond the file": (header_with(length=2**63), WHOLE),
    "a byte 0 behind": (header_with(text=bytes(8)), JSON),
    "a byte order mark": (header_with(before=b"\xef\xbb\xbf     "), WHOLE),
    "bytes that are not UTF-8": (lambda content: content.replace(b"cat", b"c\xff\xff"), JSON),
    "half a surrogate pair in bytes": (lambda content: content.replace(b"cat", b"\xed\xa0\x80"), JSON),
    "a byte too many": (lambda content: content + b"\0", "1252 bytes of data, got 1253"),
    "a byte too few": (lambda content: content[:-1], "18 bytes inside 1251, got [1234, 1252)"),
}


@pytest.mark.parametrize("rule", HEADERS)
def test_rules_of_bytes(tmp_path, rule):
    change, text = HEADERS[rule]
    path = tmp_path / "m.safetensors"
    save(small_network(), path)
    content = change(path.read_bytes())
    assert content != path.read_bytes()
    path.write_bytes(content)
    said = check(path, _engine.isas()[-1], 1)
    assert said.startswith(f"expected {text}") if text else said == MODEL


# ---- What follows from a file ----------------------------------------------------------------------------------------


def global_pooling(residual_shape: tuple[int, ...]) -> Graph:
    """Logits [4] of a convolution whose output [4, 1, 1] is declared [4], with a residual of this shape."""
    builder = Builder(np.random.default_rng(0), (4, 3, 3), (0.5, 100))
    pooled = builder.avg_pool2d(0, (3, 3), (1, 1), (0, 0, 0, 0))
    residual = builder.reshape(pooled, residual_shape)
    builder.conv2d(0, 4, (3, 3), residual=residual, dtype="f32", flat=True)
    return Graph([builder.member()])


def test_a_residual_has_the_declared_shape(tmp_path):
    path = tmp_path / "m.safetensors"
    save(global_pooling((4,)), path)
    assert check(path, _engine.isas()[-1], 1) == MODEL

    def other_residual(draft: Draft) -> None:
        members(draft)[0].get("nodes")[2].set("inputs", [0, 1])  # the [4, 1, 1] before the reshape

    said = said_of(path, global_pooling((4,)), other_residual)
    assert said.startswith("expected a residual of shape [4], got [4, 1, 1] - at node `conv2d.2`")


def test_groups_and_windows_as_documented():
    builder = Builder(np.random.default_rng(0), (6, 7, 6), (1.0, 9))
    builder.conv2d(0, 4, (3, 2), (2, 1), (1, 0, 2, 1), (2, 3), groups=2, dtype="f32")
    graph = Graph([builder.member()])
    weight, m, b = (graph.members[0].nodes[0].constants[key] for key in ("weight", "multiplier", "bias"))
    x = np.random.default_rng(1).integers(-9, 246, (1, 6, 7, 6)).astype(np.float32)  # q - z, since the scale is 1
    expected = np.zeros((1, 4, 3, 4), np.float32)
    for o, y, column in np.ndindex(4, 3, 4):
        acc = 0
        for d, ky, kx in np.ndindex(3, 3, 2):
            row, col = y * 2 - 1 + 2 * ky, column * 1 - 0 + 3 * kx
            if 0 <= row < 7 and 0 <= col < 6:
                acc += int(x[0, o // 2 * 3 + d, row, col]) * int(weight[o, d, ky, kx])
        expected[0, o, y, column] = documented_fma(float(np.float32(acc)), float(m[o]), float(b[o]))
    assert reference.run(graph, x).tobytes() == expected.tobytes()


@pytest.mark.parametrize(("spelled", "bits"), [("-0", 0), ("-0.0", 1 << 31), ("-0e0", 1 << 31), ("0", 0), ("0.0", 0)])
def test_the_sign_of_zero(tmp_path, spelled, bits):
    path = tmp_path / "m.safetensors"
    builder = Builder(np.random.default_rng(0), (1,), (1.0, 0))
    builder.mul(0, 0, dtype="f32")
    said = said_of(path, Graph([builder.member()]), set_node("mul", multiplier=-1, bias=Raw(spelled)))
    assert said == MODEL  # so the engine gives the same
    assert reference.run(load(path), np.zeros((1, 1), np.float32)).view(np.uint32).tolist() == [[bits]]


def test_one_member_gives_its_output_and_the_first_largest_code(tmp_path):
    path = tmp_path / "m.safetensors"
    builder = Builder(np.random.default_rng(0), (4,), (1.0, 0))
    builder.reshape(0, (4,))
    save(Graph([builder.member()], classes=["a", "b", "b", "c"]), path)
    model = qdeploy.load_int_model(path)
    x = np.array([[3, 9, 9, 1]], np.float32)
    assert model(x).dtype == np.uint8 and model(x).tolist() == [[3, 9, 9, 1]]
    assert model.predict(x).tolist() == reference.predict(load(path), x).tolist() == [1]


def documented_fma(a: float, b: float, c: float) -> float:
    """a*b + c of f32 by the recipe of docs/format.md, section 4."""
    p = a * b
    s = p + c
    t = s - p
    e = (p - (s - t)) + (c - t)
    if e != 0 and struct.unpack("<q", struct.pack("<d", s))[0] % 2 == 0:
        s = math.nextafter(s, math.inf if e > 0 else -math.inf)
    with np.errstate(over="ignore"):
        return float(np.float32(s))


F32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
BETWEEN = st.tuples(st.integers(1537, 2047), st.integers(3073, 4095), st.integers(-1, 1), st.integers(35, 65))


@given(F32, F32, F32)
@example(2.0**-75, 2.0**-75, 0.0)  # half the least subnormal
@example(2.0**-75, 2.0**-75, 2.0**-149)
@example(float(np.finfo(np.float32).max), 1.0, 2.0**103)  # between the largest and 2^128
def test_the_documented_fma(a, b, c):
    assert documented_fma(a, b, c) == reference.fma32(*map(np.float32, (a, b, c)))


@given(BETWEEN)  # a*b of 25 bits lies between two f32, and a c that no double holds beside it decides
def test_the_documented_fma_does_not_round_twice(numbers):
    a, b, c = 2.0 * numbers[0] + 1, 2.0 * numbers[1] + 1, math.ldexp(numbers[2], -numbers[3])
    exact = round((Fraction(a) * Fraction(b) + Fraction(c)) / 2) * 2  # 24 of its 25 bits, half to even
    assert documented_fma(a, b, c) == exact
