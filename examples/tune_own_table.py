"""A table of one's own: prices with mistakes in them, from the file to the suspicious rows.

The same from a shell: `curvax tune flats.csv --target price --tune sample-weights,l2-per-feature`.
"""

import csv
import json
import pathlib
import tempfile

import numpy as np

from curvax.cli import main


def write_flats(path: pathlib.Path, rows: int = 400) -> list[int]:
    """Prices of flats; returns the lines of the training file in which a digit was lost."""
    rng = np.random.default_rng(0)
    mistakes = []
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["area", "floor", "heating", "price"])
        for line in range(2, rows + 2):
            area, floor, heating = (
                rng.uniform(30, 120),
                rng.integers(0, 6),
                rng.choice(["gas", "oil", "pump"]),
            )
            price = 3000 * area + 4000 * floor + 20_000 * (heating == "pump") + 8000 * rng.normal()
            if rng.random() < 0.08:
                price /= 10
                mistakes.append(line)
            writer.writerow([f"{area:.1f}", floor, "" if rng.random() < 0.05 else heating, f"{price:.0f}"])
    return mistakes


def run(folder: pathlib.Path, steps: int = 40) -> tuple[list[int], list[int]]:
    """Tune, and compare the rows with the lowest weights with the mistakes."""
    mistakes = write_flats(folder / "flats.csv")
    code = main(
        ["tune", str(folder / "flats.csv"), "--target", "price", "--tune", "sample-weights,l2-per-feature"]
        + ["--steps", str(steps), "--out", str(folder / "report")]
    )
    if code != 0:
        raise SystemExit(code)
    result = json.loads((folder / "report" / "result.json").read_text())
    lowest = [int(row["place"].removeprefix("line ")) for row in result["lowest_weights"]]
    return lowest, mistakes


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        lowest, mistakes = run(pathlib.Path(name))
        found = sum(line in mistakes for line in lowest[:10])
        print(f"Of the ten rows with the lowest weights, {found} are mistakes.")
