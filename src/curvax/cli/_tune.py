"""`curvax tune`: load, compare, tune, report."""

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np
import optimistix as optx

import curvax as cx
from curvax._results import describe
from curvax.cli import _baselines, _console, _folder, _model, _plan, _result
from curvax.cli import _hyperparameters as hyper
from curvax.cli._errors import TuningError, UsageError
from curvax.cli._interrupt import Interrupt
from curvax.cli._keeper import Keeper
from curvax.cli._measures import compare
from curvax.cli._options import Options
from curvax.cli._text import quoted

# Loose for the convex models, since the rule's own correction sweeps take over from there. The loss of an mlp is
# flat in many directions: a loose solve stops where its curvature is not yet that of a minimum.
TOLERANCE, MLP_TOLERANCE = 1e-4, 1e-7
# Relative accuracy asked of the hypergradient.
ACCURACY = 1e-2


def tune(options: Options, resume: str | None, given: frozenset[str]) -> None:
    """Run the command.

    Args:
        options: The options, or those to be laid over the run that is resumed.
        resume: Folder of a run to go on with.
        given: Names of the options that were given.

    Raises:
        UsageError: If options or data cannot be used.
        TuningError: If the numerics gave up; what was reached is in the report.
        KeyboardInterrupt: On Ctrl-C, with a text that says how to go on.
    """
    # An application of its own: double precision costs little at this size, and makes the error estimates sharp.
    jax.config.update("jax_enable_x64", True)
    if resume is not None:
        folder, kept, digest = _folder.reopen(resume)
        changes = {name: getattr(options, name) for name in ("steps", "quiet", "json") if name in given}
        options = dataclasses.replace(kept, **changes)
    plan = _plan.make(options)
    if resume is None:
        folder = _folder.create(options, plan.data.digest)
    elif digest != plan.data.digest:
        raise UsageError(
            f"{quoted(plan.data.name)} has changed since the run in {quoted(resume)}: start a new one"
        )
    try:
        with Interrupt() as interrupt:
            _run(plan, folder, interrupt, resumed=resume is not None)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Go on with: curvax tune --resume {folder}") from None


def _run(plan: _plan.Plan, folder: pathlib.Path, interrupt: Interrupt, *, resumed: bool) -> None:
    options, voice = plan.options, _console.Voice(plan.options.quiet, plan.options.json)
    voice.say(_console.heading(_plan.describe(plan)), style="bold")
    for note in plan.data.notes:
        voice.say(note, style="dim")
    outcome = _compute(plan, folder, voice, interrupt, resumed)
    result = _result.as_dict(outcome)
    _write(folder, outcome, result)
    voice.show(_console.table(result))
    for line in _console.findings(result):
        voice.say(line)
    report = folder / "report.html"
    if options.json:
        print(json.dumps(result, indent=1, allow_nan=False))
    elif options.quiet:
        print(report)
    voice.say(f"Report: {report}")
    if outcome.stopped is not None:
        raise TuningError(f"{_console.stopped_line(result)} The report shows what was reached.")


def _compute(
    plan: _plan.Plan, folder: pathlib.Path, voice: _console.Voice, interrupt: Interrupt, resumed: bool
) -> _result.Outcome:
    """Baselines, tuning, final training."""
    options = plan.options
    theta0 = _model.init(plan.sizes, options.seed)
    batches = plan.batches(theta0)
    tolerance = MLP_TOLERANCE if plan.model == "mlp" else TOLERANCE
    solver: Any = optx.LBFGS(rtol=tolerance, atol=tolerance)
    trainer = _baselines.Trainer(solver, plan.scale, interrupt.check)
    num_solves = options.steps + 1  # as many as the tuned run makes
    with voice.busy(f"for comparison: the untuned model and a grid search with {num_solves:,} inner solves"):
        rows = [
            _baselines.untuned(trainer, theta0, batches),
            _baselines.grid(trainer, theta0, batches, num_solves),
        ]
        references = []
        if plan.data.corrupted is not None:
            references = _baselines.references(trainer, theta0, batches, plan.data.corrupted, num_solves)

    begin = time.perf_counter()
    phi0 = hyper.start(plan.groups, len(plan.data.train), len(plan.data.classes), theta0)
    keeper = Keeper(folder, batches["stopping"], (phi0, theta0), interrupt.check)
    solution = cx.minimise(
        _model.problem(),
        phi0,
        theta0,
        inner_solver=solver,
        rule=cx.Implicit(rtol=ACCURACY),
        optimizer=hyper.optimizer(plan.groups),
        num_steps=options.steps,
        inner_data=batches["train"],
        outer_data=batches["tuning"],
        callbacks=[cx.Every(1, keeper)],
        checkpoint=cx.Checkpoint(folder / _folder.CHECKPOINT, every_seconds=10.0),
        progress=False if options.quiet or options.json else None,
        throw=False,
    )
    if len(solution.history) == 0:
        raise TuningError(f"no hypergradient could be had at the start: {describe(solution.result)}")
    seconds = time.perf_counter() - begin
    total = sum(hyper.count(phi0).values())
    step, phi, theta = keeper.best()
    rows.append(
        _baselines.Row(
            key="tuned",
            label="tuned",
            num_hyperparameters=total,
            num_solves=num_solves,
            seconds=seconds,
            validation=trainer.measure(theta, batches["validation"]),
            test=trainer.measure(theta, batches["test"]),
            setting=", ".join(plan.groups),
            theta=theta,
        )
    )
    history = {
        f.name: np.asarray(getattr(solution.history, f.name)) for f in dataclasses.fields(solution.history)
    }
    test = batches["test"]
    pairs = compare(trainer.outputs(theta, test), trainer.outputs(rows[1].theta, test), np.asarray(test["y"]))
    return _result.Outcome(
        plan=plan,
        rows=rows,
        references=references,
        against_grid=pairs,
        phi=phi,
        theta=theta,
        outputs=trainer.outputs(theta, batches["train"]),
        history=history,
        stopping=keeper.losses,
        step=step,
        stopped=None if solution.result == cx.RESULTS.successful else describe(solution.result),
        resumed=resumed,
    )


def _write(folder: pathlib.Path, outcome: _result.Outcome, result: dict[str, Any]) -> None:
    """The files of the report."""
    from curvax.cli import _figures, _report  # Matplotlib: only when there is something to draw

    _folder.write_json(folder / "result.json", result)
    _folder.write_json(folder / "hyperparameters.json", _result.hyperparameters_json(outcome))
    _folder.write_npz(folder / "hyperparameters.npz", _result.hyperparameters_arrays(outcome))
    pictures = _figures.draw(outcome, result)
    for name, content in pictures.items():
        _folder.write_bytes(folder / f"{name}.png", content)
    html = _report.render(outcome, result, pictures)
    _folder.write_bytes(folder / "report.html", html.encode("utf-8"))
