"""``make scaling``: what sharing a conversion brings. Rewrites the tables of docs/scaling.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import loftq_cli
from loftq_cli.checkpoint.request import Request
from loftq_cli.conversion.jobs import jobs
from loftq_cli.conversion.prepare import prepare
from loftq_cli.machine.observer import Observer
from loftq_cli.planning.plan import Plan
from loftq_cli.settings.options import Options
from tests.benchmarks.scaling import measure, shapes
from tests.benchmarks.scaling.costs import SETTINGS, Costs
from tests.benchmarks.scaling.costs import measure as measure_costs
from tests.benchmarks.scaling.simulate import load, simulate

PAGE = Path(loftq_cli.__file__).parents[1] / "docs/scaling.md"
DEVICES = (1, 8, 64, 512)
BANDWIDTHS = (2, 10, 50)  # GB a second


def planned(directory: Path, name: str) -> Plan:
    """The converter's plan of a model of which there are headers only."""
    model = directory / name
    if not (model / "model.safetensors.index.json").exists():
        shapes.write(model, shapes.MODELS[name])
    options = Options(**SETTINGS, threads=1, layout="loftq")
    return prepare(Request(str(model)), directory / "out", options, observer=Observer())[0]


def simulated(plans: dict[str, Plan], costs: Costs) -> Iterator[str]:
    """The simulation with these costs, as lines of a table."""
    yield f"A device is {costs.device}; {costs.byte * 1e9:.2f} ns to hash a byte on a CPU:"
    yield ""
    yield (
        "| model | GB/s | "
        + " | ".join(f"{count} devices" for count in DEVICES)
        + " | most waits for |"
    )
    yield "| --- | --- |" + " --- |" * (len(DEVICES) + 1)
    for name, plan in plans.items():
        found = jobs(plan)
        loads = {id(job): load(plan, job, costs) for job in found}
        for bandwidth in BANDWIDTHS:
            cells, limits = [], []
            alone = None
            for count in DEVICES:
                outcome = simulate(found, loads, count, bandwidth * 1e9, costs.byte)
                alone = alone or outcome.seconds
                efficiency = alone / outcome.seconds / count
                cells.append(f"{shown(outcome.seconds)} ({efficiency:.0%})")
                limits.append(outcome.limit)
            where = "; ".join(
                f"{count}: {limit}"
                for (count, limit), before in zip(
                    zip(DEVICES, limits, strict=True), [None, *limits], strict=False
                )
                if limit != before
            )
            yield f"| {name} | {bandwidth} | {' | '.join(cells)} | {where} |"


def shown(seconds: float) -> str:
    """In hours, minutes or seconds."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def fill(marker: str, lines: list[str]) -> None:
    """Put ``lines`` between the two comments of that name in the page."""
    text = PAGE.read_text("utf-8")
    begin, end = f"<!-- {marker} -->\n", f"<!-- /{marker} -->\n"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    PAGE.write_text(head + begin + "\n" + "\n".join(lines) + "\n\n" + end + tail, "utf-8")


def main() -> None:
    """Measure, simulate, and fill the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="for checkpoints and costs")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--costs", type=Path, help="of a device, as this script writes them")
    parser.add_argument("--faster", type=float, default=100.0)
    parser.add_argument("--only", choices=("measured", "simulated"))
    parser.add_argument("--print", action="store_true", help="leave the page as it is")
    given = parser.parse_args()
    given.directory.mkdir(parents=True, exist_ok=True)

    def tell(marker: str, lines: list[str]) -> None:
        sys.stdout.write("\n".join(lines) + "\n")
        if not given.print:
            fill(marker, lines)

    if given.only != "simulated":
        tell("measured", list(measure.table(given.directory, given.layers, given.hidden)))
    if given.only != "measured":
        plans = {name: planned(given.directory / "shapes", name) for name in shapes.MODELS}
        costs = costs_of(given.costs or given.directory / "costs.json", plans)
        lines = [*simulated(plans, costs)]
        if given.costs is None:
            lines += ["", *simulated(plans, costs.faster(given.faster))]
        tell("simulated", lines)


def costs_of(path: Path, plans: dict[str, Plan]) -> Costs:
    """What is at ``path``, or what is measured now and left there."""
    if not path.exists():
        sides = {
            (item.matrix.shape[0], item.matrix.shape[1])
            for plan in plans.values()
            for item in plan.matrices.values()
        }
        measure_costs(sides).write(path)
    return Costs.read(path)


if __name__ == "__main__":
    main()
