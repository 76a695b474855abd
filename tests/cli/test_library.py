import inspect
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from anysplade import Index, Mined, StudyConfig, adapt, distil, evaluate_all, mine, score, train_head
from anysplade.cli import app, evaluation, main, search, study, training
from anysplade.search.sizing import size
from anysplade.serving.app import serve


@pytest.mark.parametrize(
    "command, function",
    [
        (training.head, train_head),
        (training.adapt, adapt),
        (training.distil, distil),
        (training.mine, mine),
        (training.score, score),
        (evaluation.evaluate, evaluate_all),
        (search.index, Index.build),
        (search.search, Index.search),
        (search.serve, serve),
        (search.size, size),
        (study.study, StudyConfig),
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
        if one.name not in ("kinds", "miner", "cache", "backbones", "collections", "training"):  # the commands have their own
            assert (options[one.name].default, get_args(options[one.name].annotation)[0]) == (one.default, plain), one.name


def test_defaults_of_the_library_are_passed_on(monkeypatch, tmp_path):
    """As if the command had them itself: its lines can show them."""
    given = {}
    monkeypatch.setattr("anysplade.training.mining.mine", lambda *_, **options: given.update(options) or Mined(1, 0, {}))
    assert main(["mine", "python-docs", "--out", str(tmp_path / "mined.jsonl")]) == 0
    expected = {name: one.default for name, one in inspect.signature(mine).parameters.items() if one.kind is one.KEYWORD_ONLY}
    assert given == {name: value for name, value in expected.items() if name not in ("max_length", "precision")} | {
        "progress": True
    }


@pytest.mark.parametrize("name", [name for name in app if not name.startswith("-")])
def test_each_option_has_a_help_text(name):
    command = app[name]
    arguments = command.assemble_argument_collection(parse_docstring=True)
    assert [argument.name for argument in arguments if argument.parse and not argument.parameter.help] in ([], ["*"])
