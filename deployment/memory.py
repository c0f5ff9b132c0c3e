"""What the containers of a deployment use, read while they run."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Mapping

UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
PERIOD_SECONDS = 2.0
PATIENCE_SECONDS = 30.0


class MemoryWatch:
    """Asks the Docker engine every few seconds what a project's containers use.

    An engine that does not answer is asked again later, and a missing ``docker`` leaves no samples:
    a deployment never ends because of it.

    Parameters
    ----------
    project : str
        Name of the docker-compose project.
    """

    def __init__(self, project: str) -> None:
        self._project = project
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.samples = 0
        self.together = 0
        self.containers: dict[str, int] = {}

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer, if it was begun."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def note(self, used: Mapping[str, int]) -> None:
        """Take a sample into account: bytes by service."""
        if used:
            self.samples += 1
            self.together = max(self.together, sum(used.values()))
            for service, size in used.items():
                self.containers[service] = max(self.containers.get(service, 0), size)

    def peaks(self) -> dict[str, object]:
        """Return the most that was used.

        Returns
        -------
        dict
            In bytes, as ``docker stats`` counts them (without files that could be read again):
            ``"together"`` of all containers at the same time, ``"containers"`` by service, each at
            its own worst; and the number of ``"samples"``.
        """
        ordered = dict(sorted(self.containers.items()))
        return {"together": self.together, "containers": ordered, "samples": self.samples}

    def _watch(self) -> None:
        while not self._over.wait(PERIOD_SECONDS):
            try:
                self.note(used(self._project))
            except (OSError, subprocess.SubprocessError):  # gone in between, or no docker at all
                continue


def used(project: str) -> dict[str, int]:
    """Return what each container of a docker-compose project uses now, in bytes by service.

    Raises
    ------
    OSError, subprocess.SubprocessError
        When ``docker`` is not there, fails, or takes too long.
    """
    label = "com.docker.compose"
    selection = "--filter", f"label={label}.project={project}"
    services = _lines("ps", *selection, "--format", f'{{{{.ID}}}} {{{{.Label "{label}.service"}}}}')
    if not services:
        return {}
    found = _lines("stats", "--no-stream", "--format", "{{.ID}} {{.MemUsage}}", *services)
    return {services[container]: parse(usage) for container, usage in found.items()}


def parse(usage: str) -> int:
    """Return the bytes of a text such as ``"123.4MiB / 690MiB"``; 0 of one that names none."""
    match = re.match(r"([0-9.]+)([KMGT]?i?B)\b", usage)
    return round(float(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else 0


def _lines(*words: str) -> dict[str, str]:
    program = shutil.which("docker")
    if program is None:
        raise FileNotFoundError("docker")
    done = subprocess.run(
        [program, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
