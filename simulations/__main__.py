"""The command line: ``python -m simulations run|compare|matrix|table|list``."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from simulations import options
from simulations.options import CONFIGURATION, FAILED, INTERRUPTED, fail

if TYPE_CHECKING:
    from simulations import pool

EXPERIMENTS = Path(__file__).parent / "experiments"
FEDERATED = 7  # the table of the paper that a matrix makes


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
    from simulations import config, known, matrix, matrix_report, pool, results

    progress = Console(stderr=True, quiet=arguments.quiet)
    out = arguments.out or Path("results/matrix")
    try:
        plan = matrix.Matrix(arguments.file, out, arguments.data_root)
        cells = plan.cells(everything=arguments.all)
        rows = known.read(arguments.known) if arguments.known else {}
    except (config.ConfigError, results.ResultError) as error:
        return fail(str(error), CONFIGURATION)
    chosen = [cell for cell in cells if fnmatch.fnmatch(str(cell), f"*{arguments.only}*")]
    if not chosen:
        return fail(f"--only {arguments.only} matches no cell", CONFIGURATION)
    if arguments.list:
        jobs = [(cell, cell.experiment) for cell in chosen]
        return _list_jobs(jobs, arguments.workers, elsewhere=rows)
    failures: dict[str, str] = {}
    try:
        if not arguments.report_only:
            experiments = [c.experiment for c in chosen if c.folder.name not in rows]
            failures = pool.run(experiments, out, progress, arguments.workers)
        if not any(pool.finished(cell.folder) or cell.folder.name in rows for cell in cells):
            _list_failures(failures, out)
            return fail("no cell is finished, so there is nothing to write about", FAILED)
        files = matrix_report.write(plan, cells, arguments.docs, rows)
    except pool.BusyError as error:
        return fail(str(error), CONFIGURATION)
    except (OSError, results.ResultError) as error:
        return fail(str(error), FAILED)
    options.list_files(options.stdout(), files)
    return _list_failures(failures, out)


def table(arguments: argparse.Namespace) -> int:
    """Run a table of the paper, only what is not finished, and write it with what is finished."""
    from simulations import config, pool, results
    from simulations.central import plan as plans
    from simulations.central import report
    from simulations.central import run as central

    name = f"paper-{arguments.scale}"
    if arguments.number == FEDERATED:
        if arguments.device != "cpu":
            return fail("table 7 is a matrix, which runs on the CPU", CONFIGURATION)
        arguments.file = arguments.file or EXPERIMENTS / f"{name}-federated.toml"
        arguments.all, arguments.only, arguments.known = False, "", None
        return matrix(arguments)
    file = arguments.file or EXPERIMENTS / f"{name}.toml"
    progress = Console(stderr=True, quiet=arguments.quiet)
    workers = arguments.workers or (1 if arguments.device == "cuda" else None)
    out = arguments.out or Path("results") / file.stem
    docs = arguments.docs if arguments.file is None else out
    try:
        plan = plans.Plan(file, out, arguments.data_root, arguments.device)
        cells = plan.cells(arguments.number)
        if not cells:
            return fail(f"{file} has no row of table {arguments.number}", CONFIGURATION)
    except config.ConfigError as error:
        return fail(str(error), CONFIGURATION)
    if arguments.list:
        return _list_jobs([(cell.name, cell) for cell in cells], workers)
    failures: dict[str, str] = {}
    try:
        if not arguments.report_only:
            failures = pool.run(cells, out, progress, workers, central.execute)
        _list_failures(failures, out)
        files = report.write(plan, docs)
    except pool.BusyError as error:
        return fail(str(error), CONFIGURATION)
    except (OSError, results.ResultError) as error:
        return fail(str(error), FAILED)
    options.list_files(options.stdout(), files)
    return FAILED if failures else 0


def _list_failures(failures: Mapping[str, str], out: Path) -> int:
    from simulations import pool

    for name, reason in failures.items():
        fail(f"{name}: {reason} (files: {out / pool.FAILED / name})", FAILED)
    return FAILED if failures else 0


def _list_jobs(
    jobs: Sequence[tuple[object, pool.Job]], workers: int | None, elsewhere: Container[str] = ()
) -> int:
    """Print each job by its name, with its state and the time that it will take."""
    from simulations import durations, pool

    known, left = durations.Durations(), {}
    for _, job in jobs:
        if pool.finished(job.folder):
            known.add(job, job.folder)
    for name, job in jobs:
        state = "finished"
        if not pool.finished(job.folder) and job.folder.name not in elsewhere:
            left[job.folder] = known.expected(job)
            state = "failed" if pool.failed(job.folder) else "to run"
            state += f", {durations.spell(left[job.folder])}"
        print(f"{name}  {state}")
    together = durations.together(list(left.values()), workers or os.cpu_count() or 1)
    runs = len({job.folder for _, job in jobs})
    print(
        f"{len(jobs)} cells are {runs} runs, {runs - len(left)} of them finished; "
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
    many.add_argument(
        "--known",
        type=Path,
        metavar="DOCS",
        help="folder with tables of runs made elsewhere: what this code has made is not run again",
    )
    _add_pool_options(many)
    many.set_defaults(command=matrix)

    paper = commands.add_parser("table", help="run a table of the paper", description=table.__doc__)
    paper.add_argument("number", type=int, choices=range(1, 9), metavar="N", help="1 to 8")
    paper.add_argument("--scale", choices=("small", "full"), default="small")
    paper.add_argument(
        "--file", type=Path, help="rows of one's own, about which is written beside their runs"
    )
    paper.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    _add_pool_options(paper)
    paper.set_defaults(command=table)

    listing = commands.add_parser("list", help="list the experiments of this repository")
    listing.set_defaults(command=list_experiments)
    return parser


def _add_pool_options(parser: argparse.ArgumentParser) -> None:
    """Add what it takes to run many."""
    parser.add_argument("--list", action="store_true", help="print the runs, and run nothing")
    parser.add_argument("--report-only", action="store_true", help="write about what is finished")
    parser.add_argument("--workers", type=_count, help="processes (default: one for each core)")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: in results/)")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder for the page")
    parser.add_argument("--data-root", type=Path, help="folder that holds the data sets")
    parser.add_argument("--quiet", "-q", action="store_true", help="show no progress")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not legal: expected a whole number >= 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
