"""Checkpoints of a run: written atomically by Orbax in a thread, checked when they are read.

A checkpoint is a folder `<directory>/<attempts>` with the leaves of the carry and the history as plain
arrays, and one JSON file that says what they are: path, dtype, shape and CRC-32 of each. Nothing in it is
executable, and nothing is unpickled.
"""

import dataclasses
import logging
import os
import pathlib
import time
import warnings
import zlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

_FORMAT = "curvax minimise 1"
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    r"""Where and how often `minimise` saves a run, and whether it goes on from what it finds there.

    A run with a checkpoint can be killed at any moment; the same call goes on from the newest
    checkpoint and ends with the same bits as an uninterrupted run (same machine, same versions). A
    checkpoint is written when `every_seconds` have passed, when the run ends or fails, and on Ctrl-C.

    One directory belongs to one run. Arguments of another structure, shape or dtype are a
    `ValueError`; other *values* of `phi0`, `theta0`, `key` or the data are a warning, and
    functions, learning rates and tolerances cannot be compared: to start anew, use a new directory.
    A checkpoint that cannot be read is put aside with a warning and the one before it is used.

    Args:
        directory: Folder of the checkpoints; created if it is not there.
        every_seconds: Time between two checkpoints, >= 0; 0 saves as often as writing allows.
        keep: Number of checkpoints that are kept, at least 1; 2 allows one to go bad.
        resume: `None`: go on if there is a checkpoint, else start. `True`: there must be one.
            `False`: there must be none.

    Cost: a checksum of the data when the run begins; for each checkpoint one copy of the state to the host, in
    the loop (the writing, 0.05 s for small states, takes place beside it); 0.05 s at the end.

    Example:
        ```python
        checkpoint = cx.Checkpoint("runs/ridge", every_seconds=10)  # for `cx.minimise(checkpoint=...)`
        ```
    """

    directory: str | os.PathLike
    every_seconds: float = 30.0
    keep: int = 2
    resume: bool | None = None

    def __post_init__(self) -> None:
        """Refuse what would never save, or save nothing."""
        if not isinstance(self.directory, str | os.PathLike):
            raise TypeError(f"Checkpoint: `directory` must be a path, found {self.directory!r}.")
        if not self.every_seconds >= 0:
            raise ValueError(f"Checkpoint: `every_seconds` must be >= 0, found {self.every_seconds!r}.")
        if not isinstance(self.keep, int) or self.keep < 1:
            raise ValueError(f"Checkpoint: `keep` must be an int >= 1, found {self.keep!r}.")


def _to_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    # A copy: on the CPU `device_get` may return a view of a buffer that the next chunk overwrites.
    return np.array(jax.device_get(leaf))


def _leaves(tree: PyTree) -> list[tuple[str, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(eqx.filter(tree, eqx.is_array))
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in flat]


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data) if array.size else 0


def describe(tree: PyTree) -> list[list]:
    """Path, dtype, shape and checksum of every array of a tree, as JSON."""
    rows = []
    for path, leaf in _leaves(tree):
        rows.append([path, str(leaf.dtype), list(leaf.shape), _crc(_to_host(leaf))])
    return rows


def _shapes(rows: list[list]) -> str:
    return (
        ", ".join(f"{path or 'array'}: {dtype}{shape}" for path, dtype, shape, *_ in rows[:6])
        + (f", and {len(rows) - 6} more" if len(rows) > 6 else "")
        or "no arrays"
    )


