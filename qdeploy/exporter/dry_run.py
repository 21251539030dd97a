"""What `export` of a network would stop at, without weights worth the name and without calibration data."""

from __future__ import annotations

import numpy as np

from qdeploy.errors import ExportError, ModelError
from qdeploy.exporter.calibrate import Grids
from qdeploy.exporter.emit import check_shapes, emit
from qdeploy.exporter.grid import Grid, stream_grid
from qdeploy.exporter.layers import Codes, Layer, Network, Table, Weighted
from qdeploy.graph import Graph
from qdeploy.validate import validate

RANGE = Grid(1.0, 128)  # of whatever calibration would say


def check_graph(network: Network) -> None:
    """Raises ExportError unless the fused network is a valid graph with codes 0 and ranges of 256; changes it."""
    check_shapes(network)
    for layer in network.layers:
        if isinstance(layer, Weighted):
            layer.weight, layer.scale = Codes(np.zeros(layer.weight.shape, np.int8), 8), np.ones_like(layer.scale)
            layer.shift = np.zeros_like(layer.shift)
        elif isinstance(layer, Table):
            layer.function = lambda values: values * 0  # one may be infinite in a range that is none
    member = emit("net", network, _grids(network))
    vocabulary = next((node.constants["weight"].shape[0] for node in member.nodes if node.op == "embedding"), None)
    try:
        validate(Graph([member], vocabulary=vocabulary))
    except ModelError as error:
        raise ExportError(str(error)) from error


def _grids(network: Network) -> dict[Layer, Grid]:
    grids = Grids(network, "minmax")
    found = dict(grids.fixed)
    for bundle, _ in grids.observed:
        found |= dict.fromkeys(bundle, stream_grid(-1.0, 1.0) if bundle[0] in grids.streams else RANGE)
    return found
