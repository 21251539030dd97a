"""Rules for layers that move elements: fewer of them, and where they cost least."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from qdeploy.exporter.elements import with_channels
from qdeploy.exporter.layers import Conv2d, Gather, Image, Layer, LearnedWeight, Linear, Network, Tokens, Weighted
from qdeploy.ops.op import channels_of, rows_of


def _share(network: Network, gather: Gather) -> bool:
    """Two of one tensor by one index are one."""
    for other in network.users(gather.inputs[0]):
        same = isinstance(other, Gather) and (other.axis, other.shape) == (gather.axis, gather.shape)
        if same and other is not gather and np.array_equal(other.index, gather.index):
            first, second = sorted((gather, other), key=network.layers.index)
            network.replace(second, first)
            return True
    return False


def _into_weight(network: Network, gather: Gather) -> bool:
    """Channels of a layer whose weight makes them are a layer with these rows of the weight: q, k and v of one linear
    layer, the halves of a split."""
    x = gather.inputs[0]
    if gather.axis != "channels" or gather.index.min() < 0 or not _makes_channels(x):
        return False
    users = network.users(x)
    if x is network.output or not all(isinstance(user, Gather) and user.axis == "channels" for user in users):
        return False
    if sum(len(user.index) for user in users if isinstance(user, Gather)) > x.channels:
        return False
    parts = [user for user in users if isinstance(user, Gather)]
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
    weight = x.weight.of(index) if isinstance(x.weight, LearnedWeight) else x.weight[index]
    rows = rows_of(x.shape)
    value = x.value.of(np.arange(rows)[:, None] * channels_of(x.shape) + index, x.shape)
    fields = {"weight": weight, "scale": x.scale[index], "shift": x.shift[index]}
    if isinstance(x, Conv2d):
        fields |= {"window": dict(x.window)}
    return type(x)(x.name, list(x.inputs), part.shape, value, x.low, x.high, **fields)


def _before_rows(network: Network, gather: Gather) -> bool:
    """A gather of rows goes before the layer that makes each row of one row, so that it stands between no projection
    and its residual, and layers that read one tensor share one."""
    x = gather.inputs[0]
    if gather.axis != "rows" or gather.index.min() < 0 or network.only_user(x) is not gather:
        return False
    if not isinstance(x, (Conv2d, Linear)) or len(x.inputs) != 1 or not _is_by_rows(x):
        return False
    source = x.inputs[0]
    moved = Gather(
        *(gather.name, [source], with_channels(gather.shape, channels_of(source.shape)), source.value),
        axis="rows",
        index=gather.index,
    )
    channels = channels_of(x.shape)
    value = x.value.of(gather.index[:, None] * channels + np.arange(channels), x.shape)
    layer = _by_rows(x, moved, gather.shape, value)
    network.replace(gather, layer)
    network.layers.insert(network.layers.index(layer), moved)
    network.layers.remove(x)
    return True


def _is_by_rows(x: Weighted) -> bool:
    if not isinstance(x, Conv2d):
        return len(x.shape) == 2
    window = x.window
    return x.weight.shape[2:] == (1, 1) and window["stride"] == [1, 1] and not any(window["padding"])


def _by_rows(x: Any, source: Layer, shape: tuple[int, ...], value: Any) -> Layer:
    """x, of tokens or of an image as `shape` says."""
    fields = {"weight": x.weight, "scale": x.scale, "shift": x.shift}
    kind: type[Weighted] = Conv2d if len(shape) == 3 else Linear
    rank = 4 if kind is Conv2d else 2
    if len(x.weight.shape) != rank:
        sizes = (*x.weight.shape[:2], *[1] * (rank - 2))
        learned = isinstance(x.weight, LearnedWeight)
        fields["weight"] = x.weight.reshaped(sizes) if learned else x.weight.reshape(sizes)
    if kind is Conv2d:
        window = {"stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": 1}
        fields |= {"window": x.window if isinstance(x, Conv2d) else window}
    return kind(x.name, [source], shape, value, x.low, x.high, **fields)


def _view_first(network: Network, view: Tokens | Image) -> bool:
    """Another form of what a layer makes row by row is what it makes of the other form: the view then stands between no
    projection and its residual."""
    x = view.inputs[0]
    if network.only_user(x) is not view or not isinstance(x, (Conv2d, Linear)) or len(x.inputs) != 1:
        return False
    if not _is_by_rows(x):
        return False
    source = x.inputs[0]
    first = type(view)(view.name, [source], with_channels(view.shape, channels_of(source.shape)), source.value)
    value = x.value.of(np.arange(math.prod(x.shape)), x.shape)
    layer = _by_rows(x, first, view.shape, value)
    network.replace(view, layer)
    network.layers.insert(network.layers.index(layer), first)
    network.layers.remove(x)
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
    "gather": (_not_at_all, _merge_gathers, _share, _into_weight, _before_rows),
    "tokens": (_merge_views, _share_view, _view_first),
    "image": (_merge_views, _share_view, _view_first),
}
