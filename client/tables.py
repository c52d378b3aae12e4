"""A label file as rows of text, however it was exported.

::

    bytes --> text (UTF-8, UTF-16 with a mark, else Latin-1) --> delimiter (comma, semicolon, tab) --> header, rows
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xfed.common.errors import ConfigError, DataError

__all__ = ["Table", "read_table"]


@dataclass(frozen=True, kw_only=True)
class Table:
    """`header` as written, without surrounding spaces; `rows` are (line number in the file, fields), blank lines left out."""

    path: Path
    header: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...]

    def find(self, name: str) -> int | None:
        """Position of a column, exact or but for upper and lower case; None when it is not there or not unique."""
        for wanted, header in (
            (name, self.header),
            (name.casefold(), tuple(h.casefold() for h in self.header)),
        ):
            if header.count(wanted) == 1:
                return header.index(wanted)
        return None

    def column(self, chosen: str | None, usual: Sequence[str], option: str) -> int:
        """Position of the column that `option` chose, or of the first usual one. Raises `ConfigError` listing the columns."""
        for name in [chosen] if chosen is not None else usual:
            position = self.find(name)
            if position is not None:
                return position
        missing = f"no column {chosen!r}" if chosen is not None else f"none of the usual columns ({', '.join(usual)})"
        double = " (twice, so it is unclear which)" if chosen is not None and chosen in self.header else ""
        raise ConfigError(
            f"{self.path} has {missing}{double}. Its columns are: {', '.join(self.header)}. Choose one with {option}."
        )


def read_table(path: Path) -> Table:
    """Read a label file. Raises `DataError` when it cannot be read or has no rows."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the label file cannot be read ({error.strerror})") from error
    text = _text(data)
    first_line = io.StringIO(text, newline="")
    delimiter = max(",;\t", key=lambda d: len(_first_row(first_line, d)))
    rows = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                rows.append((reader.line_num, tuple(fields)))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: it is not a CSV file ({error})") from error
    if len(rows) < 2:
        raise DataError(f"{path}: the label file has no rows{' below its header' if rows else ''}")
    return Table(path=path, header=tuple(name.strip() for name in rows[0][1]), rows=tuple(rows[1:]))


def _text(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.removeprefix(codecs.BOM_UTF8).decode("latin-1")


def _first_row(text: io.StringIO, delimiter: str) -> list[str]:
    text.seek(0)
    try:
        return next((row for row in csv.reader(text, delimiter=delimiter) if any(field.strip() for field in row)), [])
    except csv.Error:
        return []
