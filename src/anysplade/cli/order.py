"""Arguments in the wrong order, one too many or one too few: what to type instead."""

import shlex
from collections.abc import Sequence
from itertools import takewhile
from typing import Literal, get_origin

from cyclopts import CoercionError, CycloptsError, MissingArgumentError, UnusedCliTokensError

from anysplade._common.arguments import nearest
from anysplade._common.files import user_path
from anysplade.data.names import DATA, INDEX, MODEL, held
from anysplade.errors import OptionError
from anysplade.model.options import checked_option

_MODEL_FIRST = ("evaluate", "index", "train", "adapt", "distil")  # commands that take models and then data


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
    elif command == "search" and len(given) > 2:
        wrong, meant = True, [given[0], " ".join(given[1:])]
        label, first = "the query is more than one argument", "put it in quotation marks"
    elif command == "encode" and len(given) > 1:
        wrong = (" " in given[0] or given[0].isalpha()) and held(given[-1]) == MODEL != held(given[0])
        meant = [given[-1], *given[:-1]]
        label, first = f"{given[-1]} is {MODEL}", "the model comes first"
    elif command == "search" and len(given) == 2:
        wrong, meant = _is_index(given[1]) and not _is_index(given[0]), given[::-1]
        label, first = f"{given[1]} is {INDEX}", "the index comes first"
    else:
        return
    if wrong:
        raise OptionError(f"{label}; {first}: {shlex.join(['anysplade', command, *meant, *others[len(given) :]])}")


def in_own_words(error: CycloptsError, arguments: Sequence[str]) -> Exception:
    """The message for arguments that cannot be parsed: what is wrong, and what to type."""
    command, argument = " ".join(error.command_chain or ()), error.argument
    more = f"see anysplade {command} --help"
    if isinstance(error, UnusedCliTokensError):
        unused = shlex.join(error.unused_tokens or ())
        return OptionError(f"{unused}: more than {command} takes; put what has spaces in quotation marks, or {more}")
    if isinstance(error, MissingArgumentError) and argument is not None:
        name = error.keyword or (argument.name if argument.index is None else argument.name.lstrip("-").upper())
        if any(given.partition("=")[0] in (name, *argument.names) for given in arguments):
            return OptionError(f"{name}: give a value after it; {more}")
        options = [given.partition("=")[0] for given in error.unused_tokens or () if given.startswith("--")]
        if close := next((option for option in options if nearest(option, argument.names, cutoff=0.6)), None):
            return OptionError(f"{close}: no such option of {command}; did you mean {name}?")
        runs = list(takewhile(lambda given: not given.startswith("-"), arguments[1:]))
        hint = f"write {name} {shlex.quote(runs[-1])}" if name == "--collection" and len(runs) > 2 else more
        return OptionError(f"{command} needs {name}; {hint}")
    is_choice = isinstance(error, CoercionError) and get_origin(error.target_type) is Literal  # its message is good
    if isinstance(error, CoercionError) and not (is_choice or error.msg) and error.token is not None and argument is not None:
        name = error.token.keyword or argument.name
        try:
            checked_option(name, error.token.value, argument.hint)
        except OptionError as wrong:
            return wrong
    return error


def _is_index(name: str) -> bool:
    return "://" in name or (user_path(name) / "index.json").is_file()
