"""The command line: ``python -m benchmarks NAME``, or ``all`` for what tells the costs."""

from __future__ import annotations

import os

# Before numpy and torch are loaded. Processes that are started later inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path("results/bench")
COSTS = ("report", "detect", "round")  # what "all" runs


def main(argv: Sequence[str] | None = None) -> int:
    """Run benchmarks; a missed bar is shown, and is not an error."""
    arguments = _parser().parse_args(argv)
    from benchmarks import central, detection, privacy, probes, reports, rounds, stealth

    benchmarks = {
        "report": lambda: reports.run(arguments.data_root),
        "detect": lambda: detection.run(arguments.clients),
        "round": lambda: rounds.run(arguments.data_root),
        "central": central.run,
        "probes": lambda: probes.run(
            arguments.data_root, arguments.costs or probes.COSTS, overrides=arguments.overrides
        ),
        "stealth": lambda: stealth.run(arguments.data_root, arguments.penalties),
        "exposure": lambda: privacy.expose(arguments.run, arguments.data_root),
        "privacy": lambda: privacy.run(
            arguments.run,
            arguments.rounds,
            arguments.noises,
            arguments.delta,
            arguments.seeds,
            arguments.data_root,
        ),
    }
    alone = arguments.name != "all"
    for name in [arguments.name] if alone else COSTS:
        outcome = benchmarks[name]()
        outcome.show()
        out: Path = arguments.out or RESULTS
        print(outcome.write(out if out.suffix == ".json" and alone else out / f"{name}.json"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "name",
        choices=(*COSTS, "central", "probes", "stealth", "privacy", "exposure", "all"),
        help="report: building a report against a bare forward pass; detect: reading reports and "
        "detection on one core; round: a defended round against plain federated averaging; "
        "all: these three; central: the published neuron test "
        "against a loop over channels; probes: how well trigger inversion sees for its cost; "
        "stealth: how near to honest updates the attack `adaptive` stays; "
        "privacy: what `mixture` still finds in noisy reports; exposure: what a report can say",
    )
    parser.add_argument("--data-root", type=Path, help="folder that holds the data sets")
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[10, 100, 1000], help="for detect"
    )
    parser.add_argument(
        "--penalties", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0], help="for stealth"
    )
    probing = parser.add_argument_group("for probes")
    probing.add_argument(
        "--costs", type=_cost, nargs="+", metavar="STEPSxIMAGES", help="default: through 30x8"
    )
    probing.add_argument(
        *("--set", "-s"),
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a value of the experiment, written as in TOML; may be repeated",
    )
    replay = parser.add_argument_group("for privacy and exposure")
    replay.add_argument(
        "--run", type=Path, default=Path("results/undefended"), help="a run with its checkpoints"
    )
    replay.add_argument("--rounds", type=int, nargs="+", default=[15, 30])
    replay.add_argument("--noises", type=float, nargs="+", default=[0.0, 0.1, 0.3, 1.0, 3.0])
    replay.add_argument("--delta", type=float, default=1e-5)
    replay.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, help="folder, or a .json file (default: results/bench/NAME.json)"
    )
    return parser


def _cost(text: str) -> tuple[int, int]:
    """Read the steps and images of a probe: 30x8."""
    steps, _, images = text.partition("x")
    if not (steps.isdecimal() and images.isdecimal() and int(steps) and int(images)):
        raise argparse.ArgumentTypeError(f"{text} is not STEPSxIMAGES, such as 30x8")
    return int(steps), int(images)


if __name__ == "__main__":
    sys.exit(main())
