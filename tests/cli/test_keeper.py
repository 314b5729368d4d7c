"""The best step of a run, by losses that may not be finite."""

import types

import numpy as np
import pytest

from curvax.cli import _keeper

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ((3.0, 1.0, 2.0), 1),
        ((1.0, NAN, 2.0), 0),
        ((NAN, 2.0, 1.0, 3.0), 2),
        ((NAN, NAN, 5.0, NAN), 2),
        ((INF, 5.0, NAN, -INF), 1),
        ((NAN, INF, NAN), 0),
    ],
)
def test_the_lowest_finite_loss_counts(losses, best, monkeypatch, tmp_path):
    monkeypatch.setattr(_keeper, "_loss", lambda theta, phi, batch: losses[int(theta)])
    keeper = _keeper.Keeper(tmp_path, {}, (np.zeros(()), np.zeros(())), lambda: None)
    for step in range(len(losses)):
        point = np.asarray(float(step))
        keeper(types.SimpleNamespace(step=step, phi=-point, theta=point))
    step, phi, theta = keeper.best()
    assert (step, float(phi), float(theta)) == (best, -best, best)
    with np.load(tmp_path / "best.npz", allow_pickle=False) as content:
        assert int(content["step"]) == best
        assert np.array_equal(content["losses"], losses, equal_nan=True)
