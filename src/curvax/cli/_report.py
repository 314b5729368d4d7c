"""`report.html`: one file that needs nothing else. All that is not ours passes through `_text`."""

import base64
import html
import shlex
from typing import Any

from curvax.cli._baselines import grid_range
from curvax.cli._console import (
    comparison_line,
    heading,
    noise_line,
    quality,
    quality_name,
    reference_line,
    seconds,
    time_line,
    warnings,
)
from curvax.cli._options import Options
from curvax.cli._result import Outcome
from curvax.cli._style import CSS
from curvax.cli._text import number, printable

_CAPTIONS = {
    "curves": "Left: the loss on the part of the validation split that the hypergradients see, on the part that they do not, "
    "and the step that the second one chose. Right: the length of the hypergradient and the estimate of its error, drawn "
    "no lower than rounding; as long as the dashed line is far below the other, the direction can be trusted.",
    "weights": "All training examples start with weight 1. Examples that make the validation loss worse lose theirs.",
    "lowest_weights": "The training images with the lowest weights, each with the label that it was given and the one "
    "that the tuned model reads. Red: a label that was made wrong.",
    "penalties": "All inputs start with the same penalty. A low one lets training change what the model does with the "
    "input; a high one keeps it out (logistic, ridge) or at its random start (mlp).",
}
_MAX_ROWS = 20


def _text(value: object, limit: int = 120) -> str:
    """Any text, safe inside HTML."""
    return html.escape(printable(value, limit), quote=True)


