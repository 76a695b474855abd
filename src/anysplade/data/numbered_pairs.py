"""Training examples as numbers of texts, for data that have ids: 4 bytes per text instead of the text."""

from collections.abc import Iterator, Mapping, Sequence
from json.encoder import encode_basestring_ascii
from typing import Any

import numpy as np

from anysplade.data.collections import Pair
from anysplade.data.lookup import Lookup
from anysplade.data.mapped_texts import MappedTexts, TextsById
from anysplade.data.pair_rows import Columns, recognized, select_passages


class NumberedPairs(Sequence[Pair]):
    """Examples without scores, (examples, 2 + negatives): the number of the query, of the positive and of each negative."""

    def __init__(self, numbers: np.ndarray, queries: MappedTexts, documents: MappedTexts) -> None:
        self.numbers, self.queries, self.documents = numbers, queries, documents

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return NumberedPairs(self.numbers[i], self.queries, self.documents)
        number = range(len(self))[i]
        return next(iter(self[number : number + 1]))

    def __iter__(self) -> Iterator[Pair]:
        queries, positives, *negatives = self.texts()
        several = zip(*negatives, strict=True) if negatives else ((),) * len(queries)
        return (Pair(query, positive, own) for query, positive, own in zip(queries, positives, several, strict=True))

    def texts(self) -> list[list[str]]:
        """The texts by column: queries, positives, first negatives, ..."""
        columns = self.numbers.T
        return [self.queries.many(columns[0]), *(self.documents.many(column) for column in columns[1:])]

    def lines(self) -> str:
        """Each example as the line of JSON that ``json.dumps`` writes for the ``Pair``, for its hash."""
        columns = [list(map(encode_basestring_ascii, texts)) for texts in self.texts()]
        form = f"[%s, %s, [{', '.join(['%s'] * (len(columns) - 2))}], null]\n"
        return "".join([form % row for row in zip(*columns, strict=True)])


class IdColumns:
    """Reads many rows at once that have one id of a query, one of a positive and at most one in each column of negatives."""

    def __init__(self, names: list[str], used: list[str], texts: tuple[TextsById, TextsById]) -> None:
        self._names, self._used, self._texts = set(names), used, texts

    @classmethod
    def of(cls, row: Mapping[str, Any], columns: Columns, lookup: Lookup, limit: int | None) -> "IdColumns | None":
        """The reader for rows such as the first one; None if they have other columns, lists, or texts that are not mapped."""
        roles = [role for role in ("query id", "positive id", "negative id") if role in columns]
        names = [name for role in roles for name in columns[role]]
        most = len(names) - 2
        plain = all(_is_id(row[name]) for name in names) and recognized(row) == set(names)
        if columns.keys() != set(roles) or len(roles) < 2 or not plain or lookup.mapped is None or (limit or 0) > most:
            return None
        return cls(names, names[: 2 + (most if limit is None else limit)], lookup.mapped)

    def read(self, rows: Sequence[Mapping[str, Any]]) -> NumberedPairs | None:
        """The examples of rows; None if a row has another form or an unknown id, or an id has no text."""
        names, before = self._names, None
        for row in rows:
            if (keys := tuple(row)) != before:
                given = select_passages({name: value for name, value in row.items() if value is not None})
                if recognized(given) != names:
                    return None
                before = keys
        found: dict[str, np.ndarray] = {}
        for name in self._names:
            values = [row[name] for row in rows]
            if not all(map(_is_id, values)):
                return None
            queries, documents = self._texts
            found[name] = (queries if name == self._used[0] else documents).numbers(list(map(str, values)))
            if (found[name] < 0).any():
                return None
        most = max(len(one.texts) for one in self._texts)
        numbers = np.stack([found[name] for name in self._used], axis=1).astype(np.int32 if most < 2**31 else np.int64)
        return NumberedPairs(numbers, self._texts[0].texts, self._texts[1].texts)


def _is_id(value: Any) -> bool:
    return type(value) in (str, int)
