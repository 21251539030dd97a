"""What a classifier has behind its scores, which `predict` and ensembles do themselves."""

from __future__ import annotations

from collections.abc import Mapping

from qdeploy.exporter.from_onnx.model import File, Node

LAST = ("Softmax", "LogSoftmax", "ArgMax")
PASSING = ("Identity", "QuantizeLinear", "DequantizeLinear", "Cast", "Flatten", "Reshape", "Squeeze")


def scores(file: File) -> tuple[dict[str, str], list[str]]:
    """By tensor the output of the file that it stands for: the tensor before a Softmax, LogSoftmax or ArgMax at the end
    stands for these; and what was dropped, in words. A quantizer of probabilities is of no use to logits."""
    makers = {name: node for node in file.nodes for name in node.outputs}
    found: dict[str, str] = {}
    notes: list[str] = []
    for name in file.outputs:
        output, dropped = _before_last(makers, name)
        notes += dropped
        if output in found:
            notes.append(f"output `{name}` dropped: it would be `{found[output]}` once more")
        found.setdefault(output, name)
    return found, notes


def _before_last(makers: Mapping[str, Node], name: str) -> tuple[str, list[str]]:
    output, notes = name, []
    while (node := makers.get(name)) is not None and node.inputs:
        if node.op in LAST:
            output = node.inputs[0]
            notes.append(f"{node.op} at the end dropped: the output is what it reads - at node `{node.name}`")
        elif node.op not in PASSING:
            break
        name = node.inputs[0]
    return output, notes
