"""The frame of all commands: how they print results, errors and logs.

Results go to standard output, progress and logs to standard error. The exit code is 0 on success, 2 on a mistake by the
user (one line with the cause and the fix), and 1 on a failure.
"""

import contextlib
import functools
import inspect
import io
import json as jsonlib
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console, RenderableType

from anysplade import __version__
from anysplade._common.cache import LIMIT, prune_cache, release, size_limit
from anysplade._common.extras import missing_library
from anysplade._common.files import READ_ONLY
from anysplade.cli.config import as_typed, config_file
from anysplade.cli.order import check_order, in_own_words
from anysplade.data.names import misnamed
from anysplade.data.text import is_utf8
from anysplade.errors import AnyspladeError, DataError, OptionError, OutputError, UsageError, without_credentials

app = App(
    name="anysplade",
    help="Train a SPLADE sparse retriever on any masked language model.",
    version=__version__,
    result_action="return_value",
    default_parameter=Parameter(converter=as_typed, negative_iterable="", consume_multiple=True),
    suppress_keyboard_interrupt=False,  # ``main`` says that the work can be continued
)

logger = logging.getLogger(__name__)

_UNLIMITED = 10**5  # characters; no line is that long

_Json = Annotated[bool, Parameter(negative="", help="One JSON document on standard output instead of text.")]


class Result(NamedTuple):
    """A command's result: as JSON data, and as parts to print for a person."""

    data: dict[str, Any]
    text: list[RenderableType]


def command(function: Callable[..., Result]) -> Callable[..., None]:
    """Register a command, with the option --json. What libraries print goes to standard error."""

    @functools.wraps(function)
    def run(*args: Any, json: bool = False, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        with contextlib.redirect_stdout(sys.stderr):
            _check_inputs(given.arguments)
            _quiet_libraries()
            limit = size_limit()  # before the work, as it may be malformed
            result = function(*given.args, **given.kwargs)
            if limit is not None and is_first_process():
                _limit_cache(limit)
        if not is_first_process():
            return
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # for lone surrogates, and characters that the encoding lacks
        if json:
            escape = sys.stdout.encoding not in (None, "utf-8", "UTF-8")  # of a lone surrogate, backslashreplace writes JSON
            _print(jsonlib.dumps(result.data, indent=2, ensure_ascii=escape) + "\n")
        else:
            width = None if sys.stdout.isatty() else _UNLIMITED  # outside a terminal, a table is as wide as it needs to be
            console = Console(width=width, soft_wrap=True, markup=False, emoji=False)  # names can contain brackets and colons
            with console.capture() as captured:
                for part in result.text:
                    console.print(part)
            _print(captured.get())

    signature = inspect.signature(function)
    option = inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Json)
    parameters = [*signature.parameters.values(), option]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(run)
    return run


def _limit_cache(limit: int) -> None:
    """Remove what was used least recently from the cache, after a command, and log it."""
    release()
    try:
        removed = prune_cache(limit)
    except (OutputError, RuntimeError, OSError) as error:  # the result of the command matters more
        logger.warning("the cache was not brought below %s: %s", LIMIT, error)
    else:
        if removed:
            logger.info("removed %.1f MB from the cache, above %s", sum(entry.bytes for entry in removed) / 1e6, LIMIT)


# Arguments that name a model or data, in commands and in the options of ``train``.
_INPUTS = {"model", "encoder", "teacher", "miner", "backbone", "names", "runs"}
_INPUTS |= {"corpus", "collection", "data", "dev", "judged", "queries", "text", "texts"}


def _check_inputs(arguments: dict[str, Any]) -> None:
    """Raise DataError for a name that stands for nothing, before the libraries that would look for it are imported."""
    given = arguments | vars(arguments["options"]) if "options" in arguments else arguments
    for option in _INPUTS & given.keys():
        for name in given[option] if isinstance(given[option], tuple) else (given[option],):
            if wrong := misnamed(name or ""):
                raise DataError(f"{name}: {wrong}")


def _print(text: str) -> None:
    """Write to standard output. If its reader is gone (``| head -1``), exit like a process that SIGPIPE ends."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except (OSError, KeyboardInterrupt) as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python writes the rest on exit
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)
        raise


def is_first_process() -> bool:
    """Whether this process prints and shows progress; only the first of those that torchrun started does."""
    return os.environ.get("RANK", "0") == "0"


_ARGUMENTS = {"backbone", "collection", "data", "index", "query", "repo_id", "runs"}  # positional, so they have no flag


def _as_typed(text: str) -> str:
    """A message of the library without credentials, and with options as they are typed: --top-k 5 for `top_k=5`."""

    def typed(option: re.Match[str]) -> str:
        name, value = option.groups()
        flag = name.upper() if name in _ARGUMENTS else "--out" if name == "output" else f"--{name.replace('_', '-')}"
        return flag if value is None else f"{flag} {value}"

    return without_credentials(re.sub(r"`([a-z][a-z_]*)(?:=([^`]*))?`", typed, text))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _as_typed(super().format(record))


def _quiet_libraries() -> None:
    """Keep standard error for anysplade's progress and for warnings that need action; ``anysplade.cli`` does a part of this."""
    warnings.simplefilter("ignore", FutureWarning)  # addressed to libraries; users can do nothing about them
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("anysplade").setLevel(logging.INFO if is_first_process() else logging.ERROR)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Formatter("%(message)s"))
    for library in ("sentence_transformers", "huggingface_hub", "httpx", "httpx2", "opensearch", "urllib3"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        import transformers

        transformers.utils.logging.disable_progress_bar()
    if "datasets" in sys.modules:
        import datasets

        datasets.disable_progress_bars()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        odd = next((f"argument {i}" for i, argument in enumerate(arguments, 1) if not is_utf8(argument)), None)
        if odd and (encoding := sys.getfilesystemencoding()) != "utf-8":
            raise OptionError(f"{odd}: not text in this system's encoding, {encoding}; set PYTHONUTF8=1 if it is UTF-8")
        if odd:
            print(f"{odd}: not UTF-8; characters that cannot be decoded are read as U+FFFD", file=sys.stderr)
        app.config = config_file(arguments)
        check_order(arguments)
        try:
            app(arguments, exit_on_error=False, print_error=False)
        except ModuleNotFoundError as error:
            raise missing_library(error) from error
    except CycloptsError as error:
        _report(in_own_words(error, arguments))
        return 2
    except UsageError as error:
        _report(error)
        return 2
    except (AnyspladeError, OSError, MemoryError) as error:
        _report(error)
        return 1
    except KeyboardInterrupt:
        print("anysplade: interrupted; run the same command again to continue where possible", file=sys.stderr)
        return 130
    return 0


def run() -> None:
    """Entry point of the ``anysplade`` command."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed; a file that is opened later would get its number and receive the output
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for the whole process
    sys.exit(main())


def _report(error: BaseException) -> None:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        allow = "; allow it, or name another place" if error.errno in READ_ONLY else ""
        text = f"{error.filename}: {error.strerror}{allow}"
    print(f"anysplade: {_as_typed(text)}", file=sys.stderr)
