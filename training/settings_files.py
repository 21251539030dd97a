"""Settings as people write them: files of YAML, and options of a command line whose names have a dot."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from qdeploy.errors import InputError
from qdeploy.training.config import AXES_OF_CONFIG, Config, flag, plain

_DOTTED = re.compile(rf"--({'|'.join(AXES_OF_CONFIG)})\.([A-Za-z_][\w.-]*)(?:=(.*))?", re.DOTALL)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a file of YAML, by name; not checked but for their names.

    Raises InputError where it cannot be read, is no YAML or names what is no setting.
    """
    found = {str(key).replace("-", "_"): value for key, value in read_yaml(path).items()}
    check_names(found, [setting.name for setting in fields(Config)], path)
    return found


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping in a file of YAML. Raises InputError where it cannot be read, is another or has a name twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            """Of a name that stands there twice YAML would keep the last."""
            names = [key.value for key, _ in node.value if isinstance(key.value, str)]
            if twice := [name for name in names if names.count(name) > 1]:
                raise InputError(f"expected every name once, got {twice[0]!r} twice - at {path}")
            return super().construct_mapping(node, deep)

    try:
        found = yaml.load(path.read_text(), Loader)
    except OSError as error:
        raise InputError(f"expected a file of settings, got {error.strerror or error} - at {path}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        got = " ".join(str(error).split())
        raise InputError(f"expected a file of settings in YAML, got another: {got} - at {path}") from error
    if not isinstance(found, dict):
        got = "nothing" if found is None else type(found).__name__
        raise InputError(f"expected settings by name, got {got} - at {path}")
    return found


def check_names(names: Iterable[Any], known: Sequence[str], at: object) -> None:
    """Raise InputError for one of `names` that is not `known`."""
    for name in map(str, names):
        if name not in known:
            raise InputError(f"expected one of {', '.join(known)}, got {name!r}{_meant(name, known)} - at {at}")


def written(config: Config) -> str:
    """All settings as `read_settings` reads them; without those that are not given and have no value, and without the
    updates that follow from the epochs."""
    import yaml

    values = {name: value for name, value in plain(config).items() if value is not None}
    if config.epochs is not None:
        values.pop("updates", None)
    return yaml.safe_dump(values, sort_keys=False)


def dotted(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{axis: {option: text}} from the words `--axis.option text` or `--axis.option=text` of a command line; an option
    without text is true.

    Raises InputError for a word that is none of these.
    """
    found: dict[str, dict[str, Any]] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        match = _DOTTED.fullmatch(word)
        if match is None:
            known = [flag(setting.name) for setting in fields(Config)]
            name = word.partition("=")[0]
            raise InputError(f"expected one of {', '.join(known)}, got {name}{_meant(name, known)} - at qdeploy train")
        axis, path, value = match.groups()
        if value is None:
            value = words.pop(0) if words and not re.match("--[A-Za-z]", words[0]) else True
        *outer, last = path.replace("-", "_").split(".")
        place: dict[str, Any] = found.setdefault(axis, {})
        for name in outer:
            inner = place.get(name, {})
            place[name] = inner if isinstance(inner, dict) else {"name": inner}
            place = place[name]
        if isinstance(place.get(last), dict):
            place[last]["name"] = value
        else:
            place[last] = value
    return found


def over(value: Any, lower: Any) -> Any:
    """What is given for an axis, over what a file or another option gave: a name, or {"name": ..., option: value}."""
    upper = {"name": value} if isinstance(value, str) else dict(value)
    under = {"name": lower} if isinstance(lower, str) else dict(lower or {})
    if "name" in upper and "name" in under and upper["name"] != under["name"]:
        return upper
    return {**under, **upper}


def _meant(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""
