"""Networks by the name that a run has for them: those of `models.py`, of timm and transformers, and anyone's own.

None comes pretrained: weights come from a file, which `pretrained.py` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn

from qdeploy.errors import InputError, QdeployError, one_line
from qdeploy.training.models import MODELS

FORMS = "timm:NAME, transformers:ClassName or package.module:callable"


def build(name: str, classes: int, in_channels: int, **options: Any) -> nn.Module:
    """The network `name` with random weights, from images [N, in_channels, H, W] to logits [N, classes].

    Args:
        name: one of `MODELS`; `timm:NAME` and `transformers:ClassName` (a class with logits, as
            ViTForImageClassification), which the extra `models` installs; or `package.module:callable`, which is called
            with (classes, in_channels=in_channels, **options).
        options: what the constructor takes by keyword: `depth` and `width` of NiN, those of the model in timm, the
            fields of the configuration in transformers (`hidden_size`).

    Raises:
        InputError: an unknown name or option, a package that is not installed, a constructor that raises or makes no
            nn.Module.
    """
    source, colon, inner = name.partition(":")
    if not colon and name not in MODELS:
        raise InputError(f"expected one of {', '.join(MODELS)}, or {FORMS}, got {name!r} - at --model")
    try:
        if colon and source in SOURCES:
            net = SOURCES[source](inner, classes, in_channels, options)
        else:
            make = _imported(source, inner) if colon else MODELS[name]
            first = next(iter(signature(make).parameters), "classes")
            _check_options(options, _keywords(make, options, (first, "in_channels")), name)
            net = make(classes, in_channels=in_channels, **options)
    except QdeployError:
        raise
    except Exception as error:  # of others' code
        got = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"expected options that make a network, got {got} - at --model {name}") from error
    if not isinstance(net, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(net).__name__} - at --model {name}")
    return net


def _check_options(options: Iterable[str], known: Iterable[str], name: str) -> None:
    if unknown := [option for option in options if option not in known]:
        expected = f"options among {', '.join(known)}" if known else "no options"
        raise InputError(f"expected {expected}, got {', '.join(unknown)} - at --model {name}")


def _keywords(make: Callable[..., Any], options: Iterable[str], given: Iterable[str]) -> list[str]:
    """What `make` takes by keyword beside what is given; where it takes anything, that includes the `options`."""
    parameters = signature(make).parameters.values()
    names = [one.name for one in parameters if one.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)]
    if any(one.kind is Parameter.VAR_KEYWORD for one in parameters):
        names += options
    return [name for name in names if name not in given]


def _imported(path: str, attribute: str) -> Callable[..., Any]:
    try:
        module = import_module(path)
    except Exception as error:  # whatever the module does
        got = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"expected a module to import, got {got} - at --model {path}:{attribute}") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        got = "none" if found is None else f"a {type(found).__name__}"
        raise InputError(f"expected a callable `{attribute}` in {path}, got {got} - at --model {path}:{attribute}")
    return found


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except Exception as error:  # timm imports torchvision, which fails beside another version of torch
        got = "none" if isinstance(error, ModuleNotFoundError) and error.name == name else one_line(error)
        expected = f'the package {name} (pip install "qdeploy[models]")'
        raise InputError(f"expected {expected}, got {got} - at --model {name}:...") from error


def _unknown(name: str, known: Iterable[str], source: str) -> InputError:
    near = get_close_matches(name, list(known), 5, 0.5)
    expected = f"a network of {source}" + (f" ({', '.join(near)}, ...)" if near else "")
    return InputError(f"expected {expected}, got {name!r} - at --model {source}:{name}")


def _timm(name: str, classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    timm = _package("timm")
    if not timm.is_model(name):
        raise _unknown(name, timm.list_models(), "timm")
    try:
        return timm.create_model(name, pretrained=False, num_classes=classes, in_chans=in_channels, **options)
    except TypeError:  # its functions take anything, the classes behind them do not
        kind = type(timm.create_model(name, pretrained=False))
        _check_options(options, _keywords(kind, options, ("num_classes", "in_chans")), f"timm:{name}")
        raise


def _transformers(name: str, classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    transformers = _package("transformers")
    kind: Any = getattr(transformers, name, None)
    if getattr(kind, "config_class", None) is None:
        known = [one for one in dir(transformers) if one.endswith("Classification") and not one.startswith("Auto")]
        raise _unknown(name, known, "transformers")
    fields, general = kind.config_class().to_dict(), transformers.PretrainedConfig().to_dict()
    # A configuration would keep what it does not know.
    known = [one for one in fields if one not in general and one != "num_channels"]
    _check_options(options, known, f"transformers:{name}")
    channels = {"num_channels": in_channels} if "num_channels" in fields else {}
    net = kind(kind.config_class(**options, num_labels=classes, **channels))
    net.register_forward_hook(_logits)  # in place of a module around it, whose name all names would begin with
    return net


def _logits(net: nn.Module, args: tuple, output: Any) -> Tensor:
    """In place of what the forward of a class of transformers returns."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        got = f"{type(output).__name__} of {type(net).__name__}"
        raise InputError(f"expected an output with logits (of a ...ForImageClassification), got {got} - at --model")
    return logits


SOURCES: dict[str, Callable[[str, int, int, dict[str, Any]], nn.Module]] = {
    "timm": _timm,
    "transformers": _transformers,
}
