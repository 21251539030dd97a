"""No matrix stays float in silence: those that a walk over the quantizable layers misses are found, and named.

CLIP's image tower multiplies by `proj`, an LSTM by `weight_ih_l0`, cross attention by `q_proj_weight`: none of these is
the weight of a layer that `quantize_` knows. What a matrix is used for cannot be seen without running the
network, and its shape does not tell. Counted are all floating parameters with two dimensions or more greater than 1,
but for those that no activation is multiplied with as with a matrix:

- weights of quantizable layers: each is quantized, left out by name, or the classifier;
- those of nn.Embedding and nn.EmbeddingBag, which are looked up, and of norms, which scale elements;
- by their own name those with a word that begins with `pos`, `emb` or `token` (`pos_embedding`, `rel_pos_h`,
  `cls_token`), unless it says `weight` or `proj` as well, and those with `bias` (`relative_position_bias_table`): they
  are added. Embeddings of positions stay float in the papers whatever is done with them.

So a doubtful one is named, which costs its reader a pattern in `allow_float`; a miss would cost the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from torch import nn

from qdeploy.errors import InputError
from qdeploy.networks.quantizable import WEIGHT_TYPES, weight_name
from qdeploy.networks.wrappers import plain_names

NO_MATRICES = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)  # of other norms parameters have one dimension
ADDED = re.compile(r"bias|^(?!.*(weight|proj))(.*_)?(pos|emb|token)")  # names of parameters that are added


def check_matrices(net: nn.Module, allowed: list[str], layers: Iterable[nn.Module] = ()) -> None:
    """Raises InputError where a matrix outside of `layers`, and of convolutions and linear layers, has no name or
    pattern in `allowed`."""
    found = [
        f"`{name}` {list(parameter.shape)}"
        for name, parameter in _matrices(net, layers)
        if not any(fnmatchcase(name, str(pattern)) for pattern in allowed)
    ]
    if found:
        got = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        expected = "matrices that are weights of convolutions or linear layers"
        raise InputError(f"expected {expected}, got {got} (allow it to stay float by name: allow_float) - at quantize_")


def _matrices(net: nn.Module, layers: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """The matrices that none of these layers has, by name; a shared one once."""
    covered: set[int] = set()
    known = {*layers}
    for module in net.modules():
        if module in known or isinstance(module, (*WEIGHT_TYPES, *NO_MATRICES)):
            own = {name.removeprefix("parametrizations."): id(value) for name, value in module.named_parameters()}
            covered |= {key for name, key in own.items() if name.startswith(weight_name(module))}  # `weight_v`, too
    for path, plain in plain_names(net).items():
        for name, parameter in net.get_submodule(path)._parameters.items():
            if parameter is None or id(parameter) in covered or ADDED.search(name):
                continue
            if parameter.is_floating_point() and sum(size > 1 for size in parameter.shape) > 1:
                covered.add(id(parameter))
                yield f"{plain}.{name}".lstrip("."), parameter
