"""The example of influence functions, as a user runs it."""

import importlib.util
import pathlib


def test_influences_are_what_retraining_gives():
    path = pathlib.Path(__file__).parents[2] / "examples" / "influence_functions.py"
    spec = importlib.util.spec_from_file_location("influence_functions", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.main(retrained=4)
    assert found["CG"] > 0.95 and found["EKFAC"] > 0.9
    assert found["products"] < 100
