"""The store of checkpoints: every bit comes back, foreign and damaged folders are recognised."""

import contextlib
import gc
import pathlib
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.bilevel._checkpoint import Checkpoint, Store


class State(eqx.Module):
    """A bit of everything that a carry may hold."""

    phi: dict
    key: jax.Array
    flag: jax.Array
    nothing: None
    name: str


def _state(seed, size=3):
    draw = np.random.default_rng(seed).normal
    return State(
        phi={
            "f64": jnp.array(draw(size=(size, 2))),
            "f32": jnp.array(draw(size=4), jnp.float32),
            "bf16": jnp.array(draw(size=5), jnp.bfloat16),
            "odd": jnp.array([np.nan, np.inf, -0.0, 5e-324]),
            "empty": jnp.zeros((0, 3), jnp.float32),
            "scalar": jnp.array(seed, jnp.int32),
        },
        key=jax.random.split(jax.random.key(seed), 2),
        flag=jnp.array(True),
        nothing=None,
        name="static",
    )


INPUTS = {"phi0": {"w": np.ones(3)}, "inner_data": (np.ones((4, 2)), None)}
EXTRA = {"value": np.array([1.0, np.nan, 3.0]), "count": np.zeros(0, np.int32)}


def _open(directory, inputs=INPUTS, **kwargs):
    return Store(Checkpoint(directory, **kwargs), inputs)


def _write(directory, numbers=(7,), **kwargs):
    store = _open(directory, **kwargs)
    assert store.load(_state(0), ()) is None
    for number in numbers:
        assert store.save(number, _state(number), EXTRA, wait=True)
    store.close()


def _same_bits(a, b):
    dynamic = [eqx.filter(x, eqx.is_array) for x in (a, b)]
    assert jax.tree.structure(dynamic[0]) == jax.tree.structure(dynamic[1])
    for x, y in zip(*map(jax.tree.leaves, dynamic), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_every_bit_comes_back(tmp_path):
    _write(tmp_path)
    store = _open(tmp_path)
    state, extra = store.load(_state(0), tuple(EXTRA))
    _same_bits(state, _state(7))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(eqx.filter(state.phi, eqx.is_array)))
    assert state.name == "static" and state.nothing is None
    for name, value in EXTRA.items():
        assert extra[name].dtype == value.dtype
        np.testing.assert_array_equal(extra[name], value)
    store.close()


def test_saving_does_not_wait_and_keeps_its_own_copy(tmp_path):
    store = _open(tmp_path, every_seconds=0)
    array = np.random.default_rng(0).normal(size=200_000)
    expected = array.copy()
    assert store.is_due()
    store.save(1, {"x": jnp.asarray(array)}, {"value": array})
    array[:] = 0  # what the next chunk does with a donated buffer
    store.close()
    store = _open(tmp_path)
    state, extra = store.load({"x": jnp.zeros(200_000)}, ("value",))
    np.testing.assert_array_equal(state["x"], expected)
    np.testing.assert_array_equal(extra["value"], expected)
    store.close()


def test_keeps_as_many_as_asked(tmp_path):
    _write(tmp_path, numbers=(1, 2, 3, 4, 5), keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4", "5"]


def test_time_decides_when_it_is_due(tmp_path):
    store = _open(tmp_path, every_seconds=1000)
    assert not store.is_due()
    store.close()


def test_same_number_is_written_once(tmp_path):
    store = _open(tmp_path)
    store.save(3, _state(3), EXTRA, wait=True)
    before = (tmp_path / "3").stat().st_mtime_ns
    assert store.save(3, _state(3), EXTRA, wait=True)
    assert (tmp_path / "3").stat().st_mtime_ns == before
    store.close()


def _files(folder):
    return [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x55
    path.write_bytes(bytes(data))


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# Orbax leaves coroutines behind when a read fails; they complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [_flip, _truncate, pathlib.Path.unlink])
def test_damaged_file_is_never_read_as_another_state(tmp_path, damage):
    """Whatever file of the newest checkpoint is damaged: the same state, or the one before with a warning."""
    probe = _written(tmp_path / "probe")
    fallen_back = 0
    for index, path in enumerate(sorted(_files(probe / "2"))):
        directory = pathlib.Path(shutil.copytree(probe, tmp_path / str(index)))
        damage(directory / path.relative_to(probe))
        store = _open(directory)
        with pytest.warns(UserWarning) if _is_unreadable(directory) else contextlib.nullcontext():
            state, _ = store.load(_state(0), tuple(EXTRA))
        number = int(state.phi["scalar"])
        _same_bits(state, _state(number))
        fallen_back += number == 1
        if number == 1:  # the number is free again, and nothing was deleted
            assert [p.name for p in directory.glob("unreadable-2-*")]
            assert store.save(2, _state(2), EXTRA, wait=True)
        store.close()
    gc.collect()
    assert fallen_back >= 3


def _written(directory):
    _write(directory, numbers=(1, 2))
    return directory


def _is_unreadable(directory):
    store = _open(directory)
    try:
        store._read(2)
        return False
    except Exception:
        return True
    finally:
        store.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_readable_is_an_error(tmp_path):
    _write(tmp_path)
    for path in _files(tmp_path):
        path.write_bytes(b"")
    store = _open(tmp_path)
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(ValueError, match="none of the checkpoints"),
    ):
        store.load(_state(0), ())
    store.close()
    gc.collect()


def test_other_shape_of_an_input_is_refused(tmp_path):
    _write(tmp_path)
    store = _open(tmp_path, inputs=INPUTS | {"phi0": {"w": np.ones(4)}})
    with pytest.raises(
        ValueError, match=r"another problem: `phi0` was \['w'\]: float64\[3\]; now it is .*\[4\]"
    ):
        store.load(_state(0), ())
    store.close()


def test_other_structure_of_the_state_is_refused(tmp_path):
    _write(tmp_path)
    store = _open(tmp_path)
    with pytest.raises(ValueError, match="another inner solver, rule, optimizer"):
        store.load(_state(0, size=5), ())
    store.close()


def test_other_values_are_a_warning(tmp_path):
    _write(tmp_path)
    store = _open(tmp_path, inputs=INPUTS | {"phi0": {"w": np.zeros(3)}})
    with pytest.warns(UserWarning, match="other values of phi0"):
        state, _ = store.load(_state(0), ())
    _same_bits(state, _state(7))
    store.close()


def test_resume_says_what_must_be_there(tmp_path):
    store = _open(tmp_path, resume=True)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        store.load(_state(0), ())
    store.close()
    _write(tmp_path, resume=False)
    store = _open(tmp_path, resume=False)
    with pytest.raises(ValueError, match="Name another directory"):
        store.load(_state(0), ())
    store.close()


def test_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match="directory"):
        Checkpoint(None)
    with pytest.raises(ValueError, match="every_seconds"):
        Checkpoint(tmp_path, every_seconds=float("nan"))
    with pytest.raises(ValueError, match="keep"):
        Checkpoint(tmp_path, keep=0)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="is a file"):
        _open(file)


def test_failure_to_write_is_a_warning(tmp_path, monkeypatch):
    store = _open(tmp_path)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(store._manager, "save", full)
    with pytest.warns(UserWarning, match="No checkpoint could be written .* No space left"):
        assert not store.save(1, _state(1), EXTRA, wait=True)
    store.close()


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    import pickle

    _write(tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    store = _open(tmp_path)
    assert store.load(_state(0), tuple(EXTRA)) is not None
    store.close()
