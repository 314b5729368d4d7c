"""What the start page claims of `make demo`."""

import json
import pathlib
import runpy

import pytest

from curvax.cli import main


@pytest.mark.slow
def test_digits(tmp_path, capsys):
    assert main(["tune", "digits", "--out", str(tmp_path / "digits")]) == 0
    assert "AUC" in capsys.readouterr().out
    result = json.loads((tmp_path / "digits/result.json").read_text())
    accuracy = {row["key"]: row["test"]["accuracy"] for row in result["methods"] + result["references"]}
    assert accuracy["tuned"] >= accuracy["grid"] + 0.015
    assert accuracy["tuned"] >= accuracy["untuned"] + 0.01
    assert result["label_noise"]["auc"] > 0.95
    assert result["hyperparameters"]["total"] == 1079 + 64
    assert result["hypergradient"]["relative_error_largest"] < 0.01
    assert result["hypergradient"]["retries"] == 0
    assert sum(row["seconds"] for row in result["methods"]) < 120
    names = {"curves", "weights", "lowest_weights", "penalties", "overview"}
    assert {path.stem for path in (tmp_path / "digits").glob("*.png")} == names
    assert (tmp_path / "digits/report.html").stat().st_size < 1_000_000


def test_example_finds_the_mistakes_of_a_table(tmp_path):
    path = pathlib.Path(__file__).parents[2] / "examples" / "tune_own_table.py"
    lowest, mistakes = runpy.run_path(str(path))["run"](tmp_path, steps=10)
    assert len(mistakes) > 20
    assert sum(line in mistakes for line in lowest[:10]) >= 8
