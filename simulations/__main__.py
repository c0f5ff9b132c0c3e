"""The command line: ``python -m simulations run|compare|matrix|list``."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from simulations import options
from simulations.options import CONFIGURATION, FAILED, INTERRUPTED, fail

if TYPE_CHECKING:
    from simulations import matrix as matrices

EXPERIMENTS = Path(__file__).parent / "experiments"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 if it failed, 2 if it was called wrongly."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)


def run(arguments: argparse.Namespace) -> int:
    """Run one experiment."""
    from simulations import config, results, runner, tables

    progress = Console(stderr=True, quiet=arguments.quiet)
    try:
        experiment = config.load(arguments.file, options.overrides(arguments))
        result = runner.execute(experiment, progress)
    except (config.ConfigError, runner.OutputError) as error:
        return fail(str(error), CONFIGURATION)
    except (runner.RunError, results.ResultError) as error:
        return fail(f"{error} (log: {Path(experiment.run.output) / runner.LOG})", FAILED)
    output = Path(experiment.run.output)
    console = options.stdout()
    console.print(tables.summary([(experiment.experiment.name, result)]))
    options.list_files(console, runner.written(output))
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Set runs side by side."""
    from simulations import comparison, results, tables

    try:
        runs = comparison.read(arguments.folders)
        files = comparison.write(runs, arguments.out)
    except (results.ResultError, OSError) as error:
        return fail(str(error), CONFIGURATION)
    console = options.stdout()
    console.print(tables.summary(runs))
    options.list_files(console, files)
    return 0


def matrix(arguments: argparse.Namespace) -> int:
    """Run many experiments, in parallel and only what is not finished; tables and a page of all."""
    from simulations import config, matrix, matrix_report, pool, results

    progress = Console(stderr=True, quiet=arguments.quiet)
    try:
        plan = matrix.Matrix(arguments.file, arguments.out, arguments.data_root)
        cells = plan.cells(everything=arguments.all)
    except config.ConfigError as error:
        return fail(str(error), CONFIGURATION)
    chosen = [cell for cell in cells if fnmatch.fnmatch(str(cell), f"*{arguments.only}*")]
    if not chosen:
        return fail(f"--only {arguments.only} matches no cell", CONFIGURATION)
    if arguments.list:
        return _list_cells(chosen, arguments.workers)
    failures: dict[str, str] = {}
    try:
        if not arguments.report_only:
            experiments = [cell.experiment for cell in chosen]
            failures = pool.run(experiments, arguments.out, progress, arguments.workers)
        if not any(pool.finished(cell.folder) for cell in cells):
            _list_failures(failures, arguments.out)
            return fail("no cell is finished, so there is nothing to write about", FAILED)
        files = matrix_report.write(plan, cells, arguments.docs)
    except pool.BusyError as error:
        return fail(str(error), CONFIGURATION)
    except (OSError, results.ResultError) as error:
        return fail(str(error), FAILED)
    options.list_files(options.stdout(), files)
    return _list_failures(failures, arguments.out)


def _list_failures(failures: Mapping[str, str], out: Path) -> int:
    from simulations import pool

    for name, reason in failures.items():
        fail(f"{name}: {reason} (files: {out / pool.FAILED / name})", FAILED)
    return FAILED if failures else 0


def _list_cells(cells: Sequence[matrices.Cell], workers: int | None) -> int:
    """Print each cell with its state and the time that it will take."""
    from simulations import durations, pool

    known, left = durations.Durations(), {}
    for cell in cells:
        if pool.finished(cell.folder):
            known.add(cell.experiment, cell.folder)
    for cell in cells:
        state = "finished"
        if not pool.finished(cell.folder):
            left[cell.folder] = known.expected(cell.experiment)
            state = "failed" if pool.failed(cell.folder) else "to run"
            state += f", {durations.spell(left[cell.folder])}"
        print(f"{cell}  {state}")
    together = durations.together(list(left.values()), workers or os.cpu_count() or 1)
    runs = len({cell.folder for cell in cells})
    print(
        f"{len(cells)} cells are {runs} runs, {runs - len(left)} of them finished; "
        f"the rest takes about {durations.spell(together)}"
    )
    return 0


def list_experiments(arguments: argparse.Namespace) -> int:
    """Print the experiments and matrices that come with the repository."""
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
    options.add_run_options(one)
    one.set_defaults(command=run)

    several = commands.add_parser("compare", help="set runs side by side")
    several.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    several.add_argument("--out", type=Path, default=Path("results/compare"))
    several.set_defaults(command=compare)

    many = commands.add_parser("matrix", help="run many", description=matrix.__doc__)
    many.add_argument("file", type=Path, metavar="FILE.toml")
    many.add_argument("--all", action="store_true", help="the product of all axes as well")
    many.add_argument("--only", default="", help="cells that match this, as --list writes them")
    many.add_argument("--list", action="store_true", help="print the cells and run nothing")
    many.add_argument("--report-only", action="store_true", help="write about what is finished")
    many.add_argument("--workers", type=_count, help="processes (default: one for each core)")
    many.add_argument("--out", type=Path, default=Path("results/matrix"))
    many.add_argument("--docs", type=Path, default=Path("docs"), help="folder for the page")
    many.add_argument("--data-root", type=Path, help="folder that holds the data sets")
    many.add_argument("--quiet", "-q", action="store_true", help="show no progress")
    many.set_defaults(command=matrix)

    listing = commands.add_parser("list", help="list the experiments of this repository")
    listing.set_defaults(command=list_experiments)
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not legal: expected a whole number >= 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
