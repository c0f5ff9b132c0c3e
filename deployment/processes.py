"""Child processes that are all ended, whatever happens to the parent short of being killed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from simulations.engines.commands import FlowerError, program_path, stop_group

RECORD = "processes.txt"
_PASSED_ON = ("LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


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
        self._running: dict[str, subprocess.Popen[bytes]] = {}

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
        processes = [self._running.pop(name) for name in reversed(list(self._running))]
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
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        environment = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
        environment |= {"HOME": str(home), "PATH": program_path(), **settings}
        with self.log(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                command,
                cwd=home,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._record()
        return self._running[name]

    def stop(self, name: str) -> None:
        """End one of them, and what it started."""
        stop_group(self._running.pop(name))
        self._record()

    def log(self, name: str) -> Path:
        """Where a program's output goes."""
        return self._logs / f"{name}.log"

    def process_id(self, name: str) -> int:
        """Return the process id of one of them."""
        return self._running[name].pid

    def check(self) -> None:
        """Complain about the first that has ended by itself.

        Raises
        ------
        FlowerError
            Naming it, its exit status and its log.
        """
        for name in self.ended():
            status = self._running[name].returncode
            raise FlowerError(f"{name} ended with status {status} (log: {self.log(name)})")

    def ended(self) -> list[str]:
        """Return the names of those that have ended by themselves."""
        return [name for name, process in self._running.items() if process.poll() is not None]

    def _record(self) -> None:
        lines = [f"{process.pid} {name}\n" for name, process in self._running.items()]
        (self._logs / RECORD).write_text("".join(lines))
