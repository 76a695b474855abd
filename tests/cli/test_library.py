import inspect
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from anysplade import Index, adapt, evaluate_all, mine, score, train_head
from anysplade.cli import app, evaluation, search, training
from anysplade.search.sizing import size
from anysplade.serving.app import serve


@pytest.mark.parametrize(
    "command, function",
    [
        (training.head, train_head),
        (training.adapt, adapt),
        (training.mine, mine),
        (training.score, score),
        (evaluation.evaluate, evaluate_all),
        (search.index, Index.build),
        (search.serve, serve),
        (search.size, size),
    ],
)
def test_options_are_those_of_the_library(command, function):
    """They are read from its source; what it would read on import is the same."""
    options, kinds = inspect.signature(command).parameters, get_type_hints(function)
    shared = [
        one for one in inspect.signature(function).parameters.values() if one.kind is one.KEYWORD_ONLY and one.name in options
    ]
    assert shared
    for one in shared:
        kind = kinds[one.name]
        plain = str if kind == str | Path else str | None if kind == str | Path | None else kind
        if one.name not in ("kinds", "miner", "cache"):  # tuples and a folder of the commands
            assert (options[one.name].default, get_args(options[one.name].annotation)[0]) == (one.default, plain), one.name


@pytest.mark.parametrize("name", [name for name in app if not name.startswith("-")])
def test_each_option_has_a_help_text(name):
    command = app[name]
    arguments = command.assemble_argument_collection(parse_docstring=True)
    assert [argument.name for argument in arguments if argument.parse and not argument.parameter.help] in ([], ["*"])
