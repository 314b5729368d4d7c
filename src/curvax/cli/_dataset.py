"""The data of a run: inputs, targets, three splits, and which labels were made wrong."""

import dataclasses
import difflib
from collections import Counter

import numpy as np

from curvax.cli._columns import encode, parse_numbers
from curvax.cli._errors import UsageError
from curvax.cli._options import Options
from curvax.cli._table import Table, is_missing
from curvax.cli._text import printable, quoted

MIN_ROWS = 50
_MAX_CLASSES = 100
# Numbers with at most this many different whole values are taken as classes.
_FEW_VALUES = 10


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Everything a run needs to know about its data.

    Attributes:
        name: Shown in the report.
        task: "classification" or "regression".
        x: (rows, inputs), float64.
        y: (rows,), class numbers (int64) or values in the target's own units (float64).
        classes: Names of the classes; empty for regression.
        inputs: Name of each input.
        train: Indices of the training rows; likewise `validation` and `test`.
        given: (training rows,) targets as the model sees them: `y[train]` but for what was corrupted.
        corrupted: (training rows,) whether the label was made wrong; None if none was.
        places: For each row how a person finds it: "line 7" of the file, "image 7".
        image_shape: Shape of an input as an image, or None.
        target: Name of the target.
        digest: Fingerprint of the source, to recognise it on resume.
        notes: What a user should know about how the data were taken.
    """

    name: str
    task: str
    x: np.ndarray
    y: np.ndarray
    classes: tuple[str, ...]
    inputs: tuple[str, ...]
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    given: np.ndarray
    corrupted: np.ndarray | None
    places: tuple[str, ...]
    image_shape: tuple[int, int] | None
    target: str
    digest: str
    notes: tuple[str, ...]


def generators(seed: int) -> tuple[np.random.Generator, ...]:
    """Independent streams for the splits, the corruption, and the parts of the validation split."""
    return tuple(np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))


def split_rows(strata: np.ndarray, percent: tuple[int, int, int], seed: int) -> tuple[np.ndarray, ...]:
    """Row indices of train, validation and test, with the same mixture of strata in each.

    Args:
        strata: (rows,) class numbers.
        percent: Sizes.
        seed: Of the shuffle.

    Returns:
        Three sorted index arrays. Each stratum of three or more rows has a row in each.
    """
    random = generators(seed)[0]
    parts: tuple[list, ...] = ([], [], [])
    for stratum in np.unique(strata):
        rows = random.permutation(np.flatnonzero(strata == stratum))
        others = [max(1, round(len(rows) * percent[k] / 100)) for k in (1, 2)]
        train = max(1, len(rows) - sum(others))
        for part, piece in zip(parts, np.split(rows, [train, train + others[0]]), strict=True):
            part.append(piece)
    return tuple(np.sort(np.concatenate(part)) for part in parts)


def split_numbers(values: np.ndarray, percent: tuple[int, int, int], seed: int) -> tuple[np.ndarray, ...]:
    """Row indices of train, validation and test, alike in how the values are spread.

    Args:
        values: (rows,) numbers.
        percent: Sizes.
        seed: Of the shuffle.

    Returns:
        Three sorted index arrays, whose sizes are exact up to a row.
    """
    random = generators(seed)[0]
    rank = np.empty(len(values), int)
    rank[np.lexsort((random.permutation(len(values)), values))] = np.arange(len(values))
    # Neighbours change places at random; then each row goes where it is most wanted.
    order = np.lexsort((random.permutation(len(values)), rank // 10))
    owed, splits = np.zeros(3), np.empty(len(values), int)
    for row in order:
        owed += np.asarray(percent) / 100
        splits[row] = np.argmax(owed)
        owed[splits[row]] -= 1
    return tuple(np.flatnonzero(splits == k) for k in range(3))


def corrupt_labels(
    labels: np.ndarray, num_classes: int, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Replace a fraction of the labels by a wrong class, drawn evenly from the others.

    Args:
        labels: (rows,) class numbers.
        num_classes: Number of classes.
        fraction: Part of the labels that is made wrong.
        seed: Of the draws.

    Returns:
        The labels after that, and which are wrong.
    """
    random = generators(seed)[1]
    count = round(fraction * len(labels))
    wrong = np.zeros(len(labels), bool)
    wrong[random.choice(len(labels), count, replace=False)] = True
    shift = random.integers(1, num_classes, len(labels))
    return np.where(wrong, (labels + shift) % num_classes, labels), wrong


def from_table(table: Table, options: Options) -> Dataset:
    """The data set in a user's file.

    Args:
        table: The file.
        options: Target, task, columns, splits.

    Returns:
        The data set.

    Raises:
        UsageError: If the table cannot serve.
    """
    target = _column(table, options.target or "", "--target")
    for option, given in (("--drop", options.drop), ("--categorical", options.categorical)):
        for name in given:
            _column(table, name, option)
    if len(table.lines) < MIN_ROWS:
        raise UsageError(f"{quoted(table.name)} has {len(table.lines)} rows; at least {MIN_ROWS} are needed")
    task, y, classes, how = _target(table, target, options)
    split = split_rows if task == "classification" else split_numbers
    train, validation, test = split(y, options.split, options.seed)
    encoded = encode(
        table,
        train,
        exclude=frozenset({target, *options.drop}),
        categorical=frozenset(options.categorical),
    )
    return finish(
        Dataset(
            name=table.name,
            task=task,
            x=encoded.x,
            y=y,
            classes=classes,
            inputs=encoded.names,
            train=train,
            validation=validation,
            test=test,
            given=y[train],
            corrupted=None,
            places=tuple(f"line {line}" for line in table.lines),
            image_shape=None,
            target=target,
            digest=table.digest,
            notes=(how, *encoded.notes),
        ),
        options,
    )


