"""Checks of arguments, and suggestions for names that are misspelled."""

import contextlib
import difflib
from collections.abc import Iterable
from pathlib import Path

from anysplade._common.files import user_path
from anysplade.errors import OptionError


def require(name: str, value: object, kinds: type | tuple[type, ...], fix: str) -> None:
    """Raise OptionError if the argument called ``name`` has none of these types."""
    if not isinstance(value, kinds):
        raise OptionError(f"`{name}` is a {type(value).__name__}; {fix}")


def require_list(name: str, texts: object, one: str) -> list[str]:
    """The texts of the argument called ``name`` as a list; OptionError for anything else. ``one`` names an item, such as "id"."""
    if isinstance(texts, str | bytes):
        raise OptionError(f"`{name}` is one {type(texts).__name__}, so each letter would be a {one}; give a list: [{one}]")
    require(name, texts, Iterable, f"give a list: [{one}]")
    listed = list(texts)  # type: ignore[call-overload]
    for number, text in enumerate(listed, 1):
        if not isinstance(text, str):
            raise OptionError(f"`{name}`: item {number} is a {type(text).__name__}; each must be a str")
    return listed


def nearest(word: str, known: Iterable[str], cutoff: float = 0.8) -> str | None:
    """The known name that is most similar to a word, ignoring case; None if none is similar enough."""
    names = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), names, n=1, cutoff=cutoff)
    return names[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.8) -> str:
    """The end of an error message that suggests the nearest known name; empty if there is none."""
    found = nearest(word, known, cutoff)
    return "" if found is None else f"; did you mean {found}?"


def near(name: str | Path, *known: str) -> str:
    """The end of an error message that suggests a known name or an existing path; empty if none is similar enough."""
    text = str(name)
    path = user_path(text)
    if not text or path.exists():
        return ""
    if hint := did_you_mean(text.rstrip("/"), (other for other in known if other != text)):
        return hint
    with contextlib.suppress(OSError, StopIteration):
        folder = next(parent for parent in path.parents if parent.is_dir())
        missing, *rest = path.relative_to(folder).parts
        found = nearest(missing, [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")])
        if found is not None:
            whole = (folder / found).joinpath(*rest)
            return f"; did you mean {whole if whole.exists() else folder / found}?"
    return ""
