"""A check for arguments in the wrong order, before a command runs."""

import shlex
from collections.abc import Sequence
from itertools import takewhile

from anysplade._common.files import user_path
from anysplade.data.names import DATA, INDEX, held
from anysplade.errors import OptionError

_MODEL_FIRST = ("evaluate", "index", "train", "adapt")  # commands that take models and then data


def check_order(arguments: Sequence[str]) -> None:
    """Raise OptionError with the corrected command if data come before a model, or a query before its index."""
    command, *others = arguments or [""]
    given = list(takewhile(lambda argument: not argument.startswith("-"), others))
    if command in _MODEL_FIRST and len(given) > 1:
        if held(given[-1 if command == "evaluate" else 1]) in DATA:
            return  # the data are in the right place; looking at the models too would be slow for a hub id
        kinds = [held(name) for name in given]
        # For evaluate, models and collections can be in any order if the last one is a collection.
        known = kinds[-1] is not None or kinds[0] in DATA
        wrong = known and any(kind in DATA for kind in kinds) if command == "evaluate" else kinds[0] in DATA
        meant = [name for name, _ in sorted(zip(given, kinds, strict=True), key=lambda pair: pair[1] in DATA)]
        label = ", ".join(f"{name} is {kind}" for name, kind in zip(given, kinds, strict=True) if kind)
        first = "models come first"
    elif command == "search" and len(given) == 2:
        wrong, meant = _is_index(given[1]) and not _is_index(given[0]), given[::-1]
        label, first = f"{given[1]} is {INDEX}", "the index comes first"
    else:
        return
    if wrong:
        raise OptionError(f"{label}; {first}: {shlex.join(['anysplade', command, *meant, *others[len(given) :]])}")


def _is_index(name: str) -> bool:
    return "://" in name or (user_path(name) / "index.json").is_file()
