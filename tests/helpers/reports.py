"""Report folders of `curvax tune`, read for comparison."""

import json

import numpy as np


def comparable(folder):
    """What the same run must reproduce: `result.json` without times, and the arrays of the hyperparameters."""
    result = json.loads((folder / "result.json").read_text())
    for row in result["methods"] + result["references"]:
        del row["seconds"]
    del result["resumed"]
    with np.load(folder / "hyperparameters.npz", allow_pickle=False) as content:
        arrays = {name: content[name] for name in content.files}
    return result, arrays


def assert_same(a, b):
    """Two of `comparable`, bit for bit."""
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        assert np.array_equal(a[1][name], b[1][name]), name
