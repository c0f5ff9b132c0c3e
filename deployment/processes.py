"""Child processes that are all ended, whatever happens to the parent short of being killed."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from simulations.engines.commands import FlowerError, program_path, stop_group

RECORD = "processes.txt"
_PASSED_ON = ("LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV")

# Seconds before each revival of a process. A SuperNode that was killed is refused under its own id
# until its lease has ended, which takes 45 s.
PAUSES = (0.0, 10.0, 20.0, 40.0)


@dataclass
class _Program:
    """What was started, how it goes, and what is known of its revivals."""

    process: subprocess.Popen[bytes]
    command: Sequence[str]
    home: Path
    settings: Mapping[str, str]
    revivals: int = 0
    due: float | None = None


class Processes:
    """Programs that run side by side, each in a session of its own and with a log of its own.

    Leaving the context ends them, the newest first, and what they started with them. While they
    run, their process ids are in ``processes.txt`` beside the logs.

    Parameters
    ----------
    logs : Path
        An existing folder.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, _Program] = {}

    def __enter__(self) -> Processes:
        """Return the object itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End all of them."""
        processes = [self._running.pop(name).process for name in reversed(list(self._running))]
        for process in processes:  # together first, so that they need not be waited for in turn
            process.terminate()
        for process in processes:
            stop_group(process)
        (self._logs / RECORD).unlink(missing_ok=True)

    def start(
        self, name: str, command: Sequence[str], home: Path, settings: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a program with a home folder and little else in its environment.

        Parameters
        ----------
        name : str
            Also of its log, which is appended to.
        command : sequence of str
        home : Path
            It starts there; made if it does not exist.
        settings : mapping
            Its environment, beside what every program needs.
        """
        self._running[name] = _Program(
            self._started(name, command, home, settings), command, home, settings
        )
        self._record()
        return self._running[name].process

    def stop(self, name: str) -> None:
        """End one of them, and what it started."""
        stop_group(self._running.pop(name).process)
        self._record()

    def revive(self) -> None:
        """Start again what has ended by itself, as a container's restart policy does.

        Each program is given the pauses of `PAUSES`; this is to be called again and again.

        Raises
        ------
        FlowerError
            When one keeps ending.
        """
        now = time.monotonic()
        for name in self.ended():
            program = self._running[name]
            if program.revivals == len(PAUSES):
                self._complain(name)
            if program.due is None:
                program.due = now + PAUSES[program.revivals]
            if now >= program.due:
                stop_group(program.process)  # what it started may have outlived it
                program.process = self._started(
                    name, program.command, program.home, program.settings
                )
                program.revivals, program.due = program.revivals + 1, None
                self._record()

    def log(self, name: str) -> Path:
        """Where a program's output goes."""
        return self._logs / f"{name}.log"

    def process_id(self, name: str) -> int:
        """Return the process id of one of them."""
        return self._running[name].process.pid

    def check(self) -> None:
        """Complain about the first that has ended by itself.

        Raises
        ------
        FlowerError
            Naming it, its exit status and its log.
        """
        for name in self.ended():
            self._complain(name)

    def ended(self) -> list[str]:
        """Return the names of those that have ended by themselves."""
        return [name for name, each in self._running.items() if each.process.poll() is not None]

    def _started(
        self, name: str, command: Sequence[str], home: Path, settings: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        environment = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
        environment |= {"HOME": str(home), "PATH": program_path(), **settings}
        with self.log(name).open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=home,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _complain(self, name: str) -> NoReturn:
        status = self._running[name].process.returncode
        raise FlowerError(f"{name} ended with status {status} (log: {self.log(name)})")

    def _record(self) -> None:
        lines = [f"{each.process.pid} {name}\n" for name, each in self._running.items()]
        (self._logs / RECORD).write_text("".join(lines))
