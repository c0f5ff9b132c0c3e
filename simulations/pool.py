"""Runs many experiments, one process for each core, and never one that is finished.

A run works in a folder of its own, which gets its name when the run is complete: whatever is
stopped, a named folder holds a whole result, and no earlier result is touched.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from simulations import durations, progress, results, runner
from simulations.config import Experiment

FAILED = "failed"  # folder of the runs that failed, with their logs
LOG = "cell.log"  # what a process prints that is in no other log
_RUNNING = ".running-"
_IMPORTED = ("simulations.runner", "server.app", "client.app")
_POLL_SECONDS = 0.5
_STOP_SECONDS = 5.0


class Job(durations.Job, Protocol):
    """What the pool runs: it writes ``result.json`` into its folder."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def folder(self) -> Path:
        """Where its result is, or will be; jobs that would do the same share it."""

    @property
    def rounds(self) -> int:
        """How many lines of ``progress.jsonl`` it will write beside the first."""

    def at(self, folder: Path) -> Job:
        """Return the same job with another folder."""


Work = Callable[[Any], object]


class BusyError(RuntimeError):
    """Another process runs experiments into the same folder."""


def execute(experiment: Experiment) -> None:
    """Run one experiment in this process, silently."""
    runner.execute(experiment, Console(quiet=True))


def finished(folder: Path) -> bool:
    """Whether a folder holds the result of a run."""
    return (folder / results.RESULT).exists()


def failed(folder: Path) -> bool:
    """Whether the last try of a run failed, and none succeeded."""
    return not finished(folder) and (folder.parent / FAILED / folder.name).exists()


def run(
    jobs: Sequence[Job],
    out: Path,
    console: Console,
    workers: int | None = None,
    work: Work = execute,
) -> dict[str, str]:
    """Run what is not finished, the longest first.

    Parameters
    ----------
    jobs : sequence of Job
        Each with its own folder in `out`.
    out : Path
        Made if it does not exist.
    console : Console
        Shows the progress and an estimate of the time left; a quiet one shows nothing.
    workers : int, optional
        Processes at the same time; one for each core if not given.
    work : callable
        Does one job, in a process of its own; for experiments it need not be given.

    Returns
    -------
    dict of str to str
        Folder name and reason of each run that failed; its files are in ``failed/``.

    Raises
    ------
    BusyError
        When another process runs experiments into `out`.
    KeyboardInterrupt
        On Ctrl-C or SIGTERM, after everything has been stopped.
    """
    known = durations.Durations()
    for job in jobs:
        if finished(job.folder):
            known.add(job, job.folder)
    todo = {job.folder: job for job in jobs if not finished(job.folder)}
    # Stable: what takes equally long keeps the order of the file.
    queue = sorted(todo.values(), key=lambda job: job.effort, reverse=True)
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out), _terminated_as_interrupted():
        pool = _Pool(out, min(workers or os.cpu_count() or 1, max(1, len(queue))), work, known)
        with _Display(console, pool, queue, len({job.folder for job in jobs})) as display:
            try:
                pool.run(queue, display)
            finally:
                pool.stop()
    return pool.failures


@dataclass
class _Running:
    process: ForkServerProcess
    job: Job
    folder: Path
    began: float

    def last_round(self) -> Mapping[str, Any] | None:
        """Return the last round that it has finished."""
        entries = progress.Lines(self.folder / progress.FILE).new()
        return entries[-1] if entries else None


