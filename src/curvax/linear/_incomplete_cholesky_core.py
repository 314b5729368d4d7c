"""The arithmetic of incomplete Cholesky factorisations, in NumPy: in waves for a known pattern, else by columns."""

from typing import Any, NamedTuple

import numpy as np

# Pairs of entries that are looked up at once.
_CHUNK = 2**20


class Plan(NamedTuple):
    """The order of work for a pattern: columns in waves, the columns of a wave independent of each other."""

    rows: np.ndarray  # of the entries below the diagonal, by waves
    columns: np.ndarray
    start: np.ndarray  # the entries of A in that order, 0 where L fills in
    waves: list[np.ndarray]  # columns
    entries: np.ndarray  # wave w has the entries [entries[w], entries[w + 1])
    pairs: np.ndarray  # and the pairs [pairs[w], pairs[w + 1])
    first: np.ndarray  # of a pair: L_ik, L_jk with i > j, and where their product goes, L_ij
    second: np.ndarray
    target: np.ndarray


def factorised(lower: Any, plan: Plan | None, diagonal: float, tolerance: float) -> Any:
    """L of the matrix with this number on its diagonal; None where a pivot is not positive."""
    import scipy.sparse

    found = (
        _by_columns(lower, diagonal, tolerance)
        if plan is None
        else _by_waves(plan, lower.shape[0], diagonal, tolerance)
    )
    if found is None:
        return None
    rows, columns, values, pivots = found
    size = np.arange(len(pivots))
    below = scipy.sparse.coo_array((values, (rows, columns)), shape=lower.shape)
    below.eliminate_zeros()
    return (below + scipy.sparse.coo_array((np.sqrt(pivots), (size, size)), shape=lower.shape)).tocsr()


def _pattern(lower: Any, level: int) -> Any:
    """The entries of level k or less: (i, v) of level a and (j, v) of level b make (i, j) of level a + b + 1."""
    import scipy.sparse

    def ones(m: Any) -> Any:
        return scipy.sparse.csr_array((np.ones(m.nnz), m.indices, m.indptr), shape=m.shape)

    by_level = [ones(lower.tocsr())]
    known = by_level[0]
    for step in range(1, level + 1):
        reached = sum(
            (by_level[a] @ by_level[step - 1 - a].T for a in range(step)),
            start=scipy.sparse.csr_array(known.shape),
        )
        reached = ones(scipy.sparse.tril(reached, -1, format="csr"))
        new = reached - reached.multiply(known)
        new.eliminate_zeros()
        by_level.append(ones(new))
        known = ones(known + new)
    return known


def plan_of(lower: Any, level: int) -> Plan:
    """Waves, and the products that each sends to later ones."""
    size = lower.shape[0]
    pattern = _pattern(lower, level).tocsc()
    pattern.sort_indices()
    wave = _waves(pattern)
    order = np.argsort(wave, kind="stable")
    lengths = np.diff(pattern.indptr)[order]
    take = _ranges(pattern.indptr[:-1][order], lengths)
    rows = pattern.indices[take].astype(np.int64)
    columns = np.repeat(order, lengths)
    keys = columns * size + rows
    sorter = np.argsort(keys)
    keys = keys[sorter]
    start = np.zeros(len(rows))
    mine = np.repeat(np.arange(size), np.diff(lower.indptr)) * size + lower.indices
    start[sorter[np.searchsorted(keys, mine)]] = lower.data

    # After entry (j, k) of a column come the (i, k) with i > j.
    ends = np.repeat(np.cumsum(lengths), lengths)
    partners = ends - np.arange(len(rows)) - 1
    found: list[tuple[np.ndarray, ...]] = []
    borders = np.searchsorted(np.cumsum(partners), np.arange(0, partners.sum() + _CHUNK, _CHUNK))
    borders = np.unique(np.concatenate([[0], borders, [len(rows)]]))
    for begin, end in zip(borders[:-1], borders[1:], strict=True):
        second = np.repeat(np.arange(begin, end), partners[begin:end])
        first = _ranges(np.arange(begin, end) + 1, partners[begin:end])
        wanted = rows[second] * size + rows[first]
        place = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
        hit = keys[place] == wanted
        found.append((first[hit], second[hit], sorter[place[hit]]))
    nothing = (np.zeros(0, np.int64),) * 3
    first, second, target = (np.concatenate(parts) for parts in zip(nothing, *found, strict=True))

    count = int(wave.max()) + 1
    cuts = np.searchsorted(wave[order], np.arange(count + 1))
    entries = np.searchsorted(wave[columns], np.arange(count + 1))
    return Plan(
        rows=rows,
        columns=columns,
        start=start,
        waves=np.split(order, cuts[1:-1]),
        entries=entries,
        pairs=np.searchsorted(second, entries),
        first=first,
        second=second,
        target=target,
    )


