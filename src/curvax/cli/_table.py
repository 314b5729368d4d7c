"""A CSV or TSV file as columns of text, or one clear reason why it is not one."""

import csv
import dataclasses
import hashlib
import os
import pathlib

from curvax.cli._errors import UsageError
from curvax.cli._text import printable, quoted

_DELIMITERS = {",": "a comma", "\t": "a tab", ";": "a semicolon"}
_MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-"})
MAX_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns of text as they stand in the file.

    Attributes:
        name: The file's name without folder.
        columns: Column name to cells, stripped; all of the same length.
        lines: Line of the file on which each row begins.
        digest: SHA-256 of the file.
    """

    name: str
    columns: dict[str, list[str]]
    lines: list[int]
    digest: str


def is_missing(cell: str) -> bool:
    """Whether a cell says that there is no value."""
    return cell.lower() in _MISSING


def read_table(path: str) -> Table:
    """Read a delimited text file with a header line.

    Args:
        path: File name.

    Returns:
        Its columns.

    Raises:
        UsageError: If there is no such file or it is no table.
    """
    content = _read_bytes(pathlib.Path(path), path)
    text = _decode(content, path)
    if not text.strip():
        raise UsageError(f"{quoted(path)} is empty")
    delimiter = _delimiter(text)
    try:
        numbered = _rows(text, delimiter)
    except csv.Error as error:
        raise UsageError(f"{quoted(path)} cannot be read as a table: {error}") from None
    header, names = numbered[0], []
    for position, cell in enumerate(header[1], start=1):
        name = cell.strip() or f"column {position}"
        if name in names:
            raise UsageError(f"{quoted(path)} has two columns named {quoted(name)}: rename one")
        names.append(name)
    rows = numbered[1:]
    if not rows:
        raise UsageError(f"{quoted(path)} has a header line and no rows")
    for line, cells in rows:
        if len(cells) != len(names):
            raise UsageError(
                f"{quoted(path)}, line {line}: {len(cells)} cells, but the header has {len(names)} "
                f"(separated by {_DELIMITERS[delimiter]})"
            )
    columns = {name: [cells[i].strip() for _, cells in rows] for i, name in enumerate(names)}
    digest = hashlib.sha256(content).hexdigest()
    return Table(os.path.basename(path), columns, [line for line, _ in rows], digest)


def _read_bytes(path: pathlib.Path, shown: str) -> bytes:
    try:
        if path.is_dir():
            raise UsageError(f"{quoted(shown)} is a folder: name a CSV file")
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{quoted(shown)} is larger than 1 GiB: take a sample of its rows")
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"there is no file {quoted(shown)} here") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{quoted(shown)} cannot be read: {printable(reason)}") from None


def _decode(content: bytes, shown: str) -> str:
    if b"\0" in content[: 1 << 20] and not content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UsageError(f"{quoted(shown)} is a binary file, not a table of text: export it as CSV")
    try:
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):  # what spreadsheets call "Unicode text"
            return content.decode("utf-16")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UsageError(f"{quoted(shown)}, line {line}: not UTF-8 text; save the file as UTF-8") from None


def _delimiter(text: str) -> str:
    """The separator that occurs most often in the header, outside quotes; a comma if none does."""
    header = next(line for line in text.splitlines() if line.strip())
    bare = "".join(header.split('"')[::2])
    return max(_DELIMITERS, key=bare.count)


def _rows(text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Line number and cells of every row; blank lines are left out."""
    reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    rows, line = [], 1
    for cells in reader:
        if any(cell.strip() for cell in cells):
            rows.append((line, cells))
        line = reader.line_num + 1
    return rows
