"""The command line: ``python -m deployment local|containers FILE.toml``."""

from __future__ import annotations

import argparse
import functools
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console

from deployment.containers import run_in_containers
from deployment.local import run_locally
from simulations import config, results, runner, tables
from simulations.config import Experiment

FAILED, CONFIGURATION, INTERRUPTED = 1, 2, 130

Engine = Callable[[Experiment, Path, Console], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 if it failed, 2 if it was called wrongly."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)  # so that everything is ended, as on Ctrl-C
    try:
        return run(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)


def run(arguments: argparse.Namespace) -> int:
    """Deploy, run an experiment, write what a simulation of it writes, and end everything."""
    overrides = [*arguments.set, 'experiment.engine="flower"']
    for key, value in (("output", arguments.out), ("data_root", arguments.data_root)):
        if value is not None:
            overrides.append(f"run.{key}={json.dumps(str(value), ensure_ascii=False)}")
    console = Console(stderr=True, quiet=arguments.quiet)
    try:
        experiment = config.load(arguments.file, overrides)
        engine = functools.partial(arguments.engine, console=console)
        result = runner.execute(experiment, console, engine)
    except (config.ConfigError, runner.OutputError) as error:
        return _fail(str(error), CONFIGURATION)
    except (runner.RunError, results.ResultError) as error:
        return _fail(f"{error} (logs: {experiment.run.output})", FAILED)
    printed = Console(width=None if sys.stdout.isatty() else 120)
    printed.print(tables.summary([(experiment.experiment.name, result)]))
    for file in runner.written(Path(experiment.run.output)):
        printed.print(str(file), style="dim", soft_wrap=True, highlight=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deployment", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    engines: dict[str, tuple[Engine, str]] = {
        "local": (run_locally, "as processes on 127.0.0.1"),
        "containers": (run_in_containers, "in containers, by docker-compose"),
    }
    for name, (engine, text) in engines.items():
        one = commands.add_parser(name, help=text, description=run.__doc__)
        one.add_argument("file", type=Path, metavar="FILE.toml")
        one.add_argument(
            *("--set", "-s"),
            action="append",
            default=[],
            metavar="SECTION.KEY=VALUE",
            help="override a value of the file, written as in TOML; may be repeated",
        )
        one.add_argument("--out", type=Path, help="output folder (default: results/NAME)")
        one.add_argument("--data-root", type=Path, help="folder that holds the data sets")
        one.add_argument("--quiet", "-q", action="store_true", help="show no progress")
        one.set_defaults(engine=engine)
    return parser


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
