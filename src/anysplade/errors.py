"""The exceptions of anysplade.

AnyspladeError                 something failed; exit code 1 on the command line
├── CollapseError              a training run collapsed, and was set to stop in that case
└── UsageError (ValueError)    the caller can fix it; exit code 2
    ├── ModelError             the model is missing, is not a masked LM, or has no usable head
    ├── DataError              a file, line or column of the data is missing or malformed
    ├── OptionError            an option has an invalid value
    ├── MeasureError           a measure is unknown
    ├── ExtraError (ImportError)  a library of an extra, such as anysplade[search], is not installed
    └── OutputError            the output cannot be written, or its folder already has other contents

Every message is one line: the place, the error and the fix. Messages never contain a password or a token.
"""

import re

# In an engine's address everything up to the last @ is the login, even if it is not percent-encoded. In other URLs a path can
# contain an @, so the login ends at the first slash, unless a password follows. "user:password" is the example in our messages.
_LOGIN = re.compile(
    r"""(?ix) \b (?: (?P<engine> (?:opensearch|qdrant)s? :/+ ) (?! /* user:password@ )
                      (?: \S* | [^\s/:]* : (?!\d+/) (?: (?!://) [^@\n] )* ) @
                  | (?P<other> [a-z][a-z\d+.-]+ :/+ ) (?! /* user:password@ ) (?: [^\s/]* | [^\s/:]* : (?!\d+/) \S* ) @ )"""
)
_TOKEN = re.compile(
    r"""(?x) ( --(?:token|api-key|password) (?:=|\s+) | \b[A-Z_]*(?:TOKEN|API_KEY|SECRET|PASSWORD)=
             | [?&][\w-]*(?i:token|key|secret|password|signature)= ) (?: '[^']*' | "[^"]*" | [^\s'"&] )+"""
)


def without_credentials(text: str) -> str:
    """Replace every login in a URL and every token of a text by "..."."""
    text = _LOGIN.sub(lambda match: f"{match['engine'] or match['other']}...@", text)
    return _TOKEN.sub(r"\1...", text)


class AnyspladeError(Exception):
    """Base class of all exceptions of anysplade; credentials are removed from its message."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(without_credentials(arg) if isinstance(arg, str) else arg for arg in args))


def worker_died(place: object) -> AnyspladeError:
    """The error for a ``BrokenProcessPool`` if finished work is kept."""
    return AnyspladeError(
        f"{place}: a worker process died, most likely out of memory if it printed no error above; run the same again with "
        "fewer `workers`, and it continues"
    )


class UsageError(AnyspladeError, ValueError):
    """Base class of the errors that the caller can fix."""


class CollapseError(AnyspladeError):
    """A training run collapsed: its vectors became useless, and it was set to stop in that case."""


class ModelError(UsageError):
    """The model is missing, is not a masked language model, or has no usable head."""


class DataError(UsageError):
    """The data is missing or malformed; the message names the file and the line."""


class OptionError(UsageError):
    """An option has an invalid value."""


class ExtraError(UsageError, ImportError):
    """A library that comes with an extra of the package is not installed."""


class MeasureError(UsageError):
    """The name of a measure is unknown."""


class OutputError(UsageError):
    """The output cannot be written, or its folder already has other contents."""
