"""Results that show themselves as a short table: in a shell, in a notebook, and as a pandas DataFrame."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

_CELL = 60  # characters of a value that are shown
_COLUMNS = 9  # a single row with more of them is shown as a column
_ROWS = 30  # shown; pandas puts an ellipsis in the middle of more


class Tabular:
    """Base of results: ``repr`` is a short table, and so is what a notebook shows.

    A dataclass that inherits it is declared with ``repr=False``.
    """

    def _rows(self) -> list[dict[str, Any]]:
        """The rows of the table: one, of the plain values of ``to_dict``, unless the result has its own."""
        values: dict[str, Any] = self.to_dict()  # type: ignore[attr-defined]
        return [{name: value for name, value in values.items() if value is None or isinstance(value, str | int | float)}]

    def to_pandas(self) -> "DataFrame":
        """The table as a DataFrame, with all rows and whole values."""
        import pandas

        return pandas.DataFrame(self._rows())

    def _shown(self) -> "list[DataFrame]":
        """The tables of ``repr``, of which ``to_pandas`` gives the first."""
        return [self.to_pandas()]

    def __repr__(self) -> str:
        return "\n\n".join(_written(table, "to_string") for table in self._shown() if len(table)) or f"{type(self).__name__}: empty"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return "\n".join(_written(table, "to_html") for table in self._shown() if len(table)) or repr(self)


def _written(table: "DataFrame", way: str) -> str:
    """A table as text, by one of pandas' methods; a single row of many columns is shown as a column."""
    shown = table.astype(object).map(_cell)
    is_upright = len(table) == 1 and table.shape[1] > _COLUMNS
    shown = shown.T if is_upright else shown
    return str(getattr(shown, way)(index=is_upright, header=not is_upright, max_rows=_ROWS))


def _cell(value: Any) -> str:
    if value is None or value != value:  # NaN: pandas has it for what a row lacks
        return "–"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"  # not 1.2e+04
    text = str(value)
    return text if len(text) <= _CELL else f"{text[: _CELL - 1]}…"