class Store:
    """The checkpoints of one run: `load` once, then `save`, then `close`."""

    def __init__(self, checkpoint: Checkpoint, inputs: dict[str, PyTree]) -> None:
        """Open the directory. `inputs` are the arguments by which a run is recognised."""
        import orbax.checkpoint as ocp  # 0.4 s: only who saves pays for it

        self.directory = pathlib.Path(checkpoint.directory).expanduser().absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"Checkpoint: `directory` {self.directory} is a file; name a folder.")
        self._checkpoint = checkpoint
        self._inputs = {name: describe(tree) for name, tree in inputs.items()}
        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=checkpoint.keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
            ),
        )
        self._last_time = time.monotonic()
        self._last_saved: int | None = None

    def load(self, like: PyTree, extra: tuple[str, ...]) -> tuple[PyTree, dict[str, np.ndarray]] | None:
        """The newest readable checkpoint as a tree like `like` and the named arrays; None if there is none."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        if self._checkpoint.resume is True and not steps:
            raise ValueError(f"Checkpoint: `resume=True`, but {self.directory} holds no checkpoint.")
        if self._checkpoint.resume is False and steps:
            raise ValueError(
                f"Checkpoint: `resume=False`, but {self.directory} holds a checkpoint. Name another directory, or "
                "pass `resume=None` to go on from it."
            )
        unreadable = []
        for step in steps:
            try:
                meta, arrays = self._read(step)
            except Exception as error:  # whatever Orbax, the file system or our own checks find
                unreadable.append(step)
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                warnings.warn(
                    f"The checkpoint {self.directory / str(step)} cannot be read ({reason}).", stacklevel=4
                )
                continue
            self._compare(meta, like)
            self._put_aside(unreadable)
            self._last_saved = step
            return self._rebuild(like, arrays), {name: arrays[name] for name in extra}
        if steps:
            raise ValueError(
                f"Checkpoint: none of the checkpoints in {self.directory} can be read. Name another directory to "
                "start anew."
            )
        return None

    def _read(self, step: int) -> tuple[dict, dict[str, np.ndarray]]:
        args = self._ocp.args
        content = self._manager.restore(
            step, args=args.Composite(arrays=args.StandardRestore(), meta=args.JsonRestore())
        )
        meta, found = content.meta, content.arrays
        if meta.get("format") != _FORMAT:
            raise ValueError(f"not written by this version of minimise: format {meta.get('format')!r}")
        arrays = {}
        for name, _, dtype, shape, crc in meta["arrays"]:
            array = np.asarray(found[name]) if 0 not in shape else np.zeros(shape, jnp.dtype(dtype))
            if str(array.dtype) != dtype or list(array.shape) != shape or _crc(array) != crc:
                raise ValueError(f"checksum, dtype or shape of {name} is wrong")
            arrays[name] = array
        return meta, arrays

    def _compare(self, meta: dict, like: PyTree) -> None:
        """Refuse the checkpoint of another problem; warn about other numbers."""
        changed = []
        for name, now in self._inputs.items():
            then = meta["inputs"].get(name, [])
            if [row[:3] for row in then] != [row[:3] for row in now]:
                raise ValueError(
                    f"The checkpoint in {self.directory} belongs to another problem: `{name}` was "
                    f"{_shapes(then)}; now it is {_shapes(now)}. Name another directory for this run."
                )
            if then != now:
                changed.append(name)
        state = [[path, str(leaf.dtype), list(leaf.shape)] for path, leaf in _leaves(like)]
        if meta["state"] != state:
            odd = next((a or b for a, b in _zip_longest(meta["state"], state) if a != b), None)
            raise ValueError(
                f"The checkpoint in {self.directory} was made with another inner solver, rule, optimizer or "
                f"callbacks: its state differs at {odd[0] if odd else 'its end'}. Pass the same ones, or name "
                "another directory for this run."
            )
        if changed:
            warnings.warn(
                f"The checkpoint in {self.directory} was made with other values of {', '.join(changed)}. The run "
                "goes on from it. Name another directory to start anew.",
                stacklevel=5,
            )

    def _rebuild(self, like: PyTree, arrays: dict[str, np.ndarray]) -> PyTree:
        dynamic, static = eqx.partition(like, eqx.is_array)
        leaves, structure = jax.tree.flatten(dynamic)
        restored = []
        for index, leaf in enumerate(leaves):
            value = jnp.array(arrays[f"leaf_{index:04}"], copy=True)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
            if len(leaf.sharding.device_set) > 1:
                value = jax.device_put(value, leaf.sharding)
            restored.append(value)
        return eqx.combine(jax.tree.unflatten(structure, restored), static)

    def _put_aside(self, steps: list[int]) -> None:
        """Rename what cannot be read, so that its number is free again."""
        for step in steps:
            target = self.directory / f"unreadable-{step}-{time.time_ns()}"
            (self.directory / str(step)).rename(target)
        if steps:
            self._manager.reload()

    def is_due(self) -> bool:
        """Whether it is time to save, and the last save is finished."""
        passed = time.monotonic() - self._last_time
        return passed >= self._checkpoint.every_seconds and not self._manager.is_saving_in_progress()

    def save(self, number: int, tree: PyTree, extra: dict[str, np.ndarray], *, wait: bool = False) -> bool:
        """Write a checkpoint; `number` grows with the run. Returns at once unless `wait`; False if it failed."""
        try:
            if number != self._last_saved:
                self._save(number, tree, extra)
            if wait:
                self._manager.wait_until_finished()
        except Exception as error:  # a full disk must not end a run that is sound
            warnings.warn(f"No checkpoint could be written to {self.directory}: {error}", stacklevel=3)
            return False
        return True

    def _save(self, number: int, tree: PyTree, extra: dict[str, np.ndarray]) -> None:
        self._manager.wait_until_finished()
        leaves = _leaves(tree)
        named = {f"leaf_{i:04}": (path, _to_host(leaf)) for i, (path, leaf) in enumerate(leaves)}
        named |= {name: (name, np.array(value)) for name, value in extra.items()}
        meta = {
            "format": _FORMAT,
            "inputs": self._inputs,
            "state": [[path, str(leaf.dtype), list(leaf.shape)] for path, leaf in leaves],
            "arrays": [[k, path, str(x.dtype), list(x.shape), _crc(x)] for k, (path, x) in named.items()],
        }
        arrays = {k: x for k, (_, x) in named.items() if x.size}  # Orbax refuses arrays of size zero
        args = self._ocp.args
        self._manager.save(
            number,
            args=args.Composite(arrays=args.StandardSave(arrays), meta=args.JsonSave(meta)),
            force=True,
        )
        self._last_saved, self._last_time = number, time.monotonic()
        _log.debug("checkpoint %d to %s", number, self.directory)

    def close(self) -> None:
        """Wait for the last write and release the threads."""
        self._manager.close()


def _zip_longest(a: list, b: list) -> list[tuple]:
    length = max(len(a), len(b))
    pad = lambda x: x + [None] * (length - len(x))  # noqa: E731
    return list(zip(pad(a), pad(b), strict=True))
