"""Mutations of ONNX files: of bytes, and of dims, types, names, edges and constants. What reads them may only refuse.

    python tests/fuzz/onnx_mutations.py [COUNT] [SEED]

Each is converted within 5 s of the processor and 3 GB of addresses, of which the libraries map two; what becomes of it
must load. The first that does anything else is written to onnx_mutation.bin and ends the run.
"""

from __future__ import annotations

import resource
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx

from qdeploy import load_int_model
from qdeploy.errors import QdeployError
from qdeploy.exporter import converted
from qdeploy.exporter.from_onnx import LOWERING

FILES = Path(__file__).resolve().parent.parent / "data/onnx"
NUMBERS = (-(2**63), -(2**31), -5, -1, 0, 1, 2, 3, 7, 255, 2**16, 2**31, 2**40, 2**62)


def seeds() -> list[bytes]:
    return [path.read_bytes() for path in sorted(FILES.glob("*.onnx"))]


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    if rng.random() < 0.3:
        return _bytes(content, rng)
    model = onnx.ModelProto.FromString(content)
    for _ in range(int(rng.integers(1, 4))):
        STRUCTURE[rng.integers(len(STRUCTURE))](model, rng)
    return model.SerializeToString()


def _bytes(content: bytes, rng: np.random.Generator) -> bytes:
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 9))):
        place = int(rng.integers(len(data)))
        kind = rng.integers(3)
        if kind == 0:
            data[place] = int(rng.integers(256))
        elif kind == 1:
            del data[place : place + int(rng.integers(1, 40))]
        else:
            data[place:place] = rng.integers(0, 256, int(rng.integers(1, 9)), np.uint8).tobytes()
        if not data:
            return b""
    return bytes(data)


def _pick(items: object, rng: np.random.Generator) -> object:
    found = list(items)  # type: ignore[call-overload]
    return found[int(rng.integers(len(found)))] if found else None


def _number(rng: np.random.Generator) -> int:
    return int(NUMBERS[rng.integers(len(NUMBERS))])


def _dims(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    tensor = _pick(model.graph.initializer, rng)
    if tensor is not None and tensor.dims:
        tensor.dims[int(rng.integers(len(tensor.dims)))] = _number(rng)


def _type(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    tensor = _pick(model.graph.initializer, rng)
    if tensor is not None:
        tensor.data_type = int(rng.integers(0, 30))


def _values(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    tensor = _pick(model.graph.initializer, rng)
    if tensor is not None and tensor.raw_data:
        data = np.frombuffer(tensor.raw_data, np.uint8).copy()
        data[rng.integers(len(data))] = rng.integers(256)
        tensor.raw_data = data.tobytes()


def _edge(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    node = _pick(model.graph.node, rng)
    other = _pick(model.graph.node, rng)
    if node is not None and node.input and other is not None and other.output:
        names = [*other.output, *other.input, "", "nobody"]
        node.input[int(rng.integers(len(node.input)))] = names[int(rng.integers(len(names)))]


def _name(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    node = _pick(model.graph.node, rng)
    if node is not None and node.output:
        node.output[0] = _pick([other.output[0] for other in model.graph.node if other.output], rng)


def _op(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Of the file itself, or any that is read."""
    node = _pick(model.graph.node, rng)
    other = _pick(model.graph.node, rng)
    if node is not None and other is not None:
        own = rng.random() < 0.5
        node.op_type, node.domain = (other.op_type, other.domain) if own else (_pick(sorted(LOWERING), rng), "")


def _attribute(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    attributes = [a for node in model.graph.node for a in node.attribute]
    attribute = _pick(attributes, rng)
    if attribute is None:
        return
    attribute.i = max(-(2**63), min(_number(rng), 2**63 - 1))
    if attribute.ints:
        attribute.ints[int(rng.integers(len(attribute.ints)))] = attribute.i
    if rng.random() < 0.2:
        attribute.type = int(rng.integers(1, 14))


def _more_inputs(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Names of the graph behind those that a node has, once or very often."""
    node = _pick(model.graph.node, rng)
    names = [name for other in model.graph.node for name in (*other.input, *other.output)]
    if node is not None and names:
        node.input.extend([str(_pick(names, rng))] * int(rng.choice([1, 1, 2, 100, 10000])))


def _remove(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    part = model.graph.node if rng.random() < 0.5 else model.graph.initializer
    if len(part):
        del part[int(rng.integers(len(part)))]


def _twice(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    node = _pick(model.graph.node, rng)
    if node is not None:
        model.graph.node.append(node)


def _input(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    dims = model.graph.input[0].type.tensor_type.shape.dim if model.graph.input else []
    dim = _pick(dims, rng)
    if dim is not None:
        dim.dim_value = _number(rng)


def _constant(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """A constant of any size in place of another."""
    tensor = _pick(model.graph.initializer, rng)
    if tensor is None:
        return
    sizes = [_number(rng) for _ in range(int(rng.integers(1, 5)))]
    shape = onnx.numpy_helper.from_array(np.array(sizes, np.int64), f"{tensor.name}_shape")
    node = onnx.helper.make_node("ConstantOfShape", [shape.name], [tensor.name])
    model.graph.initializer.remove(tensor)
    model.graph.initializer.append(shape)
    model.graph.node.insert(0, node)


def _opset(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    for opset in model.opset_import:
        opset.version = int(rng.integers(5, 30))


STRUCTURE = (
    _dims,
    _type,
    _values,
    _edge,
    _name,
    _op,
    _attribute,
    _more_inputs,
    _remove,
    _twice,
    _input,
    _constant,
    _opset,
)


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError("5 s")


def main(count: int, seed: int) -> None:
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
    signal.signal(signal.SIGVTALRM, _too_long)
    rng = np.random.default_rng(seed)
    files = seeds()
    read = 0
    for i in range(count):
        content = mutated(files[int(rng.integers(len(files)))], rng)
        signal.setitimer(signal.ITIMER_VIRTUAL, 5)
        try:
            load_int_model(converted(content))
            read += 1
        except QdeployError as error:
            assert "\n" not in str(error)
        except BaseException:
            Path("onnx_mutation.bin").write_bytes(content)
            raise
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if i % 1000 == 999:
            print(f"{i + 1} mutations, {read} of them read", flush=True)


if __name__ == "__main__":
    main(*(int(text) for text in [*sys.argv[1:], "100000", "0"][:2]))
