"""The command line: ``python -m deployment local|containers FILE.toml``."""

from __future__ import annotations

import argparse
import functools
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console

from deployment.containers import run_in_containers
from deployment.local import run_locally
from simulations import config, options, results, runner, tables
from simulations.config import Experiment
from simulations.options import CONFIGURATION, FAILED, INTERRUPTED, fail

Engine = Callable[[Experiment, Path, Console], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 if it failed, 2 if it was called wrongly."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)  # so that everything is ended, as on Ctrl-C
    try:
        return run(arguments)
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)


def run(arguments: argparse.Namespace) -> int:
    """Deploy, run an experiment, write what a simulation of it writes, and end everything."""
    overrides = [*options.overrides(arguments), 'experiment.engine="flower"']
    console = Console(stderr=True, quiet=arguments.quiet)
    try:
        experiment = config.load(arguments.file, overrides)
        engine = functools.partial(arguments.engine, console=console)
        result = runner.execute(experiment, console, engine)
    except (config.ConfigError, runner.OutputError) as error:
        return fail(str(error), CONFIGURATION)
    except (runner.RunError, results.ResultError) as error:
        return fail(f"{error} (logs: {experiment.run.output})", FAILED)
    printed = options.stdout()
    printed.print(tables.summary([(experiment.experiment.name, result)]))
    options.list_files(printed, runner.written(Path(experiment.run.output)))
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
        options.add_run_options(one)
        one.set_defaults(engine=engine)
    return parser


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
