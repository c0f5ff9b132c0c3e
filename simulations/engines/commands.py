"""Flower's command-line programs, confined to a folder, and the processes that they leave."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from tasks.config import RunConfigValue

CONNECTION = "experiment"
STOP_SECONDS = 15
NOTICE_SECONDS = 8
COMPLETED = "finished:completed"

# Flower and Ray are to ask the network for nothing (without the first setting, Flower would run
# `uv sync` before each run), and sums are not to depend on the number of cores.
SETTINGS = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class FlowerError(RuntimeError):
    """Flower could not be started, or the run failed."""


def program_path() -> str:
    """Return a ``PATH`` on which this interpreter's Flower comes first."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


class Commands:
    """The ``flwr`` program of an operator, for one SuperLink.

    Parameters
    ----------
    home : Path
        Flower's home, an existing folder; nothing is read or written in the user's.
    address : str
        The SuperLink's, ``HOST:PORT``.
    log : binary file
        What the program prints goes there.
    certificates : Path, optional
        The authorities to verify the SuperLink by (PEM); left out, it is reached without TLS.
    """

    def __init__(
        self, home: Path, address: str, log: IO[bytes], certificates: Path | None = None
    ) -> None:
        self.home = home
        self.log = log
        self.environment = {
            **os.environ,
            **SETTINGS,
            "FLWR_HOME": str(home),
            "PATH": program_path(),
        }
        # Beside the sources, Flower would import the working tree instead of the bundle.
        self.environment.pop("PYTHONPATH", None)
        trust = (
            f"root-certificates = {json.dumps(str(certificates))}"
            if certificates
            else "insecure = true"
        )
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n'
            f'[superlink.{CONNECTION}]\naddress = "{address}"\n{trust}\n'
        )

    def submit(
        self, app: Path, run_config: Mapping[str, RunConfigValue], *arguments: str
    ) -> subprocess.Popen[bytes]:
        """Submit a run; the process that is returned ends when the run does.

        Parameters
        ----------
        app : Path
            The folder with the ``pyproject.toml``.
        run_config : mapping
            Flat scalars; each key must have a default in that file.
        *arguments : str
            Further ones of ``flwr run``.
        """
        settings = self.home / "run-config.toml"
        # JSON's scalars are TOML's.
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in run_config.items()]
        settings.write_text("".join(lines))
        command = ["flwr", "run", str(app), CONNECTION, "--stream", "--run-config", str(settings)]
        return subprocess.Popen(
            [*command, *arguments],
            cwd=self.home,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def status(self) -> str:
        """Return how the newest run ended; `flwr run` itself exits with 0 whatever happened."""
        runs = self._runs()
        if not runs:
            raise FlowerError("`flwr list` did not say how the run ended")
        return str(runs[0]["status"])

    def stop_runs(self) -> None:
        """Stop what still runs: the apps live in a session that outlives the SuperLink's."""
        running = [run for run in self._runs() if not run["status"].startswith("finished")]
        for run in running:
            self.call("stop", str(run["run-id"]), stdout=self.log, stderr=subprocess.STDOUT)
        if running:
            time.sleep(NOTICE_SECONDS)  # the apps ask the SuperLink now and then, so it has to stay

    def ask(self, *words: str) -> dict[str, Any]:
        """Return what a command answers as JSON; nothing if the SuperLink does not answer."""
        result = self.call(*words, after=("--format", "json"), stderr=self.log)
        try:
            return dict(json.loads(result.stdout))
        except ValueError:
            return {}

    def call(
        self, *words: str, after: tuple[str, ...] = (), **streams: Any
    ) -> subprocess.CompletedProcess[bytes]:
        """Run ``flwr WORDS CONNECTION AFTER``, its output captured unless it is sent elsewhere."""
        return subprocess.run(  # nosec B607
            ["flwr", *words, CONNECTION, *after],
            cwd=self.home,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            **{"stdout": subprocess.PIPE, **streams},
        )

    def _runs(self) -> list[dict[str, Any]]:
        """List the runs that the SuperLink knows, the newest first; none if it does not answer."""
        return list(self.ask("list").get("runs", []))


def healthy(url: str, certificates: Path | None = None) -> bool:
    """Whether a server's health check answers within a second."""
    context = ssl.create_default_context(cafile=certificates) if certificates else None
    try:
        health = f"{url}/health"
        with urllib.request.urlopen(health, timeout=1, context=context):  # nosec B310
            return True
    except (urllib.error.URLError, OSError):
        return False


def last_exception(log: Path, start: int = 0) -> str:
    """Find the last exception that was printed to a log from a position on."""
    text = log.read_bytes()[start:].decode(errors="replace")
    found = re.findall(r"^(?:\w+\.)*\w+(?:Error|Exception)\b.*$", text, re.MULTILINE)
    return str(found[-1]).strip() if found else ""


def free_port() -> int:
    """Find a port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads its own session, and all that is left of that session."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