class _Pool:
    """Processes, each of which runs one experiment and ends."""

    def __init__(self, out: Path, workers: int, work: Work, known: durations.Durations) -> None:
        self.out, self.workers, self.known = out, workers, known
        self.running: dict[int, _Running] = {}
        self.failures: dict[str, str] = {}
        self._work = work
        # Processes are forked from one that has imported everything and started no thread.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_IMPORTED))

    def run(self, queue: list[Job], display: _Display) -> None:
        """Work until nothing is left to do."""
        while queue or self.running:
            while queue and len(self.running) < self.workers:
                self._start(queue.pop(0))
            for sentinel in wait(list(self.running), _POLL_SECONDS):
                display.ended(*self._finish(self.running.pop(sentinel)))
            display.update()

    def stop(self) -> None:
        """Stop what is running, and remove what it has left."""
        for each in self.running.values():
            each.process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for each in self.running.values():
            each.process.join(max(0.0, deadline - time.monotonic()))
            each.process.kill()
            each.process.join()
            shutil.rmtree(each.folder, ignore_errors=True)
        self.running.clear()

    def _start(self, job: Job) -> None:
        folder = self.out / f"{_RUNNING}{os.getpid()}-{job.folder.name}"
        folder.mkdir()
        mine = job.at(folder)
        process = self._context.Process(target=_child, args=(self._work, mine))
        with _environment(OMP_NUM_THREADS="1"):
            process.start()
        self.running[process.sentinel] = _Running(process, job, folder, time.monotonic())

    def _finish(self, run: _Running) -> tuple[_Running, str]:
        """Give a run's folder its name; the reason if it failed, else an empty text."""
        run.process.join()
        reason = ""
        if run.process.exitcode or not finished(run.folder):
            reason = _reason(run)
            self.failures[run.job.folder.name] = reason
            target = self.out / FAILED / run.job.folder.name
        else:
            target = run.job.folder
            if not (run.folder / LOG).stat().st_size:
                (run.folder / LOG).unlink()
            shutil.rmtree(self.out / FAILED / target.name, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)  # an earlier failure, or a folder with no result
        run.folder.rename(target)
        if not reason:
            self.known.add(run.job, target)
        return run, reason


def _child(work: Work, job: Job) -> None:
    """Run one experiment; what it prints goes to a file, and it does not outlive its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    with (job.folder / LOG).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        work(job)
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # the last line is the reason
        sys.exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _reason(run: _Running) -> str:
    """Say why a process failed."""
    code = run.process.exitcode or 0
    if code < 0:
        return f"ended by signal {-code}"
    lines = (run.folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit status {code}, and no result"


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep other processes from the folder, and remove what a killed one has left."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BusyError(f"another process runs experiments into {out}") from None
        for left in out.glob(f"{_RUNNING}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C, so that no process is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: _interrupt())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt() -> None:
    raise KeyboardInterrupt


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set variables for a process that is started in the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Display:
    """Shows what is running, what has ended, and about how long the rest will take."""

    def __init__(self, console: Console, pool: _Pool, queue: list[Job], total: int) -> None:
        self._console, self._pool, self._queue = console, pool, queue
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self._done, self._total = total - len(queue), total
        self._whole = self._bars.add_task("all", total=total, completed=self._done, note="")
        self._each: dict[Path, TaskID] = {}

    def __enter__(self) -> _Display:
        if self._queue:
            text = f"{self._done} of {self._total} runs are finished; {self._left()}"
            self._console.print(text, highlight=False, soft_wrap=True)
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self) -> None:
        """Show the last round of everything that runs."""
        if self._bars.disable:
            return
        self._bars.update(self._whole, completed=self._done, note=self._left())
        for run in self._pool.running.values():
            rounds = run.job.rounds
            if run.folder not in self._each:
                name = run.job.name
                self._each[run.folder] = self._bars.add_task(name, total=rounds, note="")
            if entry := run.last_round():
                note = progress.scores(entry)
                self._bars.update(self._each[run.folder], completed=entry["round"], note=note)

    def ended(self, run: _Running, reason: str) -> None:
        """Say how a run ended."""
        if run.folder in self._each:
            self._bars.remove_task(self._each.pop(run.folder))
        self._done += not reason
        seconds = time.monotonic() - run.began
        how = f"[red]failed[/red] {reason}" if reason else _scores(run.job.folder)
        name = run.job.name
        text = f"{self._done}/{self._total}  {name}  {how}  {seconds:.0f} s; {self._left()}"
        self._console.print(text, highlight=False, soft_wrap=True)

    def _left(self) -> str:
        now = time.monotonic()
        rest = [self._pool.known.expected(job) for job in self._queue]
        for run in self._pool.running.values():
            rest.append(max(0.0, self._pool.known.expected(run.job) - (now - run.began)))
        return f"about {durations.spell(durations.together(rest, self._pool.workers))} left"


def _scores(folder: Path) -> str:
    try:
        return progress.scores(results.read(folder)["final"])
    except (results.ResultError, KeyError):
        return "finished"
