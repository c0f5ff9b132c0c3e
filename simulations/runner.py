"""Runs one experiment from its configuration to its result file, plots and report."""

from __future__ import annotations

import logging
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from simulations import plots, progress, report, results, sources
from simulations.config import Experiment
from simulations.engines import FlowerError, run_flower, run_in_process
from tasks import models
from tasks.data import CLASSES, SHAPES

LOG = "run.log"
SNAPSHOT = "resume.npz"  # what a run is resumed from, as long as it is not finished ...
NODES = "nodes"  # ... and what the participants of the in-process engine keep

# All that a run writes, so that no file of an earlier run in the same folder is taken for its own.
ARTEFACTS = (
    *(LOG, progress.FILE, results.HISTORY, results.RESULT, results.TIMING, report.FILE),
    results.MEMORY,
    *("model.pt", "evidence.npz", "evidence_model.pt", "audit.jsonl", "audit.pub"),
    *("checkpoints", "undo", plots.FOLDER),
    *(SNAPSHOT, NODES),
)

sources.digest()  # now, and not when a run ends: by then the files may be others


class OutputError(RuntimeError):
    """The results cannot be written where they should go."""


class RunError(RuntimeError):
    """The run failed: why, in one sentence."""


def execute(
    experiment: Experiment,
    console: Console,
    run_apps: Callable[[Experiment, Path], None] | None = None,
) -> dict[str, Any]:
    """Run an experiment and write everything into its output folder.

    Parameters
    ----------
    experiment : Experiment
        What to run, how, and where to.
    console : Console
        Shows the progress and errors; a quiet one shows nothing.
    run_apps : callable, optional
        Runs the Flower apps of an experiment, whose processes log to a file; left out, the engine
        of the configuration. It raises a RunError when they fail.

    Returns
    -------
    dict
        As `results.load` returns it. A run that is finished is not run again by
        ``experiment.resume``; of one that was stopped the seconds are those of its last process.

    Raises
    ------
    OutputError
        Before anything is started, when the folder cannot take the results.
    RunError, ResultError
        When the apps fail, or leave no result.
    """
    output, settings = Path(experiment.run.output), experiment.experiment
    if settings.resume and _is_finished(output, experiment):
        return results.load(output)
    prepare(output, experiment)
    begin = time.perf_counter()
    with (
        progress.shown(output / progress.FILE, settings.name, settings.rounds, console),
        _logged(output / LOG, console),
    ):
        (run_apps or _run_apps)(experiment, output / LOG)
    seconds = time.perf_counter() - begin
    history = results.read(output, results.HISTORY)
    timing = {"seconds": round(seconds, 2), **results.read(output, results.TIMING)}
    results.write(output, timing, results.TIMING)
    results.write(output, results.assemble(experiment.identity(), history))
    result = results.load(output)
    plots.draw(output, experiment, result)
    report.write(output, result)
    _remove(output, (SNAPSHOT, NODES))
    return result


def prepare(output: Path, experiment: Experiment) -> None:
    """Make the output folder, or say why it will not do; clear an earlier run's files from it."""
    settings, task = experiment.experiment, experiment.task
    shape, classes = SHAPES[task.dataset], CLASSES[task.dataset]
    model = models.build(task.model_name, shape, classes, 0, task.activation)
    model_bytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    kept = settings.rounds if experiment.run.checkpoints else 0
    needed = model_bytes * (kept + 4)  # a checkpoint a round, and what comes beside them
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not (settings.resume and (output / SNAPSHOT).exists()):
            _remove(output, ARTEFACTS)
            results.write_text(output / LOG, "")
        (output / LOG).touch()
        free = shutil.disk_usage(output).free
    except OSError as error:
        raise OutputError(f"cannot write to {output}: {error.strerror}") from None
    if free < needed:
        raise OutputError(
            f"{output} has {free / 1e6:.0f} MB left, but the checkpoints of {kept} "
            f"rounds need {needed / 1e6:.0f} MB"
        )


def _is_finished(output: Path, experiment: Experiment) -> bool:
    """Whether there is nothing left to resume; a run of something else is not to be cleared away.

    Raises
    ------
    OutputError
        If another experiment is finished there.
    """
    if (output / SNAPSHOT).exists() or not (output / results.RESULT).exists():
        return False
    if results.read(output)["configuration"] != experiment.identity():
        raise OutputError(f"{output} holds another experiment, which is finished")
    return True


def written(output: Path) -> list[Path]:
    """Return the files that a run left, checkpoints as their folder."""
    found = [output / name for name in ARTEFACTS if (output / name).exists()]
    drawn = sorted((output / plots.FOLDER).glob("*.png"))
    return [path for path in found if path.name != plots.FOLDER] + drawn


def _run_apps(experiment: Experiment, log: Path) -> None:
    """Run the Flower apps on the engine of the configuration."""
    settings, run_config = experiment.experiment, experiment.run_config()
    workers = experiment.run.workers or None
    if settings.engine == "flower":
        try:
            run_flower(run_config, clients=settings.clients, log=log, workers=workers)
        except (FlowerError, OSError) as error:
            raise RunError(str(error)) from error
        return
    from client.app import app as client_app
    from server.app import app as server_app

    try:
        run_in_process(
            server_app,
            client_app,
            run_config,
            clients=settings.clients,
            seed=settings.seed,
            workers=workers,
            nodes=Path(experiment.run.output) / NODES,
        )
    except Exception as error:
        logging.getLogger("flwr").error(traceback.format_exc(), extra={"quiet": True})
        raise RunError(f"{type(error).__name__}: {error}") from error


@contextmanager
def _logged(file: Path, console: Console) -> Iterator[None]:
    """Send the logs of Flower and of everything else to a file, and errors to the console too."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers = [handler, _FirstLine(console)]
    loggers = [logging.getLogger(), logging.getLogger("flwr")]
    before = [(each, each.handlers, each.level, each.propagate) for each in loggers]
    for each in loggers:
        each.handlers, each.propagate = handlers, False
        each.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for each, old_handlers, level, propagate in before:
            each.handlers, each.propagate = old_handlers, propagate
            each.setLevel(level)
        handler.close()


class _FirstLine(logging.Handler):
    """Prints the first line of each error."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.ERROR)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, unless it will be reported in another way."""
        if not getattr(record, "quiet", False):
            first = record.getMessage().strip().partition("\n")[0]
            self._console.print(
                f"[red]error[/red] {escape(first)}", highlight=False, soft_wrap=True
            )


def _remove(output: Path, names: Iterable[str]) -> None:
    for name in names:
        path = output / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
