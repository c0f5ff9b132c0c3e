"""The command line: ``python -m simulations run|compare|list|bars``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

EXPERIMENTS = Path(__file__).parent / "experiments"
CONFIGURATION, FAILED, INTERRUPTED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 if it failed, 2 if it was called wrongly."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)


def run(arguments: argparse.Namespace) -> int:
    """Run one experiment."""
    from simulations import config, results, runner, tables

    overrides = list(arguments.set)
    for key, value in (("output", arguments.out), ("data_root", arguments.data_root)):
        if value is not None:
            overrides.append(f"run.{key}={json.dumps(str(value), ensure_ascii=False)}")
    progress = Console(stderr=True, quiet=arguments.quiet)
    try:
        experiment = config.load(arguments.file, overrides)
        result = runner.execute(experiment, progress)
    except (config.ConfigError, runner.OutputError) as error:
        return _fail(str(error), CONFIGURATION)
    except (runner.RunError, results.ResultError) as error:
        return _fail(f"{error} (log: {Path(experiment.run.output) / runner.LOG})", FAILED)
    output = Path(experiment.run.output)
    console = _stdout()
    console.print(tables.summary([(experiment.experiment.name, result)]))
    _list_files(console, runner.written(output))
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Set runs side by side."""
    from simulations import comparison, results, tables

    try:
        runs = comparison.read(arguments.folders)
        files = comparison.write(runs, arguments.out)
    except (results.ResultError, OSError) as error:
        return _fail(str(error), CONFIGURATION)
    console = _stdout()
    console.print(tables.summary(runs))
    _list_files(console, files)
    return 0


def bars(arguments: argparse.Namespace) -> int:
    """Run every row of bars.toml for several seeds and write one table."""
    from simulations import bars, config, results, runner

    progress = Console(stderr=True, quiet=arguments.quiet)
    rows = [row for row in bars.load() if arguments.only in row.name]
    try:
        measured = bars.measure(rows, arguments.seeds, arguments.out, arguments.data_root, progress)
        files = bars.write(bars.table(rows, measured), arguments.out)
    except (config.ConfigError, runner.OutputError) as error:
        return _fail(str(error), CONFIGURATION)
    except (runner.RunError, results.ResultError) as error:
        return _fail(str(error), FAILED)
    print((arguments.out / "bars.md").read_text(encoding="utf-8"))
    _list_files(_stdout(), files)
    return 0


def list_experiments(arguments: argparse.Namespace) -> int:
    """Print the experiments that come with the repository."""
    console = Console()
    for file in sorted(EXPERIMENTS.glob("*.toml")):
        comment = file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        console.print(f"[bold]{file.relative_to(EXPERIMENTS.parents[1])}[/bold]", soft_wrap=True)
        console.print(f"    {comment}", soft_wrap=True, highlight=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m simulations", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("run", help="run an experiment", description=run.__doc__)
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
    one.set_defaults(command=run)

    several = commands.add_parser("compare", help="set runs side by side")
    several.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    several.add_argument("--out", type=Path, default=Path("results/compare"))
    several.set_defaults(command=compare)

    promised = commands.add_parser("bars", help="measure what the project promises")
    promised.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    promised.add_argument("--only", default="", help="rows whose name contains this")
    promised.add_argument("--out", type=Path, default=Path("results/bars"))
    promised.add_argument("--data-root", type=Path, help="folder that holds the data sets")
    promised.add_argument("--quiet", "-q", action="store_true", help="show no progress")
    promised.set_defaults(command=bars)

    listing = commands.add_parser("list", help="list the experiments of this repository")
    listing.set_defaults(command=list_experiments)
    return parser


def _stdout() -> Console:
    """Return a console that does not squeeze its tables into 80 columns of a file or pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _list_files(console: Console, files: Sequence[Path]) -> None:
    for file in files:
        console.print(str(file), style="dim", soft_wrap=True, highlight=False)


def _fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
