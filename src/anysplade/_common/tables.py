"""Results that are shown as a short table in a shell and a notebook, and convert to a pandas DataFrame."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

_MAX_CELL = 60  # characters; longer values are cut
_MAX_COLUMNS = 9  # a single row with more columns is shown as one column
_MAX_ROWS = 30  # pandas replaces the middle of longer tables by an ellipsis


class Tabular:
    """Base class of results, which are dataclasses with ``repr=False``: ``repr`` and notebooks show a short table."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return asdict(self)  # type: ignore[call-overload]

    def _rows(self) -> list[dict[str, Any]]:
        """The rows of the table; by default one, with the plain values of ``to_dict``."""
        return [{name: value for name, value in self.to_dict().items() if value is None or isinstance(value, str | int | float)}]

    def to_pandas(self) -> "DataFrame":
        """The table as a DataFrame, with all rows and complete values."""
        import pandas

        return pandas.DataFrame(self._rows())

    def _shown(self) -> "list[DataFrame]":
        """The tables of ``repr``; ``to_pandas`` returns the first."""
        return [self.to_pandas()]

    def __repr__(self) -> str:
        return "\n\n".join(_written(table, "to_string") for table in self._shown() if len(table)) or self._empty()

    def _empty(self) -> str:
        """What is shown without a row."""
        return f"{type(self).__name__}: empty"

    def _repr_html_(self) -> str:
        return "\n".join(_written(table, "to_html") for table in self._shown() if len(table)) or repr(self)


def _written(table: "DataFrame", way: str) -> str:
    """A table as text, written by the pandas method ``way``."""
    shown = table.astype(object).map(_cell)
    is_upright = len(table) == 1 and table.shape[1] > _MAX_COLUMNS
    shown = shown.T if is_upright else shown
    return str(getattr(shown, way)(index=is_upright, header=not is_upright, max_rows=_MAX_ROWS))


def _cell(value: Any) -> str:
    if value is None or value != value:  # NaN, which pandas uses for missing values
        return "–"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"  # not 1.2e+04
    text = str(value)
    return text if len(text) <= _MAX_CELL else f"{text[: _MAX_CELL - 1]}…"
