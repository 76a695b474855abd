"""Filters by metadata: one rule of equality for every engine, and the reason why a filter matched nothing."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from anysplade.errors import OptionError

Filter = Mapping[str, Any]  # the metadata that a document must have: a value by name, or a list for any of several values
_Value = str | int | float | bool
_SHOWN_NAMES = 20  # names listed in a message


class Tags(NamedTuple):
    """Metadata as engines store and compare it; see ``tag``."""

    names: list[str]  # "lang", "author.name"
    values: list[str]  # "lang=en", "author.name=anna"


def tag(metadata: Mapping[str, Any] | None) -> Tags:
    """The names and values of a document's metadata as texts.

    Values are equal if their texts are, apart from case and surrounding blanks: ``true`` and ``"True"``, 7 and ``"7"``; 7.0 also
    equals ``"7"``. Names are compared in the same way. A list stands for each of its items. A value inside an object has the
    object's name in front of its own: ``author.name``.
    """
    names, values = dict[str, None](), dict[str, None]()  # ordered sets

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for inner, item in value.items():
                add(f"{name}.{inner}", item)
        elif isinstance(value, list | tuple):
            for item in value:
                add(name, item)
        elif value is not None:
            (plain,) = _texts(name)
            names[plain] = None
            values.update({f"{plain}={text}": None for text in _texts(value)})

    for name, value in (metadata or {}).items():
        add(name, value)
    return Tags(list(names), list(values))


def _texts(value: _Value) -> list[str]:
    """The texts that equal a value."""
    texts = [str(int(value))] if isinstance(value, float) and value.is_integer() else []
    plain = unicodedata.normalize("NFC", str(value).strip().casefold())
    return [*texts, plain.encode("utf-8", "backslashreplace").decode()]  # engines refuse lone surrogates


def check_filter(filter: Filter | None) -> list[Tags]:
    """The conditions of a filter: a document must have the name and one of the values of each."""
    if filter is not None and not isinstance(filter, Mapping):
        raise OptionError(f'filter is a {type(filter).__name__}; give {{"name": value}}, such as {{"lang": "en"}}')
    conditions = []
    for name, value in (filter or {}).items():
        values = list(value) if isinstance(value, list | tuple) else [value]
        if name == "" or not values or not all(isinstance(value, _Value) for value in values):
            raise OptionError(
                f'filter {str(name)[:80]!r}: {str(values)[:80]}; give {{"name": value}} or a list of values, '
                "each a text, a number or a bool"
            )
        conditions.append(tag({name: values}))
    return conditions


class Tagged(Protocol):
    """An index whose documents have tags."""

    def has(self, kind: Literal["names", "values"], *conditions: Sequence[str]) -> bool:
        """Whether some document has at least one of the tags of each condition."""

    def names(self, limit: int) -> list[str]:
        """The names in the metadata of the documents, the most frequent first."""


def explain_filter(index: Tagged, filter: Filter | None) -> str | None:
    """Why a search with a filter found nothing; None without a filter. A name that no document has is an OptionError."""
    conditions = check_filter(filter)
    for names, values in conditions:
        if not index.has("names", names):
            known = ", ".join(index.names(_SHOWN_NAMES))
            raise OptionError(
                f'filter {names[0][:80]!r}: no document has this name in its "metadata"; '
                + (f"names there: {known}" if known else "none has any; build the index from lines with a metadata object")
            )
        if not index.has("values", values):
            return f"no document has {' or '.join(values)[:200]}"
    if not conditions:
        return None
    wanted = " and ".join(" or ".join(values) for _, values in conditions)[:200]
    if not index.has("values", *(values for _, values in conditions)):
        return f"no document has {wanted} together"
    return f"no document with {wanted} shares a term with the query"
