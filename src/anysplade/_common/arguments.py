"""What the mistakes in an argument have in common: a value of another kind, and a name that is nearly right."""

import difflib
from collections.abc import Iterable

from anysplade.errors import OptionError


def require(name: str, value: object, kinds: type | tuple[type, ...], fix: str) -> None:
    """Raise OptionError unless an argument is of one of these kinds."""
    if not isinstance(value, kinds):
        raise OptionError(f"`{name}` is a {type(value).__name__}; {fix}")


def nearest(word: str, known: Iterable[str], cutoff: float = 0.8) -> str | None:
    """The known name that a word is most like, in any case; None if none is really near."""
    names = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), names, n=1, cutoff=cutoff)
    return names[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.8) -> str:
    """The end of a message, with the name that is near; empty if none is."""
    near = nearest(word, known, cutoff)
    return "" if near is None else f"; did you mean {near}?"
