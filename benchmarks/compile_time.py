"""Claim: one hypergradient compiles no slower than jaxopt's and Optimistix's.

The peers give no error estimate, so the claim is about ours without one (`rtol=None`); what the estimate adds to
the compile time stands beside it, with bounds of our own. A third of that is the recycling of directions
(`recycle=0` saves it), which pays from the second call on.

Tracing, lowering and compiling the first call, each in a fresh process without a persistent cache, in turns.
"""

import json
import statistics
import subprocess
import sys
import time

import contenders
import harness
import jax
import problems

REPEATS = 9
ESTIMATING = "Curvax with error estimate"
LIBRARIES = {
    "Curvax": contenders.curvax_plain,
    ESTIMATING: contenders.curvax,
    **{name: contenders.CONTENDERS[name] for name in ("Optimistix", "jaxopt")},
}


def one(name: str) -> float:
    """Seconds that `name` takes to trace, lower and compile in this process."""
    training, validation = problems.digits()
    phi, weights = problems.start()
    start = time.perf_counter()
    contenders.compiled(LIBRARIES[name], phi, weights, training, validation)
    return time.perf_counter() - start


def in_fresh_process(name: str) -> float:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--one", name]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def measure() -> harness.Report:
    times: dict[str, list[float]] = {name: [] for name in LIBRARIES}
    for turn in range(REPEATS):
        names = list(times) if turn % 2 == 0 else list(times)[::-1]
        for name in names:
            times[name].append(in_fresh_process(name))
    rows = [
        {"library": name, "compile s (median)": statistics.median(t), "least": min(t), "most": max(t)}
        for name, t in times.items()
    ]
    return harness.Report(
        "Compile time of one hypergradient",
        contenders.setting(),
        rows,
        [
            harness.Claim(f"Curvax ÷ {peer}", harness.ratio(times["Curvax"], times[peer]), at_most=1.0)
            for peer in ("Optimistix", "jaxopt")
        ]
        + [
            harness.Claim(
                "Curvax with error estimate ÷ jaxopt",
                harness.ratio(times[ESTIMATING], times["jaxopt"]),
                at_most=1.75,
            ),
            harness.Claim(
                "Curvax with error estimate ÷ Optimistix",
                harness.ratio(times[ESTIMATING], times["Optimistix"]),
                at_most=2.5,
            ),
        ],
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2])))
    else:
        harness.main(measure)
