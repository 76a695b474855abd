"""The options and help texts of a function of the library, read from its source: to import it would take seconds."""

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from cyclopts import Parameter
from docstring_parser import parse

import anysplade
from anysplade.model import options as model_options
from anysplade.training import config as training_options

Command = TypeVar("Command", bound=Callable[..., Any])

_TYPES = vars(model_options) | vars(training_options)  # what annotations name


def options_of(module: str, function: str, without: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """Give a command the keyword-only parameters of a function of the library, in place of its ``**options``, and its help texts.

    What the command's own docstring describes keeps that description. ``progress`` is no option.

    Args:
        module: such as ``training.mining``.
        function: such as ``mine`` or ``Index.build``.
        without: parameters that are no options of the command.
    """
    source = Path(anysplade.__file__).parent / f"{module.replace('.', '/')}.py"
    found: Any = ast.parse(source.read_text(encoding="utf-8"))
    for name in function.split("."):
        found = next(node for node in found.body if getattr(node, "name", None) == name)

    def decorate(command: Command) -> Command:
        own = inspect.signature(command).parameters
        parameters = [one for one in own.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        for option, default in zip(found.args.kwonlyargs, found.args.kw_defaults, strict=True):
            if option.arg in own or option.arg in ("progress", *without):
                continue
            kind = eval(ast.unparse(option.annotation).replace("str | Path", "str"), _TYPES)
            value = ast.literal_eval(default)
            parameters.append(inspect.Parameter(option.arg, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=kind))
        texts = _described(ast.get_docstring(found))
        texts |= {"out": texts.get("output")} | _described(command.__doc__)
        helped = [one.replace(annotation=Annotated[one.annotation, Parameter(help=texts.get(one.name))]) for one in parameters]
        command.__signature__ = inspect.Signature(helped)  # type: ignore[attr-defined]
        return command

    return decorate


def _described(docstring: str | None) -> dict[str, str | None]:
    """The descriptions of a docstring's arguments by name."""
    return {argument.arg_name: argument.description for argument in parse(docstring or "").params}
