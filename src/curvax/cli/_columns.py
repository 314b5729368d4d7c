"""From columns of text to numbers: what kind each is, and how it is encoded.

Everything that is learned from the data (medians, means, levels) is learned from the training rows.
"""

import dataclasses
import re
from collections import Counter

import numpy as np

from curvax.cli._errors import UsageError
from curvax.cli._table import Table, is_missing
from curvax.cli._text import printable, quoted

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\Z", re.ASCII)
_INFINITE = re.compile(r"[+-]?inf(inity)?\Z", re.IGNORECASE)
# A column with this fraction of numbers is meant to be numeric, and the rest are mistakes.
_MEANT_NUMERIC = 0.8
# A level of a category gets a column of its own if it has this many training rows, absolutely and as a
# fraction; the others share one.
_RARE_ROWS, _RARE_FRACTION, _MAX_LEVELS = 5, 0.01, 40


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Inputs of a model.

    Attributes:
        x: (rows, inputs), float64.
        names: Name of each input, as in the file (not escaped).
        notes: What a user should know about how the columns were taken.
    """

    x: np.ndarray
    names: tuple[str, ...]
    notes: tuple[str, ...]


def parse_numbers(name: str, cells: list[str], lines: list[int]) -> np.ndarray | None:
    """The cells as floats (NaN where missing), or None if the column is a category.

    Args:
        name: Column name, for messages.
        cells: The cells.
        lines: Their lines in the file.

    Returns:
        float64 array, or None.

    Raises:
        UsageError: On an infinite value, or on a few cells that are no numbers among many that are.
    """
    numbers = np.full(len(cells), np.nan)
    odd: list[int] = []
    present = 0
    for i, cell in enumerate(cells):
        if is_missing(cell):
            continue
        present += 1
        if _NUMBER.match(cell):
            numbers[i] = float(cell)
        if _INFINITE.match(cell) or np.isinf(numbers[i]):
            raise UsageError(
                f"column {quoted(name)}, line {lines[i]}: {quoted(cell)} is infinite; correct it, or remove the row"
            )
        if np.isnan(numbers[i]):
            odd.append(i)
    if not odd:
        return numbers
    if len(odd) <= (1 - _MEANT_NUMERIC) * present:
        i = odd[0]
        others = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        raise UsageError(
            f"column {quoted(name)}, line {lines[i]}: {quoted(cells[i])} is not a number{others}, the others are; "
            f"correct it, or take all as categories with --categorical"
        )
    return None


def encode(
    table: Table, train: np.ndarray, *, exclude: frozenset[str], categorical: frozenset[str]
) -> Encoded:
    """Numeric inputs from every column that is not excluded.

    Numbers: missing ones become the training median and get a second, 0/1 input that marks them; then mean 0
    and standard deviation 1 on the training rows. Categories: one 0/1 input for each level.

    Args:
        table: The file.
        train: Indices of the training rows.
        exclude: Target and dropped columns.
        categorical: Columns whose numbers are categories.

    Returns:
        The inputs.

    Raises:
        UsageError: If a column cannot be used, or none is left.
    """
    parts: list[np.ndarray] = []
    names: list[str] = []
    notes: list[str] = []
    constant: list[str] = []
    for name, cells in table.columns.items():
        if name in exclude:
            continue
        if all(map(is_missing, cells)):
            raise UsageError(f"column {quoted(name)} has no values at all: leave it out with --drop")
        numbers = None if name in categorical else parse_numbers(name, cells, table.lines)
        if numbers is None:
            new = _encode_categories(name, cells, train)
        else:
            new = _encode_numbers(name, numbers, train)
        if not new:
            constant.append(printable(name))
        names += [label for label, _ in new]
        parts += [values for _, values in new]
    if not parts:
        raise UsageError(
            "no column is left to predict from: each is the target, dropped, constant, or text that is "
            "nearly everywhere different"
        )
    if constant:
        notes.append(
            f"Left out, since they are the same or all different in every training row: {', '.join(constant)}."
        )
    return Encoded(np.stack(parts, axis=1), tuple(names), tuple(notes))


def _encode_numbers(name: str, numbers: np.ndarray, train: np.ndarray) -> list[tuple[str, np.ndarray]]:
    known = numbers[train][~np.isnan(numbers[train])]
    columns = []
    if known.size:
        filled = np.where(np.isnan(numbers), np.median(known), numbers)
        # Scaled before squaring, so that 1e200 does not overflow.
        size = np.max(np.abs(filled[train])) or 1.0
        scaled = filled / size
        mean, deviation = scaled[train].mean(), scaled[train].std()
        if deviation > 1e-12:
            # A later row far outside the training range must not decide everything.
            columns.append((name, np.clip((scaled - mean) / deviation, -50.0, 50.0)))
    absent = np.isnan(numbers).astype(np.float64)
    if 0 < absent[train].sum() < len(train):
        columns.append((f"{name} is missing", absent))
    return columns


def _encode_categories(name: str, cells: list[str], train: np.ndarray) -> list[tuple[str, np.ndarray]]:
    levels = ["(missing)" if is_missing(cell) else cell for cell in cells]
    counts = Counter(levels[i] for i in train)
    enough = max(_RARE_ROWS, _RARE_FRACTION * len(train))
    common = [
        level
        for level, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if count >= enough
    ]
    common = common[:_MAX_LEVELS]
    if not common:
        return []  # all different (names, dates, keys): nothing can be learned from it
    values = np.array(levels, dtype=object)
    columns = [(f"{name} = {level}", (values == level).astype(np.float64)) for level in common]
    rest = 1.0 - np.sum([column for _, column in columns], axis=0)
    columns.append((f"{name} = (other)", rest))
    # Two levels need one input only; and a level that every training row has says nothing.
    columns = [(label, column) for label, column in columns if 0 < column[train].sum() < len(train)]
    return columns[:1] if len(columns) == 2 else columns
