"""What anysplade raises.

AnyspladeError                 something failed; exit code 1 on the command line
├── CollapseError              a training run whose vectors became useless, and that was told to stop then
└── UsageError (ValueError)    the caller can fix it; exit code 2
    ├── ModelError             the model is missing, is no masked LM, or has no usable head
    ├── DataError              the data is missing or malformed
    ├── OptionError            an option has an impossible value
    ├── MeasureError           a measure's name is not known
    ├── ExtraError (ImportError)  a library of an extra, such as anysplade[search], is not installed
    └── OutputError            the output folder holds something else, or cannot be written

Every message is one line: where, what is wrong, and how to fix it. No message repeats a password or a token.
"""

import re

# An engine's address is anysplade's own, so that all up to its last @ is a login, whatever stands there unescaped. Of other
# URLs it is what stands before the host, which ends at the first slash unless a password follows: paths can hold an @ too.
# "user:password" is what messages write as an example.
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
    """A text, an address or a command line with "..." for every login in a URL and every token."""
    text = _LOGIN.sub(lambda found: f"{found['engine'] or found['other']}...@", text)
    return _TOKEN.sub(r"\1...", text)


class AnyspladeError(Exception):
    """Base of everything that anysplade raises by itself."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(without_credentials(arg) if isinstance(arg, str) else arg for arg in args))


def worker_died(where: object) -> AnyspladeError:
    """The error for a ``BrokenProcessPool`` whose finished work is kept."""
    return AnyspladeError(
        f"{where}: a worker process died; if it printed nothing above, most likely for want of memory: run the same again with "
        "fewer `workers`, and it continues"
    )


class UsageError(AnyspladeError, ValueError):
    """A mistake in what was asked for."""


class CollapseError(AnyspladeError):
    """A training run collapsed and was told to stop then."""


class ModelError(UsageError):
    """The model is missing, is no masked language model, or has no usable head."""


class DataError(UsageError):
    """The data is missing or malformed; the message names the file and the line."""


class OptionError(UsageError):
    """An option has an impossible value."""


class ExtraError(UsageError, ImportError):
    """A library that comes with an extra of the package is not installed."""


class MeasureError(UsageError):
    """The name of a measure is not known."""


class OutputError(UsageError):
    """The output folder holds something that this run did not make."""
