"""The options of a function of the library and their help texts, read from its source: to import it would take seconds."""

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from cyclopts import Parameter
from docstring_parser import parse

import anysplade
from anysplade.model import options as model_options
from anysplade.search import fusion
from anysplade.training import config as training_options

Command = TypeVar("Command", bound=Callable[..., Any])

_TYPES = vars(model_options) | vars(training_options) | {"Fusion": fusion.Fusion}  # what annotations name


def options_of(module: str, function: str, without: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """Give a command the options of a function of the library in place of its ``**options``, and their help texts.

    Options are keyword-only parameters except ``progress``, and fields of a dataclass. What the command has or describes itself
    stays.

    Args:
        module: such as ``training.mining``.
        function: such as ``mine`` or ``Index.build``, or a dataclass such as ``StudyConfig``.
        without: what is no option of the command.
    """
    source = Path(anysplade.__file__).parent / f"{module.replace('.', '/')}.py"
    found: Any = ast.parse(source.read_text(encoding="utf-8"))
    for name in function.split("."):
        found = next(node for node in found.body if getattr(node, "name", None) == name)
    options: dict[str, Any]  # annotation and default by name
    if isinstance(found, ast.ClassDef):
        options = {
            ast.unparse(node.target): (node.annotation, node.value) for node in found.body if isinstance(node, ast.AnnAssign)
        }
    else:
        pairs = zip(found.args.kwonlyargs, found.args.kw_defaults, strict=True)
        options = {argument.arg: (argument.annotation, default) for argument, default in pairs}

    def decorate(command: Command) -> Command:
        own = inspect.signature(command).parameters
        parameters = [one for one in own.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        for name, (annotation, default) in options.items():
            if name not in {*own, *without, "progress"}:
                kind = eval(ast.unparse(annotation).replace("str | Path", "str"), _TYPES)
                value = ast.literal_eval(default)
                parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=kind))
        texts = _described(ast.get_docstring(found))
        texts |= {"out": texts.get("output")} | _described(command.__doc__)
        helped = [one.replace(annotation=Annotated[one.annotation, Parameter(help=texts.get(one.name))]) for one in parameters]
        command.__signature__ = inspect.Signature(helped)  # type: ignore[attr-defined]
        return command

    return decorate


def _described(docstring: str | None) -> dict[str, str | None]:
    """The descriptions of a docstring's arguments by name."""
    return {argument.arg_name: argument.description for argument in parse(docstring or "").params}
