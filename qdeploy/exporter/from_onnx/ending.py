"""What a classifier has behind its scores, which `predict` and ensembles do themselves."""

from __future__ import annotations

from qdeploy.exporter.from_onnx.model import File

LAST = ("Softmax", "LogSoftmax", "ArgMax")
PASSING = ("Identity", "QuantizeLinear", "DequantizeLinear", "Cast", "Flatten", "Reshape", "Squeeze")


def scores(file: File) -> tuple[str, list[str]]:
    """The tensor before a Softmax, LogSoftmax or ArgMax at the end, and what was dropped, in words. A quantizer of
    probabilities is of no use to logits."""
    makers = {name: node for node in file.nodes for name in node.outputs}
    output, notes, name = file.output, [], file.output
    while (node := makers.get(name)) is not None and node.inputs:
        if node.op in LAST:
            output = node.inputs[0]
            notes.append(f"{node.op} at the end dropped: the output is what it reads - at node `{node.name}`")
        elif node.op not in PASSING:
            break
        name = node.inputs[0]
    return output, notes
