"""Rules for layers that move elements: fewer of them, and where they cost least."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from qdeploy.exporter.elements import Value, with_channels
from qdeploy.exporter.layers import (
    Codes,
    Conv2d,
    Gather,
    Image,
    Layer,
    Linear,
    Network,
    Norm,
    Quantize,
    QuantizedWeight,
    Table,
    Tokens,
    Weighted,
)
from qdeploy.graph import Shape
from qdeploy.ops.op import channels_of, rows_of


def _is_function(layer: Layer) -> bool:
    """Of each element, the same for all channels."""
    return isinstance(layer, Quantize) or isinstance(layer, Table) and not layer.by_channel


def _share(network: Network, gather: Gather) -> bool:
    """Two of one tensor by one index are one."""
    for other in network.users(gather.inputs[0]):
        if not isinstance(other, Gather) or other is gather:
            continue
        same = (other.axis, other.shape) == (gather.axis, gather.shape)
        if same and np.array_equal(other.index, gather.index):
            first, second = sorted((gather, other), key=network.layers.index)
            network.replace(second, first)
            return True
    return False


def _into_weight(network: Network, gather: Gather) -> bool:
    """Channels of a layer whose weight makes them are a layer with these rows of the weight: q, k and v of one linear
    layer, the halves of a split."""
    x = gather.inputs[0]
    if gather.axis != "channels" or not _makes_channels(x) or x in network.outputs:
        return False
    parts = [user for user in network.users(x) if isinstance(user, Gather) and user.axis == "channels"]
    taken = np.concatenate([part.index for part in parts])
    if len(parts) < len(network.users(x)) or taken.min() < 0 or len(taken) > channels_of(x.shape):
        return False
    for part in parts:
        network.replace(part, _channels_of(x, part))
    network.layers.remove(x)
    return True


def _makes_channels(x: Layer) -> bool:
    if not isinstance(x, (Conv2d, Linear)) or len(x.inputs) != 1:
        return False
    return not isinstance(x, Conv2d) or x.window["groups"] == 1


def _channels_of(x: Any, part: Gather) -> Layer:
    index = part.index
    rows = rows_of(x.shape)
    value = x.value.of(np.arange(rows)[:, None] * channels_of(x.shape) + index, x.shape)
    scale, shift = x.scale[index], x.shift[index]
    fields = {"weight": x.weight[index], "scale": scale, "shift": shift}
    return replace(x, inputs=list(x.inputs), shape=part.shape, value=value, **fields)


def _before_functions(network: Network, gather: Gather) -> bool:
    """Channels of functions of a layer whose weight makes them, which nothing else reads, are functions of its
    channels."""
    x = gather.inputs[0]
    if gather.axis != "channels" or not _is_function(x) or gather.index.min() < 0:
        return False
    made: Layer = x
    user: Layer = gather
    while _is_function(made) and network.only_user(made) is user:
        made, user = made.inputs[0], made
    if not _makes_channels(made) or network.only_user(made) is not user or len(gather.index) > channels_of(x.shape):
        return False
    taken = np.arange(rows_of(x.shape))[:, None] * channels_of(x.shape) + gather.index
    _swap(network, gather, x, x.value.of(taken, x.shape))
    return True


def _into_readers(network: Network, gather: Gather) -> bool:
    """All channels in another order are another order of the weights that read them."""
    x, order = gather.inputs[0], np.argsort(gather.index)
    whole = np.array_equal(gather.index[order], np.arange(channels_of(x.shape)))
    if gather.axis != "channels" or not whole or not _feeds_weights(network, gather):
        return False
    users: list[Any] = network.users(gather)
    if len(users) == 1 and _is_function(users[0]):
        _swap_function(network, gather, users[0], order)
        return True
    if any(_is_function(user) for user in users):
        return False
    for user in users:
        held = user.weight
        quantized = isinstance(held, QuantizedWeight)
        user.weight = replace(held, value=held.value[:, order]) if quantized else held[:, order]
    network.replace(gather, x)
    return True


def _feeds_weights(network: Network, x: Layer) -> bool:
    """Whether nothing but weights, each of all channels, reads it, or reads functions of it."""
    users = network.users(x)
    of_functions = [user for user in users if _is_function(user)]
    return (
        x not in network.outputs
        and all(_reads_channels(user, x) for user in users if user not in of_functions)
        and all(_feeds_weights(network, user) for user in of_functions)
    )


def _reads_channels(user: Layer, x: Layer) -> bool:
    if not isinstance(user, (Conv2d, Linear)) or isinstance(user.weight, Codes) or user.inputs.count(x) > 1:
        return False
    return user.inputs[0] is x and (not isinstance(user, Conv2d) or user.window["groups"] == 1)


def _swap_function(network: Network, gather: Gather, function: Any, order: np.ndarray) -> None:
    """The function of all channels, and then their order."""
    elements = np.arange(rows_of(function.shape))[:, None] * len(order) + order
    value = function.value.of(elements, function.shape)
    first = replace(function, inputs=[*gather.inputs], shape=gather.inputs[0].shape, value=value)
    behind = replace(gather, inputs=[first], value=function.value)
    network.replace(gather, first)
    network.replace(function, behind)


def _before_rows(network: Network, gather: Gather) -> bool:
    """A gather of rows goes before the layer that makes each row of one row, so that it stands between no projection
    and its residual, and layers that read one tensor share one; fewer rows also go before norms and tables."""
    x = gather.inputs[0]
    if gather.axis != "rows" or gather.index.min() < 0 or network.only_user(x) is not gather:
        return False
    fewer = len(gather.index) < rows_of(x.shape)
    if not _is_by_rows(x) and not (fewer and (isinstance(x, Table) or isinstance(x, Norm) and x.groups is None)):
        return False
    channels = channels_of(x.shape)
    taken = gather.index[:, None] * channels + np.arange(channels)
    _swap(network, gather, x, x.value.of(taken, x.shape))
    return True


def _swap(network: Network, move: Any, x: Layer, value: Value) -> None:
    """`move`, which reads x alone, in front of it; `value` is then that of x."""
    source = x.inputs[0]
    shape = with_channels(move.shape, channels_of(source.shape)) if isinstance(x, Weighted) else move.shape
    first = replace(move, inputs=[source], shape=shape, value=source.value)
    layer = _by_rows(x, first, move.shape, value)
    network.replace(move, layer)
    network.layers.insert(network.layers.index(layer), first)
    network.layers.remove(x)


def _is_by_rows(x: Layer) -> bool:
    """Whether it is a linear layer of each row, without a residual."""
    if not isinstance(x, (Conv2d, Linear)) or len(x.inputs) != 1 or isinstance(x.weight, Codes):
        return False
    if not isinstance(x, Conv2d):
        return len(x.shape) == 2
    window = x.window
    plain = window["stride"] == [1, 1] and not any(window["padding"]) and window["groups"] == 1
    return plain and x.weight.shape[2:] == (1, 1)


def _by_rows(x: Any, source: Layer, shape: Shape, value: Value) -> Layer:
    """x, of tokens or of an image as `shape` says."""
    if not isinstance(x, Weighted):
        return replace(x, inputs=[source], shape=shape, value=value)
    fields: dict[str, Any] = {"weight": x.weight, "scale": x.scale, "shift": x.shift}
    kind: type[Weighted] = Conv2d if len(shape) == 3 else Linear
    rank = 4 if kind is Conv2d else 2
    if len(x.weight.shape) != rank:
        weight: Any = x.weight
        fields["weight"] = weight.reshape((*weight.shape[:2], *[1] * (rank - 2)))
    if kind is Conv2d:
        fields["window"] = {"stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": 1}
    return kind(x.name, [source], shape, value, x.low, x.high, **fields)


def _view_first(network: Network, view: Tokens | Image) -> bool:
    """Another form of what a layer makes row by row is what it makes of the other form: the view then stands between no
    projection and its residual."""
    x = view.inputs[0]
    if network.only_user(x) is not view or not _is_by_rows(x):
        return False
    _swap(network, view, x, x.value.of(np.arange(math.prod(x.shape)), x.shape))
    return True


def _share_view(network: Network, view: Tokens | Image) -> bool:
    for other in network.users(view.inputs[0]):
        if other is not view and type(other) is type(view) and other.shape == view.shape:
            first, second = sorted((view, other), key=network.layers.index)
            network.replace(second, first)
            return True
    return False


def _merge_views(network: Network, view: Tokens | Image) -> bool:
    """There and back is nothing; a gather gives either form."""
    x = view.inputs[0]
    if x.shape == view.shape:
        network.replace(view, x)
        return True
    if isinstance(x, (Tokens, Image)) and x.inputs[0].shape == view.shape:
        network.replace(view, x.inputs[0])
        return True
    if isinstance(x, Gather) and x.axis == "rows" and network.only_user(x) is view:
        x.shape = view.shape
        network.replace(view, x)
        return True
    return False


def _merge_gathers(network: Network, gather: Gather) -> bool:
    """Of rows of rows."""
    x = gather.inputs[0]
    if not isinstance(x, Gather) or x.axis != gather.axis or network.only_user(x) is not gather:
        return False
    gather.index = np.where(gather.index < 0, -1, x.index[gather.index])
    gather.inputs = x.inputs
    network.layers.remove(x)
    return True


def _not_at_all(network: Network, gather: Gather) -> bool:
    source = gather.inputs[0]
    count = (rows_of if gather.axis == "rows" else channels_of)(source.shape)
    if source.shape != gather.shape or not np.array_equal(gather.index, np.arange(count)):
        return False
    network.replace(gather, source)
    return True


MOVES: dict[str, tuple[Callable[[Network, Any], bool], ...]] = {
    "gather": (_not_at_all, _merge_gathers, _share, _into_weight, _before_functions, _into_readers, _before_rows),
    "tokens": (_merge_views, _share_view, _view_first),
    "image": (_merge_views, _share_view, _view_first),
}
