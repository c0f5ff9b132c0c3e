"""Shows how far a run is, from the line per round that the ServerApp appends to a file."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

FILE = "progress.jsonl"
_POLL_SECONDS = 0.2


@contextmanager
def shown(file: Path, name: str, rounds: int, console: Console) -> Iterator[None]:
    """Follow a progress file while the block runs.

    Parameters
    ----------
    file : Path
        One JSON object a line, as in the rounds of ``history.json``. Need not exist yet.
    name : str
        Of the experiment.
    rounds : int
        Number of rounds, without the initial model's.
    console : Console
        A terminal gets a live bar, anything else a line per round, a quiet one nothing.
    """
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[scores]}"),
        TimeElapsedColumn(),
        TextColumn("[dim]left[/dim]"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=rounds, scores="")

        def show(entry: Mapping[str, Any]) -> None:
            progress.update(task, completed=entry["round"], scores=scores(entry))
            if not console.is_terminal:
                line = f"{name}  round {entry['round']}/{rounds}  {scores(entry)}"
                console.print(line, highlight=False, soft_wrap=True)

        with _followed(file, show):
            yield


def scores(entry: Mapping[str, Any]) -> str:
    """Write a round's scores in a few words."""
    text = f"BA {entry['ba']:6.1%}  ASR {entry['asr']:6.1%}"
    reset = entry.get("neurons_reset", 0)
    return f"{text}  {reset} reset" if reset else text


@contextmanager
def _followed(file: Path, show: Any) -> Iterator[None]:
    """Call `show` with each line of a growing file, from a thread of its own."""
    done = threading.Event()
    lines = Lines(file)

    def follow() -> None:
        while not done.wait(_POLL_SECONDS):
            for entry in lines.new():
                show(entry)

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for entry in lines.new():
            show(entry)


class Lines:
    """The complete lines that were appended to a file since the last look."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._position = 0

    def new(self) -> list[dict[str, Any]]:
        """Read them."""
        if not self._file.exists():
            return []
        with self._file.open("rb") as stream:
            stream.seek(self._position)
            text = stream.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._position += len(complete)
        return [entry for line in complete.splitlines() if (entry := _entry(line)) is not None]


def _entry(line: bytes) -> dict[str, Any] | None:
    """Read a line; nothing of one that was torn when a run was killed."""
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return entry
