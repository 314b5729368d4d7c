"""What a run says in the terminal: one heading, one table, a few lines."""

import contextlib
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from curvax.cli._text import number, printable


class Voice:
    """Speaks on the standard output, or not at all."""

    def __init__(self, quiet: bool, json: bool) -> None:
        """With `json` the standard output belongs to the JSON: progress goes to the standard error only."""
        self._console = None if quiet or json else Console(highlight=False, soft_wrap=True)

    def say(self, text: str, style: str = "") -> None:
        """Print one line; nothing in it is taken as markup."""
        if self._console is not None:
            self._console.print(Text(text, style=style))

    def busy(self, text: str) -> contextlib.AbstractContextManager[Any]:
        """Say on a terminal what is going on, for as long as it does."""
        if self._console is None or not sys.stderr.isatty():
            return contextlib.nullcontext()
        return Console(stderr=True).status(Text(text))

    def show(self, table: Table) -> None:
        """Print a table."""
        if self._console is not None:
            self._console.print(table)


def quality(measures: dict[str, Any] | None) -> str:
    """Accuracy in percent, or root mean square error, with its standard error."""
    if measures is None:
        return "–"
    if "accuracy" in measures:
        return f"{100 * measures['accuracy']:.1f} ± {100 * measures['standard_error']:.1f} %"
    return f"{number(measures['rmse'])} ± {number(measures['standard_error'], 2)}"


def quality_name(result: dict[str, Any]) -> str:
    """What `quality` shows."""
    return "accuracy" if result["data"]["task"] == "classification" else "error (RMSE)"


def seconds(value: float) -> str:
    """A time, with as many digits as it deserves."""
    if value < 0.05:
        return "< 0.1 s"
    return f"{value:.1f} s" if value < 100 else f"{value:.0f} s"


def heading(plan: dict[str, Any]) -> str:
    """One line on data and model."""
    data, sizes = plan["data"], plan["model"]["sizes"]
    wrong = "" if data["wrong_labels"] is None else f" ({data['wrong_labels']:,} labels made wrong)"
    return (
        f"{printable(data['name'])}: {data['train']:,} training{wrong}, {data['validation']:,} validation, "
        f"{data['test']:,} test examples; {plan['model']['name']} on {sizes[0]:,} inputs; "
        f"tuned: {', '.join(plan['groups'])}"
    )


def table(result: dict[str, Any]) -> Table:
    """The comparison.

    Args:
        result: Content of `result.json`.

    Returns:
        A rich table.
    """
    name = "accuracy" if result["data"]["task"] == "classification" else "RMSE"
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("", no_wrap=True)
    for title in ("hyper-\nparameters", "inner\nsolves", f"validation\n{name}", f"test\n{name}", "\ntime"):
        shown.add_column(title, justify="right", no_wrap=True)
    groups = [(result["methods"], ""), (result["references"], "dim")]
    for rows, style in groups:
        for row in rows:
            cells = (
                row["label"],
                f"{row['hyperparameters']:,}",
                f"{row['inner_solves']:,}",
                quality(row["validation"]),
                quality(row["test"]),
                seconds(row["seconds"]),
            )
            shown.add_row(*map(Text, cells), style="bold" if row["key"] == "tuned" else style)
        if rows and not style and result["references"]:
            shown.add_section()
    return shown


def reference_line(result: dict[str, Any]) -> str | None:
    """What the last rows of the table are."""
    if not result["references"]:
        return None
    return (
        "The last two rows are no competitors: 'clean rows only' trains without the wrong labels, 'validation only' "
        "trains on the validation split instead of the training split."
    )


def comparison_line(result: dict[str, Any]) -> str | None:
    """The tuned model and that of the grid search, test example by test example."""
    pairs = result["tuned_against_grid"]
    if pairs is None:
        return None
    return (
        f"Of {result['data']['test']:,} test examples, {pairs['better']:,} are right by the tuned model and wrong by "
        f"the grid search, {pairs['worse']:,} the other way round."
    )


def time_line(result: dict[str, Any]) -> str:
    """What the times of the table are."""
    since = ", for the tuned model that since it was resumed" if result["resumed"] else ""
    return f"Times are those that each method takes on its own, compilation included{since}."


def noise_line(result: dict[str, Any]) -> str:
    """How well the weights find the wrong labels."""
    noise = result["label_noise"]
    return (
        f"The learned weights find the wrong labels with AUC {noise['auc']:.3f}: of the {noise['wrong_labels']:,} "
        f"lowest weights {noise['found_among_as_many']:,} belong to wrong labels."
    )


def findings(result: dict[str, Any]) -> list[str]:
    """The lines below the table."""
    hypergradient = result["hypergradient"]
    error = None
    if hypergradient["relative_error_median"] is not None:
        error = (
            "Relative error of the hypergradients, as estimated: median "
            f"{hypergradient['relative_error_median']:.1e}, largest {hypergradient['relative_error_largest']:.1e}."
        )
    noise = None if result["label_noise"] is None else noise_line(result)
    lines = [comparison_line(result), noise, error, time_line(result), reference_line(result)]
    lines += _overfitting(result)
    return [line for line in lines if line is not None]


def stopped_line(result: dict[str, Any]) -> str:
    """Why the run ended before its last step."""
    return f"Tuning stopped after step {result['steps']:,} of {result['steps_asked']:,}: {result['stopped']}"


def warnings(result: dict[str, Any]) -> list[str]:
    """What a reader should not miss."""
    stopped = [] if result["stopped"] is None else [stopped_line(result)]
    return stopped + _overfitting(result)


def _overfitting(result: dict[str, Any]) -> list[str]:
    """A note if tuning did not help the test split."""
    rows = {row["key"]: row["test"] for row in result["methods"]}
    if result["chosen_step"] == 0:
        return [
            "Note: no step was better than the start on the validation rows kept for stopping: tuned is untuned here."
        ]
    worse = [row["label"] for row in result["methods"][:2] if _gain(rows[row["key"]], rows["tuned"]) < 0]
    if not worse:
        return []
    return [
        f"Note: on the test split the tuned model is behind {' and '.join(worse)}. Within its standard error that is "
        "chance; beyond it, the hyperparameters were fitted to the validation split: tune fewer groups (--tune), "
        "or give it more rows (--split)."
    ]


def _gain(first: dict[str, Any], last: dict[str, Any]) -> float:
    """How much better the last is, in its own units."""
    if "accuracy" in first:
        return last["accuracy"] - first["accuracy"]
    return first["rmse"] - last["rmse"]
