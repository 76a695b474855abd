"""YAML or TOML files with options of ``train`` by their names in Python."""

import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from cyclopts import CycloptsError, convert
from cyclopts.config import Dict

from anysplade._common.arguments import did_you_mean
from anysplade._common.files import user_path
from anysplade.errors import OptionError
from anysplade.model.options import checked_option
from anysplade.training.config import TrainingConfig

_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")}


def as_typed(kind: Any, tokens: Sequence[Any]) -> Any:
    """Convert texts of the command line or a file to a type; unlike in cyclopts itself, a fraction is not rounded to an integer."""
    for token in tokens if int in (kind, *get_args(kind)) else ():
        text = str(getattr(token, "value", token))
        if "." in text and not float(text).is_integer():
            raise ValueError(f"{text} is no whole number")
    return convert(kind, tokens)


def config_file(arguments: Sequence[str]) -> list[Dict]:
    """The file given to ``train --config``, as a source of options for the command line.

    It is read before the arguments are parsed, because parsing uses its values.
    """
    named = [i for i, argument in enumerate(arguments) if argument == "--config" or argument.startswith("--config=")]
    if list(arguments[:1]) != ["train"] or not named:
        return []
    argument, following = arguments[named[-1]], arguments[named[-1] + 1 : named[-1] + 2]
    if argument == "--config" and not following:
        raise OptionError("--config: give a YAML or TOML file after it")
    path = user_path(argument.partition("=")[2] if "=" in argument else "".join(following))
    given = read_options(path, "--config")
    options = {"out" if name == "output" else name.replace("_", "-"): value for name, value in given.items()}
    return [Dict(data=options, use_commands_as_keys=False, source=str(path))]


def read_options(path: Path, flag: str, excluded: Sequence[str] = ()) -> dict[str, Any]:
    """Read options of ``train`` by their names in Python, each converted to its type; ``flag`` names the file in messages.

    A value means the same as on the command line: YAML's own rules would read 010 as 8 and yes as True.
    """
    kinds = get_type_hints(TrainingConfig)
    known = {field.name for field in fields(TrainingConfig)} - {"_", *excluded}
    try:
        text = path.read_bytes().decode("utf-8-sig")
        options = list(tomllib.loads(text).items()) if path.suffix == ".toml" else _yaml_options(text)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise OptionError(
            f"{flag} {path}{line}: {error.problem or error.context}; put a text in quotes if it has a colon, a # or a sign first"
        ) from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise OptionError(f"{flag} {path}: cannot be read: {' '.join(str(error).split())}") from error
    if not options:
        raise OptionError(f"{flag} {path}: contains no options; each line is one, such as batch_size: 32")
    found: dict[str, Any] = {}
    for name, value in options:
        if name not in known:
            hint = "; the command itself sets it" if name in excluded else did_you_mean(str(name), known, cutoff=0.6)
            raise OptionError(f"{flag} {path}: no option {name!r}{hint}")
        if name in found:
            raise OptionError(f"{flag} {path}: {name} is given twice; remove one")
        try:
            found[name] = _typed(name, value, kinds[name])
        except OptionError as error:
            raise OptionError(f"{flag} {path}: {error}") from error
    return found


def _yaml_options(text: str) -> list[tuple[str, Any]]:
    """Names and values in a YAML file, with repeated names; empty if it is not a mapping."""

    def value_of(node: Any) -> Any:
        if node.tag not in _PLAIN:
            raise yaml.constructor.ConstructorError(None, None, f"the tag {node.tag} has no meaning here", node.start_mark)
        if isinstance(node, yaml.SequenceNode):
            return [value_of(item) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            return {value_of(key): value_of(value) for key, value in node.value}
        return None if node.tag.endswith(":null") else node.value

    root = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return []
    return [(str(value_of(key)), value_of(value)) for key, value in root.value]


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Convert a value of a file to the type of its option."""
    if isinstance(value, list) and get_origin(kind) is tuple and all(isinstance(item, str) for item in value):
        return tuple(value)
    if value is None or isinstance(value, dict | list):
        return checked_option(name, value, kind)
    text = str(value).lower() if isinstance(value, bool) else str(value)
    try:
        return as_typed(kind, [text])
    except (CycloptsError, ValueError):
        return checked_option(name, text, kind)  # raises an error that says which values are allowed