def _waves(pattern: Any) -> np.ndarray:
    """The wave of each column: one more than the latest of those that its row has entries in."""
    size = pattern.shape[0]
    waiting = np.bincount(pattern.indices, minlength=size)
    wave = np.zeros(size, np.int64)
    ready, number = np.flatnonzero(waiting == 0), 0
    while len(ready):
        wave[ready] = number
        lengths = pattern.indptr[ready + 1] - pattern.indptr[ready]
        served = pattern.indices[_ranges(pattern.indptr[ready], lengths)]
        np.subtract.at(waiting, served, 1)
        served = np.unique(served)
        ready, number = served[waiting[served] == 0], number + 1
    return wave


def _by_waves(plan: Plan, size: int, diagonal: float, tolerance: float) -> tuple[np.ndarray, ...] | None:
    """The entries of L in a known pattern."""
    pivots, values = np.full(size, diagonal), plan.start.copy()
    for w, columns in enumerate(plan.waves):
        if not np.all(pivots[columns] > size * np.finfo(np.float64).eps):
            return None
        mine = slice(plan.entries[w], plan.entries[w + 1])
        new = values[mine] / np.sqrt(pivots[plan.columns[mine]])
        values[mine] = new = np.where(np.abs(new) >= tolerance, new, 0)
        np.subtract.at(pivots, plan.rows[mine], new**2)
        sent = slice(plan.pairs[w], plan.pairs[w + 1])
        products = values[plan.first[sent]] * values[plan.second[sent]]
        np.subtract.at(values, plan.target[sent], products)
    return plan.rows, plan.columns, values, pivots


def _by_columns(lower: Any, diagonal: float, tolerance: float) -> tuple[np.ndarray, ...] | None:
    """The entries of L that are not small, column by column from the columns to the left."""
    size = lower.shape[0]
    pivots = np.full(size, diagonal)
    # Entries of L in one store, column by column, each with the place where its column ends; and those of a row.
    store = 4 * lower.nnz + size
    rows, end_of, values = np.zeros(store, np.int64), np.zeros(store, np.int64), np.zeros(store)
    in_row: list[list[int]] = [[] for _ in range(size)]
    lengths, used = np.zeros(size, np.int64), 0
    for j in range(size):
        if not pivots[j] > size * np.finfo(np.float64).eps:
            return None
        mine = slice(lower.indptr[j], lower.indptr[j + 1])
        at, new = lower.indices[mine], lower.data[mine]
        left = np.asarray(in_row[j], np.int64)
        if len(left):
            counts = end_of[left] - left - 1
            below = _ranges(left + 1, counts)
            at = np.concatenate([at, rows[below]])
            new = np.concatenate([new, -values[below] * np.repeat(values[left], counts)])
            at, place = np.unique(at, return_inverse=True)
            new = np.bincount(place, new, minlength=len(at))
        new = new / np.sqrt(pivots[j])
        kept = np.abs(new) >= tolerance
        at, new = at[kept], new[kept]
        end = used + len(at)
        if end > len(rows):
            more = max(len(rows), len(at))
            rows, values, end_of = (
                np.concatenate([a, np.zeros(more, a.dtype)]) for a in (rows, values, end_of)
            )
        rows[used:end], values[used:end], end_of[used:end], lengths[j] = at, new, end, len(at)
        pivots[at] -= new**2
        for entry, row in enumerate(at.tolist(), used):
            in_row[row].append(entry)
        in_row[j] = []
        used = end
    return rows[:used], np.repeat(np.arange(size), lengths), values[:used], pivots


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The integers from each start on, so many for each, one after the other."""
    offsets = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(offsets - starts, lengths)