def finish(data: Dataset, options: Options) -> Dataset:
    """Corrupt the training labels if that was asked for; the last checks of any data set.

    Args:
        data: With `given = y[train]`.
        options: Corruption and task.

    Returns:
        The data set of the run.

    Raises:
        UsageError: If options and data do not go together.
    """
    if options.task is not None and options.task != data.task:
        raise UsageError(f"{data.name} is a {data.task} data set, not {options.task}")
    if data.task == "regression":
        if options.corrupt:
            raise UsageError("--corrupt is for classification, and the target is a number (see --task)")
        if np.ptp(data.given) == 0:
            raise UsageError(
                f"column {quoted(data.target)} is constant in the training rows: nothing to learn"
            )
        return data
    if not options.corrupt:
        return data
    given, wrong = corrupt_labels(data.given, len(data.classes), options.corrupt, options.seed)
    return dataclasses.replace(data, given=given, corrupted=wrong)


def _column(table: Table, name: str, option: str) -> str:
    if name in table.columns:
        return name
    close = difflib.get_close_matches(name, table.columns, n=1)
    names = list(table.columns)
    listed = ", ".join(printable(n, 30) for n in names[:8]) + (", …" if len(names) > 8 else "")
    hint = f"did you mean {quoted(close[0])}?" if close else f"its columns are {listed}"
    if len(names) == 1:
        hint = f"its only column is {quoted(names[0])} (cells are separated by commas, tabs or semicolons)"
    raise UsageError(f"{option}: {quoted(table.name)} has no column {quoted(name)}; {hint}")


def _target(table: Table, name: str, options: Options) -> tuple[str, np.ndarray, tuple[str, ...], str]:
    """Task, targets, class names and a sentence on how the task was decided."""
    cells = table.columns[name]
    absent = [line for cell, line in zip(cells, table.lines, strict=True) if is_missing(cell)]
    if absent:
        others = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise UsageError(
            f"column {quoted(name)} is the target and has no value on line {absent[0]}{others}: remove the row or "
            "fill it in"
        )
    if len(set(cells)) == 1:
        raise UsageError(f"column {quoted(name)} is the target and has the same value in every row")
    forced = "class-weights" in (options.tune or ()) or options.model == "logistic" or bool(options.corrupt)
    wanted = options.task or ("regression" if options.model == "ridge" else None)
    numbers = None if wanted == "classification" else _numbers(name, cells, table.lines, wanted)
    if wanted is None:
        task = "classification" if forced or numbers is None or _looks_like_classes(numbers) else "regression"
        other = "regression" if task == "classification" else "classification"
        how = f"Task: {task}, judged by the target" + (
            f" (--task {other} if that is wrong)." if not forced else "."
        )
    else:
        task, how = wanted, f"Task: {wanted}, as asked for."
    if task == "regression":
        if numbers is None or np.ptp(numbers) == 0:
            raise UsageError(f"column {quoted(name)} is the target and has the same value in every row")
        if not np.isfinite(np.ptp(numbers)) or np.ptp(numbers) > 1e150:
            raise UsageError(
                f"column {quoted(name)} is the target and its values are too large: rescale them"
            )
        return task, numbers, (), how
    counts = Counter(cells)
    label, fewest = min(counts.items(), key=lambda item: (item[1], item[0]))
    if len(counts) > _MAX_CLASSES or (fewest < 3 and len(counts) > len(cells) / 5):
        hint = "take --task regression if it is a number"
        if wanted is None and numbers is not None and forced:
            # Not by the target: an option has made it a classification.
            chosen = [
                option
                for option, used in (
                    ("--tune class-weights", "class-weights" in (options.tune or ())),
                    ("--model logistic", options.model == "logistic"),
                    ("--corrupt", bool(options.corrupt)),
                )
                if used
            ]
            hint = f"leave {' and '.join(chosen)} out, which {'is' if len(chosen) == 1 else 'are'} for classes only"
        elif wanted is None and numbers is None:
            hint = f"nor are they numbers (for example {quoted(cells[0])}; write numbers as 1234.5)"
        raise UsageError(
            f"column {quoted(name)} has {len(counts)} different values in {len(cells)} rows: too many for classes; "
            + hint
        )
    if fewest < 3:
        raise UsageError(
            f"class {quoted(label)} of column {quoted(name)} has {fewest} {'row' if fewest == 1 else 'rows'}; "
            "each class needs 3 or more (one for each split): merge or remove it"
        )
    classes = sorted(counts, key=_natural)
    index = {label: i for i, label in enumerate(classes)}
    return task, np.array([index[cell] for cell in cells], np.int64), tuple(classes), how


def _numbers(name: str, cells: list[str], lines: list[int], wanted: str | None) -> np.ndarray | None:
    if wanted != "regression":
        return parse_numbers(name, cells, lines)
    try:
        numbers = parse_numbers(name, cells, lines)
    except UsageError as error:
        # A target cannot become a category on the side.
        raise UsageError(str(error).replace(", or take all as categories with --categorical", "")) from None
    if numbers is None:
        raise UsageError(f"column {quoted(name)} is the target of a regression, but not numeric (for example "
                         f"{quoted(cells[0])}): write numbers as 1234.5, or take --task classification")  # fmt: skip
    return numbers


def _looks_like_classes(numbers: np.ndarray) -> bool:
    values = np.unique(numbers)
    return len(values) <= _FEW_VALUES and bool(np.all(values == np.round(values)))


def _natural(label: str) -> tuple[int, float, str]:
    """Numbers in their order, before words in theirs."""
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)
