"""Run every benchmark, each in a fresh process, and collect the figures.

    python benchmarks/run.py                     all
    python benchmarks/run.py hypergradient_cold  some, by file name
    python benchmarks/run.py --out DIR           where figures.json and figures.md go (default reports/benchmarks)
    python benchmarks/run.py --docs              also put the tables into docs/benchmarks.md

The exit code is 1 if a benchmark fails to run or a claim does not hold.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def names() -> list[str]:
    """Every file beside this one that defines `measure`."""
    found = [
        p.stem
        for p in sorted(HERE.glob("*.py"))
        if re.search(r"^def measure\(", p.read_text(encoding="utf-8"), re.M)
    ]
    return found


def run(name: str) -> dict[str, Any] | None:
    """Figures of one benchmark, None if it did not get that far."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "figures.json"
        command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(target)]
        subprocess.run(command, env=environment, check=False)
        return json.loads(target.read_text(encoding="utf-8")) if target.exists() else None


def markdown(figures: dict[str, dict[str, Any]]) -> str:
    """All figures as Markdown, with the machine once."""
    machine = next(iter(figures.values()))["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    parts = [
        f"Machine: {machine['cores']} cores, {machine['architecture']}, {machine['system']}, {machine['device']}; "
        f"Python {machine['python']}, {versions}. `OPENBLAS_NUM_THREADS=1`. Medians of calls in turns."
    ]
    for name, report in figures.items():
        claims = [harness.Claim(**claim) for claim in report["claims"]]
        parts += [
            f"## {report['title']}",
            f"`benchmarks/{name}.py` — {report['setting']}",
            harness.table(report["rows"]),
            harness.claims_table(claims),
        ]
    return "\n\n".join(parts) + "\n"


def sections(text: str) -> dict[str, str]:
    """The parts of figures in Markdown by the name of their benchmark; what stands before them by ""."""
    first, *others = re.split(r"^(?=## )", text.strip() + "\n", flags=re.M)
    return {"": first} | {re.search(r"`benchmarks/(\w+)\.py`", part)[1]: part for part in others}


def into_page(text: str) -> None:
    """Put the figures between the marks of docs/benchmarks.md; those of other benchmarks stay."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    old, _, after = rest.partition(END)
    merged = sections(old) | sections(text)
    parts = [merged.pop(""), *(merged[name] for name in sorted(merged))]
    figures = "\n\n".join(part.strip() for part in parts)
    PAGE.write_text(f"{before}{BEGIN}\n\n{figures}\n\n{END}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="benchmarks to run; all by default")
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks"), help="folder for the figures")
    parser.add_argument("--docs", action="store_true", help="also put the tables into docs/benchmarks.md")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(names())
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    figures, broken = {}, []
    for name in arguments.names or names():
        print(f"\n=== {name}", flush=True)
        report = run(name)
        if report is None:
            broken.append(name)
        else:
            figures[name] = report
    if figures:
        arguments.out.mkdir(parents=True, exist_ok=True)
        text = markdown(figures)
        (arguments.out / "figures.json").write_text(
            json.dumps(figures, indent=1, ensure_ascii=False), encoding="utf-8"
        )
        (arguments.out / "figures.md").write_text(text, encoding="utf-8")
        if arguments.docs:
            into_page(text)
    print("\n=== summary")
    for name, report in figures.items():
        for claim in report["claims"]:
            holds = "holds" if harness.Claim(**claim).holds else "FAILS"
            print(f"{holds}  {name}: {claim['text']}: {claim['value']:.3g} ({harness.Claim(**claim).bound})")
    for name in broken:
        print(f"BROKEN {name}")
    return 0 if figures and not broken and all(report["holds"] for report in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