def render(outcome: Outcome, result: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The report as one HTML document.

    Args:
        outcome: The run.
        result: Content of `result.json`.
        pictures: Name to PNG.

    Returns:
        HTML without scripts and without links to anything outside.
    """
    name, total = _text(result["data"]["name"]), f"{result['hyperparameters']['total']:,}"
    parts = [
        "<header>",
        '<div class="kicker">Curvax · tuning report</div>',
        f"<h1>{name}: {total} hyperparameters, tuned together</h1>",
        f"<p>{_text(heading(result), 400)}</p>",
        "</header>",
        _cards(result),
        *[f'<p class="warning">{_text(line, 800)}</p>' for line in warnings(result)],
        "<h2>Comparison</h2>",
        _comparison(result),
        "<h2>The run</h2>",
        _picture(pictures, "curves"),
        _weights(result, pictures),
        _picture(pictures, "penalties", "<h2>The learned penalties</h2>"),
        "<h2>How this was done</h2>",
        _method(outcome, result),
        f"<footer>Made by curvax {_text(result['curvax'])}. Beside this file: <code>result.json</code> (all numbers), "
        "<code>hyperparameters.json</code> and <code>hyperparameters.npz</code> (what was tuned), the pictures as "
        "PNG, and the checkpoint of the run.</footer>",
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name} – Curvax tuning report</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def command(options: Options) -> str:
    """The command line that repeats a run."""
    words = ["curvax", "tune", options.data]
    defaults = Options(data="")
    for option in ("target", "task", "model", "steps", "seed", "corrupt", "hidden"):
        value = getattr(options, option)
        if value != getattr(defaults, option):
            words += [f"--{option}", str(value)]
    if options.tune is not None:
        words += ["--tune", ",".join(options.tune)]
    if options.split != defaults.split:
        words += ["--split", "/".join(map(str, options.split))]
    for option in ("drop", "categorical"):
        for value in getattr(options, option):
            words += [f"--{option}", value]
    return shlex.join(words)


def _cards(result: dict[str, Any]) -> str:
    rows = {row["key"]: row["test"] for row in result["methods"]}
    is_class = result["data"]["task"] == "classification"
    if is_class:
        value, other = f"{100 * rows['tuned']['accuracy']:.1f} %", f"{100 * rows['grid']['accuracy']:.1f} %"
    else:
        value, other = number(rows["tuned"]["rmse"]), number(rows["grid"]["rmse"])
    cards = [
        (value, f"test {quality_name(result)} tuned; {other} by grid search"),
        (f"{result['hyperparameters']['total']:,}", f"hyperparameters in {result['steps']:,} steps"),
    ]
    if result["label_noise"] is not None:
        cards.append((f"{result['label_noise']['auc']:.3f}", "AUC of the weights in finding wrong labels"))
    error = result["hypergradient"]["relative_error_median"]
    if error is not None:
        text = f"{100 * error:.2g} %" if error >= 1e-5 else f"{error:.0e}"
        cards.append((text, "estimated relative error of a hypergradient (median)"))
    inside = "".join(f'<div class="card"><b>{_text(a)}</b><span>{_text(b)}</span></div>' for a, b in cards)
    return f'<div class="cards">{inside}</div>'


def _comparison(result: dict[str, Any]) -> str:
    is_class = result["data"]["task"] == "classification"
    rows = [(row, "") for row in result["methods"]] + [(row, "reference") for row in result["references"]]

    def error(row: dict[str, Any]) -> float:
        return 1 - row["test"]["accuracy"] if is_class else row["test"]["rmse"]

    largest = max(error(row) for row, _ in rows) or 1.0
    name = "accuracy" if is_class else "RMSE"
    lines = []
    for row, kind in rows:
        width = 100 * error(row) / largest
        shown = f"{100 * error(row):.1f} %" if is_class else ""
        style = "tuned" if row["key"] == "tuned" else kind
        lines.append(
            f'<tr class="{style}"><td>{_text(row["label"])}<small>{_text(row["setting"])}</small></td>'
            f"<td>{row['hyperparameters']:,}</td><td>{row['inner_solves']:,}</td>"
            f"<td>{_text(quality(row['validation']))}</td><td>{_text(quality(row['test']))}</td>"
            f'<td class="bar">{shown}<span class="track"><i style="width:{width:.1f}%"></i></span></td>'
            f"<td>{seconds(row['seconds'])}</td></tr>"
        )
    head = (
        f"<tr><th></th><th>hyper&shy;parameters</th><th>inner solves</th><th>validation {name}</th><th>test {name}</th>"
        f"<th>{'test error' if is_class else ''}</th><th>time</th></tr>"
    )
    note = (
        '<p class="note">± is one standard error of the test (or validation) split. The validation column is what '
        "each method chose by; only the test column is a fair comparison. "
        f"{_text(time_line(result), 200)}</p>"
    )
    said = [line for line in (comparison_line(result), reference_line(result)) if line]
    below = "".join(f"<p>{_text(line, 400)}</p>" for line in said)
    return f'<div class="scroll"><table>{head}{"".join(lines)}</table></div>{note}{below}'


def _picture(pictures: dict[str, bytes], name: str, title: str = "") -> str:
    if name not in pictures:
        return ""
    content = base64.b64encode(pictures[name]).decode("ascii")
    # Drawn at 160 dots per inch and shown at 96: sharp on dense screens.
    width = int.from_bytes(pictures[name][16:20], "big") * 96 // 160
    return (
        f'{title}<figure><img width="{width}" alt="{_text(_CAPTIONS[name], 400)}" src="data:image/png;base64,{content}">'
        f"<figcaption>{_text(_CAPTIONS[name], 400)}</figcaption></figure>"
    )


def _weights(result: dict[str, Any], pictures: dict[str, bytes]) -> str:
    if not result["lowest_weights"]:
        return ""
    parts = ["<h2>The learned weights</h2>"]
    if result["label_noise"] is not None:
        parts.append(f"<p>{_text(noise_line(result), 400)}</p>")
    parts.append(_picture(pictures, "weights"))
    if "lowest_weights" in pictures:
        return "".join([*parts, _picture(pictures, "lowest_weights")])
    rows = []
    for example in result["lowest_weights"][:_MAX_ROWS]:
        wrong = ' class="wrong"' if example["wrong"] else ""
        rows.append(
            f"<tr><td>{_text(example['place'])}</td><td{wrong}>{_text(example['given'])}</td>"
            f"<td>{_text(example['predicted'])}</td><td>{example['weight']:.3f}</td></tr>"
        )
    head = f"<tr><th>example</th><th>{_text(result['data']['target'])}, as given</th><th>as predicted</th><th>weight</th></tr>"
    note = "The training examples with the lowest weights: worth a look, they may be mistakes in the data."
    return "".join(
        [
            *parts,
            f'<div class="scroll"><table class="names">{head}{"".join(rows)}</table></div><p class="note">{note}</p>',
        ]
    )


def _method(outcome: Outcome, result: dict[str, Any]) -> str:
    data, hypergradient, steps = result["data"], result["hypergradient"], result["steps"]
    largest, smallest = grid_range(outcome.theta)
    items = [
        f"Three splits with the same mixture of targets, drawn with seed {result['seed']}: {data['train']:,} training, "
        f"{data['validation']:,} validation and {data['test']:,} test rows. Nothing is chosen by the test split.",
        "Training minimises the weighted mean loss plus the penalties. Tuning changes weights and penalties so that the model "
        f"trained with them has a lower validation loss: {steps:,} steps along the hypergradient, the derivative of "
        "that loss through the whole training, by implicit differentiation.",
        f"Each hypergradient comes with an estimate of its error. Median {_number(hypergradient['relative_error_median'])}, "
        f"largest {_number(hypergradient['relative_error_largest'])} of its length; {hypergradient['products']:,} products "
        "with the curvature of the training loss in all.",
        "Many hyperparameters can fit a validation split too closely. So 30 % of it do not enter the hypergradients: they choose the step at which to stop "
        f"({result['chosen_step']:,} of {steps:,} here). The grid search chooses by the whole validation split.",
        f"The grid search had {steps + 1:,} inner solves, as many as the tuned run, over penalties from {largest:g} to "
        f"{smallest:g}, and kept the best.",
    ]
    if data["wrong_labels"] is not None:
        items.append(
            f"{data['wrong_labels']:,} training labels were replaced by a wrong class, drawn evenly. Validation and "
            "test labels are as they came. No method was told which."
        )
    items += data["notes"]
    listed = "".join(f"<li>{_text(item, 2000)}</li>" for item in items)
    repeat = html.escape(printable(command(outcome.plan.options), 1000))
    return f"<ul>{listed}</ul><p>To repeat it: <code>{repeat}</code></p>"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1e}"
