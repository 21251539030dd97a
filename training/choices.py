"""What stands on an axis of a run: a class by name or by place, and the options that its constructor takes.

The options of a class are its keyword parameters: their names, annotations and defaults say what a user may give.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from qdeploy.errors import InputError, QdeployError, one_line
from qdeploy.training.methods import AXES, BASES

# What a run gives a constructor that has parameters of these names, ...
OF_THE_RUN = frozenset({"params", "net", "backward", "progress", "start", "updates", "every", "seed"})
# ... and the settings of `Config` that several choices share.
INNER = "inner"  # the option that is a choice of the same axis
SHARED = frozenset({"lr", "weight_decay", "bits", "activation_bits", "lr_step_size"})


@dataclass(frozen=True)
class Choice:
    """A name of the axis, or the place `package.module:Class`, and options for the constructor; "" stands for the name
    that the method has."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Any, axis: str) -> Choice:
        """From a name, or from {"name": ..., option: value}. Raises InputError for anything else."""
        if isinstance(given, Choice):
            return given
        if isinstance(given, str):
            return cls(given)
        if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
            raise InputError(f"expected a name, or a name and options, got {given!r} - at {axis}")
        options = {key.replace("-", "_"): value for key, value in given.items() if key != "name"}
        return cls(str(given.get("name", "")), options)

    def over(self, lower: Choice) -> Choice:
        """With the options of `lower` where it is the same class."""
        if self.name in ("", lower.name):
            return Choice(lower.name, {**lower.options, **self.options})
        return self

    def plain(self) -> dict[str, Any]:
        """As `of` reads it."""
        return {"name": self.name, **self.options}

    def __str__(self) -> str:
        return self.name + "".join(f" {key}={value!r}" for key, value in self.options.items())


def loaded(place: str, at: str) -> Any:
    """The object at `package.module:name`. Raises InputError where there is none."""
    module, _, name = place.partition(":")
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise InputError(f"expected a class at {place}, got {error} - at {at}") from error
    return found


def class_of(choice: Choice, axis: str) -> Any:
    """The class of a choice. Raises InputError for a name that the axis does not have."""
    names = AXES[axis]
    place = names.get(choice.name, choice.name)
    if ":" not in place:
        known = f"{', '.join(names)} or package.module:Class"
        raise InputError(f"expected one of {known}, got {choice.name!r} - at --{axis}")
    found = loaded(place, f"--{axis}")
    base = loaded(BASES[axis], f"--{axis}")
    if not isinstance(found, type) or base not in found.__mro__:  # protocols do not take issubclass
        module = BASES[axis].partition(":")[0]
        got = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
        raise InputError(f"expected a class that inherits from {base.__name__} ({module}), got {got} - at --{axis}")
    return found


def parameters_of(choice: Choice, axis: str) -> dict[str, inspect.Parameter]:
    """What the constructor takes by keyword, with resolved annotations."""
    made = class_of(choice, axis)
    try:
        found = inspect.signature(made, eval_str=True).parameters
    except (NameError, ValueError):  # annotations that only a type checker can read, or a class without signature
        found = inspect.signature(made).parameters
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: one for name, one in found.items() if one.kind in kinds}


def options_of(choice: Choice, axis: str) -> dict[str, inspect.Parameter]:
    """Those parameters that a user may give."""
    found = parameters_of(choice, axis)
    return {name: one for name, one in found.items() if name not in OF_THE_RUN | SHARED}


def filled(choice: Choice, axis: str) -> Choice:
    """With all options of the class: those given, converted to their types, and the defaults of the others.

    Raises InputError for an unknown option, with the known ones, for a value of another type and for one that lacks.
    """
    known = options_of(choice, axis)
    for name in choice.options:
        if name not in known:
            has = ", ".join(known) or "none"
            setting = f" (a setting of the run: --{name.replace('_', '-')})" if name in SHARED else ""
            expected = f"an option of {choice.name}: {has}"
            raise InputError(f"expected {expected}, got {name!r}{setting} - at --{axis}")
    options = {}
    for name, parameter in known.items():
        at = f"--{axis}.{name.replace('_', '-')}"
        if name == INNER:
            options[name] = filled(Choice.of(choice.options.get(name) or {}, at).over(Choice("erm")), axis).plain()
        elif name in choice.options:
            options[name] = converted(choice.options[name], parameter.annotation, at)
        elif parameter.default is inspect.Parameter.empty:
            raise InputError(f"expected a value, which {choice.name} needs, got none - at {at}")
        else:
            options[name] = _listed(parameter.default)
    return Choice(choice.name, options)


def make(choice: Choice, axis: str, given: Mapping[str, Any]) -> Any:
    """An object of the class with the options of the choice, and with those of `given` that its constructor takes."""
    takes = parameters_of(choice, axis)
    of_run = {name: value for name, value in given.items() if name in takes and value is not None}
    options = dict(choice.options)
    if INNER in options:
        options[INNER] = make(Choice.of(options[INNER], axis), axis, given)
    try:
        return class_of(choice, axis)(**of_run, **options)
    except QdeployError:
        raise
    except (TypeError, ValueError) as error:  # torch's optimizers say so
        got = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"expected options that {choice.name} takes, got {got} - at --{axis}") from error


WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}


def converted(value: Any, kind: Any, at: str) -> Any:
    """`value` as `kind`, a type annotation; text, as a command line gives it, is read as YAML where it is no value.

    Raises InputError where it is none of that kind.
    """
    if kind is inspect.Parameter.empty or kind is Any:
        return _read(value)
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

    try:
        try:
            adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
        except PydanticUserError:  # of a dataclass, say, which has a configuration of its own
            adapter = TypeAdapter(kind)
        exact = isinstance(value, (bool, int, float)) or None  # true is no 1
        try:
            return _listed(adapter.validate_python(value, strict=exact))
        except ValidationError:
            return _listed(adapter.validate_python(_read(value), strict=exact))
    except ValidationError:
        raise InputError(f"expected {_words(kind)}, got {value!r} - at {at}") from None


def _read(value: Any) -> Any:
    """A value from its text."""
    if not isinstance(value, str):
        return value
    import yaml

    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _listed(value: Any) -> Any:
    """Tuples as lists: files of settings know no others."""
    return [*value] if isinstance(value, tuple) else value


def _words(kind: Any) -> str:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_words(one) for one in typing.get_args(kind))
    if kind in WORDS:
        return WORDS[kind]
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "{name: value}" if not arguments else f"{{name: {_words(arguments[1])}}}"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return "[value, ...]"
    return getattr(kind, "__name__", str(kind))
