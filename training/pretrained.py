"""Pretrained weights of `--weights`: files as others publish them, read without running what they hold."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.errors import InputError
from qdeploy.networks.quantizable import classifier

WRAPPERS = ("state_dict", "model", "net")  # keys of files that hold more than weights; "net" of our own runs
COUNTER = "num_batches_tracked"
PREFIXES = ("module.encoder_q.", "module.")  # of MoCo's query encoder, and of (Distributed)DataParallel


def load_pretrained(net: nn.Module, path: Path) -> str:
    """Loads the weights in the file `path` into `net`, but for a classifier of another shape.

    The file is a state dict, .pth or .safetensors, maybe with one of `PREFIXES` and in one of `WRAPPERS`.

    Returns:
        What was loaded and what was left out, in words.

    Raises:
        InputError: what the file holds instead of such weights; tensors that lack, have other shapes or are not finite,
            the first by its name.
    """
    found, own = _state_dict(path), net.state_dict()
    names = list(own)
    body, head = _body_and_head(net, names)
    fits = {name for name, value in found.items() if name in own and value.shape == own[name].shape}
    # BatchNorm counts its batches since torch 0.4.1; weights from before are still in use.
    lacking = [name for name in names if name not in fits and not (name not in found and name.endswith(COUNTER))]
    _check_body(net, found, own, [name for name in lacking if name in body], path)
    wanted = fits.difference(head) if lacking else fits
    loaded = {name: found[name] for name in names if name in wanted}
    for name, value in loaded.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"expected finite weights, got NaN or infinity in `{name}` - at {path}")
    net.load_state_dict(own | loaded)
    text = f"{len(loaded)} tensors of {path}"
    if out := [name for name in found if name not in loaded]:
        text += f", without {', '.join(out[:4])}" + (f" and {len(out) - 4} more" if len(out) > 4 else "")
    return f"{text}; a new classifier" if lacking else text


def _body_and_head(net: nn.Module, names: list[str]) -> tuple[list[str], list[str]]:
    """A class of transformers says what is pretrained: beside it DistilBERT has a layer before its classifier, and what
    is published has neither."""
    backbone = f"{getattr(net, 'base_model_prefix', None) or ''}."
    body = [name for name in names if name.startswith(backbone)]
    if not body:
        body = names[: next(i for i, name in enumerate(names) if name.startswith(f"{classifier(net)}."))]
    return body, [name for name in names if name not in {*body}]


def _check_body(
    net: nn.Module, found: Mapping[str, Tensor], own: Mapping[str, Tensor], lacking: list[str], path: Path
) -> None:
    if not lacking:
        return
    first, others = lacking[0], len(lacking) - 1
    got = f"no `{first}`"
    if first in found:
        got = f"shape {list(found[first].shape)} instead of {list(own[first].shape)} for `{first}`"
    more = f" and {others} more that lack or have another shape" if others else ""
    raise InputError(f"expected the weights of a {type(net).__name__}, got {got}{more} - at {path}")


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors in the file by their names in the network."""
    state = _content(path)
    for wrapper in WRAPPERS:
        if isinstance(state, Mapping) and wrapper in state:
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise InputError(f"expected weights by name (a state dict), got a {type(state).__name__} - at {path}")
    for key, value in state.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            continue
        got = f"a {type(value).__name__} for `{key}`"
        raise InputError(f"expected weights by name (a state dict), got {got} - at {path}")
    for prefix in PREFIXES:
        if stripped := {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}:
            return stripped
    return dict(state)


def _content(path: Path) -> Any:
    """What the file holds, whatever it is."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if not start:
            raise InputError(f"expected a file of weights, got an empty one - at {path}")
        if path.suffix == ".safetensors" or start[8:] == b"{":  # its header begins with the length in 8 bytes
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what torch takes a damaged file for
            return torch.load(path, map_location="cpu", weights_only=True)
    except (InputError, MemoryError):
        raise
    except OSError as error:
        raise InputError(f"expected a file of weights, got {error.strerror or error} - at {path}") from error
    except Exception as error:  # the two readers have many
        got = "a damaged one, maybe cut" if start.startswith(b"PK") else "another or a damaged one"  # PK: a zip archive
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            got = f"a pickled {refused[1]}, which would run code: torch.save its state_dict()"
        raise InputError(f"expected a file of weights, got {got} - at {path}") from error
