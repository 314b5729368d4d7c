"""Columns become numbers by what the training rows know, and by nothing else."""

import numpy as np
import pytest

from curvax.cli._columns import encode, parse_numbers
from curvax.cli._dataset import corrupt_labels, split_numbers, split_rows
from curvax.cli._errors import UsageError
from curvax.cli._table import Table

NONE: frozenset[str] = frozenset()


def table(**columns):
    """A table as it would be read."""
    n = len(next(iter(columns.values())))
    return Table("t.csv", columns, list(range(2, n + 2)), "")


def encoded(train, exclude=NONE, categorical=NONE, **columns):
    """Encode, by input name."""
    result = encode(table(**columns), np.asarray(train), exclude=exclude, categorical=categorical)
    return dict(zip(result.names, result.x.T, strict=True)), result.notes


def test_numbers_are_standardised_by_the_training_rows():
    x, _ = encoded([0, 1, 2], a=["1", "2", "6", "1000"])
    train = np.array([1.0, 2.0, 6.0])
    assert np.allclose(x["a"][:3], (train - train.mean()) / train.std())
    assert x["a"][3] == 50.0, "far outside the training rows: clipped"
    again, _ = encoded([0, 1, 2], a=["1", "2", "6", "7"])
    assert np.array_equal(x["a"][:3], again["a"][:3]), "other rows have no influence on it"


def test_missing_numbers_are_the_training_median_and_marked():
    x, _ = encoded([0, 1, 2, 3], a=["1", "NA", "5", "3", "?"])
    filled = np.array([1.0, 3.0, 5.0, 3.0])
    assert np.allclose(x["a"][:4], (filled - filled.mean()) / filled.std())
    assert x["a"][4] == x["a"][1]
    assert np.array_equal(x["a is missing"], [0, 1, 0, 0, 1])


def test_a_number_missing_outside_the_training_rows_only_has_no_marker():
    x, _ = encoded([0, 1, 2], a=["1", "2", "3", ""])
    assert list(x) == ["a"]


def test_huge_and_tiny_numbers():
    x, _ = encoded([0, 1, 2], a=["1e300", "2e300", "-3e300"], b=["1e-300", "2e-300", "3e-300"])
    assert np.all(np.isfinite(list(x.values())))
    assert np.isclose(x["a"].std(), 1)
    assert np.isclose(x["b"].std(), 1)


def test_rare_levels_share_an_input():
    cells = ["u"] * 10 + ["v"] * 8 + ["w"] * 2 + [""] * 6 + ["new"]
    x, _ = encoded(range(26), kind=cells)
    assert list(x) == ["kind = u", "kind = v", "kind = (missing)", "kind = (other)"]
    assert np.array_equal(x["kind = (other)"], [0] * 18 + [1, 1] + [0] * 6 + [1])
    assert np.all(np.sum(list(x.values()), axis=0) == 1)


def test_two_levels_are_one_input():
    x, _ = encoded(range(12), kind=["u"] * 7 + ["v"] * 5)
    assert list(x) == ["kind = u"]


def test_categorical_and_exclude():
    columns = {"a": [str(i % 3) for i in range(30)], "b": [str(i) for i in range(30)]}
    x, _ = encoded(range(30), exclude=frozenset({"b"}), categorical=frozenset({"a"}), **columns)
    assert list(x) == ["a = 0", "a = 1", "a = 2"]


def test_what_says_nothing_is_left_out_and_noted():
    x, notes = encoded(range(9), a=list("123456789"), same=["1"] * 9, name=[f"n{i}" for i in range(9)])
    assert list(x) == ["a"]
    assert "same, name" in notes[0]


@pytest.mark.parametrize("cell", ["1_000", "0x10", "١", "1,5", "1e", "."])
def test_python_spellings_are_no_numbers(cell):
    with pytest.raises(UsageError, match="is not a number"):
        parse_numbers("a", ["1", "2", "3", "4", "5", cell], list(range(6)))


@pytest.mark.parametrize("cell", ["1", "+1", "-1.5", ".5", "2.", "1e-3", "1E+3"])
def test_numbers(cell):
    assert parse_numbers("a", [cell], [2])[0] == float(cell)


def test_splits_have_the_same_mixture_and_the_seed_decides():
    strata = np.repeat([0, 1, 2], [500, 100, 3])
    parts = split_rows(strata, (60, 20, 20), 0)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(603)), "each row once"
    for part, fraction in zip(parts, (0.6, 0.2, 0.2), strict=True):
        counts = np.bincount(strata[part], minlength=3)
        assert np.allclose(counts[:2], fraction * np.array([500, 100]))
        assert counts[2] == 1
    again, other = split_rows(strata, (60, 20, 20), 0), split_rows(strata, (60, 20, 20), 1)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not np.array_equal(parts[0], other[0])


def test_splits_of_numbers_are_spread_alike(rng):
    values = np.round(rng.exponential(size=203), 2)
    parts = split_numbers(values, (60, 20, 20), 0)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(203)), "each row once"
    assert [len(part) for part in parts] == pytest.approx([122, 40.5, 40.5], abs=1)
    for part in parts:
        shares = np.histogram(values[part], np.quantile(values, [0, 0.25, 0.5, 0.75, 1]))[0] / len(part)
        assert np.allclose(shares, 0.25, atol=0.08)
    other = split_numbers(values, (60, 20, 20), 1)
    assert np.intersect1d(parts[2], other[2]).size < 0.6 * len(parts[2]), "the seed decides"


def test_corrupted_labels_are_wrong_and_even(seed):
    labels = np.zeros(4000, np.int64)
    given, wrong = corrupt_labels(labels, 5, 0.3, seed)
    assert wrong.sum() == 1200
    assert np.all((given != labels) == wrong)
    counts = np.bincount(given[wrong], minlength=5)[1:]
    assert np.all(np.abs(counts - 300) < 5 * np.sqrt(300))
