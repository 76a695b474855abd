"""Files with options of ``train``, in YAML or TOML, by their names in Python."""

import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from cyclopts import CycloptsError
from cyclopts.config import Dict, Toml, Yaml

from anysplade.errors import OptionError
from anysplade.training.config import TrainingConfig


def config_file(arguments: Sequence[str]) -> list[Dict]:
    """The file that ``train --config`` names, as a source of options for the command line.

    It is found before the arguments are parsed, because parsing takes the values from it.

    Raises:
        OptionError: the file cannot be read, or has an unknown option.
    """
    named = [i for i, argument in enumerate(arguments) if argument == "--config" or argument.startswith("--config=")]
    if list(arguments[:1]) != ["train"] or not named:
        return []
    argument, following = arguments[named[-1]], arguments[named[-1] + 1 : named[-1] + 2]
    path = Path(argument.partition("=")[2] if "=" in argument else "".join(following)).expanduser()
    options = {
        "out" if name == "output" else name.replace("_", "-"): value for name, value in read_options(path, "--config").items()
    }
    return [Dict(data=options, use_commands_as_keys=False, source=str(path))]


def read_options(path: Path, flag: str, excluded: Sequence[str] = ()) -> dict[str, Any]:
    """Options of ``train`` by their names in Python.

    The library's sources read the file; the names are checked here, so that ``study --training`` takes the same files.

    Args:
        flag: that named the file, for errors.
        excluded: options that the file may not have.

    Raises:
        OptionError: the file cannot be read, or has an unknown or excluded option.
    """
    known = {field.name for field in fields(TrainingConfig)} - {"_", *excluded}
    try:
        options: Any = (Toml if path.suffix == ".toml" else Yaml)(path=path, must_exist=True).config
    except (OSError, UnicodeDecodeError, CycloptsError) as error:
        raise OptionError(f"{flag} {path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict) or not options:
        raise OptionError(f"{flag} {path}: holds no options; each line is one, such as batch_size: 32")
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = "the command itself sets it" if name in excluded else f"did you mean {near[0]}?" if near else ""
            raise OptionError(f"{flag} {path}: no option {name!r}" + (f"; {hint}" if hint else ""))
    return options
