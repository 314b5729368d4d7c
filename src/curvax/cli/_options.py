"""What can be asked of `curvax tune`, as text on the command line and as one frozen object."""

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from curvax.cli._errors import UsageError
from curvax.cli._text import printable

MODELS = ("logistic", "ridge", "mlp")
TASKS = ("classification", "regression")
GROUPS = ("sample-weights", "class-weights", "l2", "l2-per-feature", "l2-per-layer", "l2-per-weight")
BUNDLED = ("digits", "wine", "breast_cancer", "diabetes")

_EPILOG = """\
examples:
  curvax tune digits                   bundled, 30 % of the labels made wrong
  curvax tune data.csv --target price  a table of your own, with a header line
  curvax tune data.csv --target kind --model mlp --tune sample-weights,l2
  curvax tune --resume reports/data    go on after Ctrl-C or a crash

groups for --tune (any number of them, separated by commas):
  sample-weights   one weight for each training example: wrong labels and
                   outliers get low ones
  class-weights    one weight for each class (classification)
  l2               one L2 penalty for all weights of the model
  l2-per-feature   one L2 penalty for each input
  l2-per-layer     one L2 penalty for each layer (--model mlp)
  l2-per-weight    one L2 penalty for each weight of the model

exit codes:
  0 done, 1 the tuning failed, 2 wrong use or unusable data,
  130 interrupted (--resume goes on)
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """One run, completely: the same options and data give the same numbers.

    `None` means "decided from the data"; `quiet` and `json` change what is printed, nothing else.
    """

    data: str
    target: str | None = None
    task: str | None = None
    model: str | None = None
    tune: tuple[str, ...] | None = None
    steps: int = 40
    seed: int = 0
    split: tuple[int, int, int] = (60, 20, 20)
    corrupt: float | None = None
    drop: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    hidden: int | None = None
    out: str | None = None
    overwrite: bool = False
    quiet: bool = False
    json: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain values for `run.json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Options":
        """The options written by `as_json`; `UsageError` if they are not."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if set(values) != fields:
            raise UsageError("the options in run.json are not those of this version of curvax")
        lists = ("tune", "split", "drop", "categorical")
        known: dict[str, Any] = {
            k: tuple(v) if k in lists and v is not None else v for k, v in values.items()
        }
        return cls(**known)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage and the line."""
        raise UsageError(f"{printable(message, 300)} (see {self.prog} --help)")


def _integer(low: int, high: int, meaning: str) -> Any:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {meaning} from {low} to {high}")
        return value

    return convert


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 0.9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction from 0 to 0.9")
    return value


def _split(text: str) -> tuple[int, ...]:
    parts = text.split("/")
    if len(parts) != 3 or not all(part.isdigit() and len(part) < 4 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 60/20/20 (train/validation/test)")
    values = tuple(int(part) for part in parts)
    if sum(values) != 100 or min(values) < 5:
        raise argparse.ArgumentTypeError(f"{text!r} does not give each split 5 or more and 100 in all")
    return values


def _groups(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in GROUPS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(GROUPS)}")
    if len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names a group twice")
    return tuple(name for name in GROUPS if name in names)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    from importlib.metadata import version

    top = _Parser(prog="curvax", description="Second derivatives put to work in JAX.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"curvax {version('curvax')}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    tune = commands.add_parser(
        "tune",
        help="tune any number of hyperparameters of a model by hypergradient",
        description="Tune hyperparameters of a model by hypergradient on a validation split, compare\n"
        "on a test split with the untuned model and with a grid search that has as many\n"
        "inner solves, and write a report.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # so that --resume can tell what was given
    )
    add = tune.add_argument
    add(
        "data",
        nargs="?",
        metavar="DATA",
        help=f"a CSV or TSV file with a header line, or one of the bundled: {', '.join(BUNDLED)}",
    )
    add("--target", metavar="COLUMN", help="column to be predicted (needed for a file)")
    add("--task", choices=TASKS, help="what the target is (default: judged by its values)")
    add(
        "--model",
        choices=MODELS,
        help="what is trained (default: logistic for classification, ridge for regression)",
    )
    add(
        "--tune",
        type=_groups,
        metavar="GROUPS",
        help="what is tuned, see below (default: l2-per-feature; also sample-weights if there are 200 validation "
        "rows or more, or labels made wrong)",
    )
    add(
        "--steps",
        type=_integer(1, 100_000, "a number"),
        metavar="N",
        help="outer steps: changes of the hyperparameters (default 40)",
    )
    add(
        "--seed",
        type=_integer(0, 2**32 - 1, "a number"),
        metavar="N",
        help="of the splits, --corrupt and the start (default 0)",
    )
    add("--split", type=_split, metavar="A/B/C", help="train/validation/test in percent (default 60/20/20)")
    add("--corrupt", type=_fraction, metavar="F", help="make this fraction of the training labels wrong, to see "
        "whether they are found: 0 to 0.9 (default 0.3 for digits, else 0)")  # fmt: skip
    add("--drop", action="append", metavar="COLUMN", help="leave a column out (repeatable)")
    add(
        "--categorical",
        action="append",
        metavar="COLUMN",
        help="take the numbers of a column as categories (repeatable)",
    )
    add(
        "--hidden",
        type=_integer(1, 4096, "a number"),
        metavar="N",
        help="hidden units of --model mlp (default 16)",
    )
    add("--out", metavar="DIR", help="report folder, new or empty (default: a fresh one in reports/)")
    add("--overwrite", action="store_true", help="let --out replace an earlier report")
    add("--resume", metavar="DIR", help="go on with the run in this report folder and with its options; "
        "only --steps, --quiet and --json may be given again")  # fmt: skip
    add("--quiet", action="store_true", help="print nothing but the place of the report")
    add("--json", action="store_true", help="print result.json instead of the table")
    return top


def parse(argv: Sequence[str] | None) -> tuple[Options, str | None, frozenset[str]]:
    """Options, the folder to resume (its own options then count), and the names that were given.

    Raises:
        UsageError: If the arguments cannot be understood or do not go together.
    """
    given = vars(parser().parse_args(argv))
    given.pop("command")
    resume = given.pop("resume", None)
    if given.get("data") is None:
        given.pop("data", None)
    names = frozenset(given)
    if resume is not None:
        wrong = sorted(names - {"steps", "quiet", "json"})
        if wrong:
            shown = "DATA" if wrong[0] == "data" else f"--{wrong[0]}"
            raise UsageError(f"--resume goes on with the options of that run: leave {shown} out")
        return Options(data="", **given), resume, names
    if "data" not in names:
        raise UsageError(f"name a CSV file, or one of {', '.join(BUNDLED)} (see curvax tune --help)")
    for name in ("drop", "categorical"):
        if name in given:
            given[name] = tuple(given[name])
    options = Options(**given)
    _check(options)
    return options, None, names


def _check(options: Options) -> None:
    """Refuse what contradicts itself before any data is read."""
    bundled = options.data in BUNDLED
    if bundled and (options.target is not None or options.drop or options.categorical):
        raise UsageError(
            f"{options.data} is a bundled data set: --target, --drop and --categorical are for files"
        )
    if not bundled and options.target is None:
        close = difflib.get_close_matches(options.data, BUNDLED, n=1)
        hint = f" (did you mean the bundled {close[0]!r}?)" if close else ""
        raise UsageError(f"--target is missing: name the column to be predicted{hint}")
    if options.target is not None and options.target in options.drop:
        raise UsageError(f"--drop names the target {options.target!r}")
    if options.target is not None and options.target in options.categorical:
        raise UsageError(f"--categorical names the target {options.target!r}: take --task classification")
    if options.overwrite and options.out is None:
        raise UsageError("--overwrite needs --out (without --out a fresh folder is made)")
    if options.hidden is not None and options.model != "mlp":
        raise UsageError("--hidden is for --model mlp")
    if options.model == "logistic" and options.task == "regression":
        raise UsageError("--model logistic is for classification; for regression take ridge or mlp")
    if options.model == "ridge" and options.task == "classification":
        raise UsageError("--model ridge is for regression; for classification take logistic or mlp")
    groups = options.tune or ()
    if "l2-per-layer" in groups and options.model != "mlp":
        raise UsageError("--tune l2-per-layer is for --model mlp: the other models have one layer, take l2")
    if "class-weights" in groups and (options.task == "regression" or options.model == "ridge"):
        raise UsageError("--tune class-weights is for classification")
    if options.corrupt and options.task == "regression":
        raise UsageError("--corrupt is for classification")
