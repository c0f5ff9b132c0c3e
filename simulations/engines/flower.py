"""Runs the apps through a real ``flwr run``, with a SuperLink, a Flower home and ports of its own.

Nothing that Flower would keep in the user's home folder is read or written. All processes are
stopped; after an interrupted run, two agents of Ray's may take two minutes to notice.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tasks.config import RunConfigValue

CHECKOUT = Path(__file__).resolve().parents[2]
CONNECTION = "experiment"
STARTUP_SECONDS = 60
STOP_SECONDS = 15
NOTICE_SECONDS = 8

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


def run_flower(
    run_config: Mapping[str, RunConfigValue],
    *,
    clients: int,
    log: Path,
    app: Path = CHECKOUT,
    workers: int | None = None,
) -> None:
    """Run the apps of a folder to their end.

    Parameters
    ----------
    run_config : mapping
        Flat scalars; each key must have a default in the ``pyproject.toml`` of `app`. The apps run
        from a bundle elsewhere, so paths must be absolute.
    clients : int
        Number of virtual SuperNodes.
    log : Path
        What Flower's processes print is appended to this file.
    app : Path
        The folder with the ``pyproject.toml``.
    workers : int, optional
        Clients that work at the same time; one for each core if not given.

    Raises
    ------
    FlowerError
        When Flower does not start or the run ends in anything but success.
    """
    # From a neutral folder: beside the sources, Ray's processes would import the working tree
    # instead of the bundle.
    start = log.stat().st_size if log.exists() else 0
    with tempfile.TemporaryDirectory(prefix="flower-") as folder, log.open("ab") as stream:
        flower = _Flower(Path(folder), stream)
        with flower.superlink():
            flower.run(app.resolve(), run_config, clients, workers or os.cpu_count() or 1)
            status = flower.status()
    if status != "finished:completed":
        raise FlowerError(_last_exception(log, start) or f"the run ended as {status}")


class _Flower:
    """Flower's command-line programs, confined to one folder."""

    def __init__(self, home: Path, log: IO[bytes]) -> None:
        self._home = home
        self._log = log
        self._port = _free_port()
        scripts = sysconfig.get_path("scripts")
        self._environment = {
            **os.environ,
            **SETTINGS,
            "FLWR_HOME": str(home),
            "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")]),
        }
        self._environment.pop("PYTHONPATH", None)  # would lead to the working tree as well
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n'
            f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{self._port}"\ninsecure = true\n'
        )

    @contextmanager
    def superlink(self) -> Iterator[None]:
        """Run a SuperLink with its simulation runtime; stop it and all that it started."""
        command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
        command += ["--host", "127.0.0.1", "--port", str(self._port)]
        process = subprocess.Popen(
            command,
            cwd=self._home,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._wait_until_healthy(process)
            yield
        except BaseException:
            self._stop_runs()
            raise
        finally:
            _stop_group(process)

    def run(
        self, app: Path, run_config: Mapping[str, RunConfigValue], clients: int, workers: int
    ) -> None:
        """Submit the run and follow it to its end."""
        settings = self._home / "run-config.toml"
        # JSON's scalars are TOML's.
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in run_config.items()]
        settings.write_text("".join(lines))
        federation = (
            f"num-supernodes={clients} client-resources-num-cpus=1 init-args-num-cpus={workers}"
        )
        command = ["flwr", "run", str(app), CONNECTION, "--stream", "--run-config", str(settings)]
        command += ["--federation-config", federation]
        result = self._call(command, stdout=self._log, stderr=subprocess.STDOUT)
        if result.returncode:
            raise FlowerError(f"`flwr run` exited with {result.returncode}")

    def status(self) -> str:
        """Return how the run ended; `flwr run` itself exits with 0 whatever happened."""
        runs = self._runs()
        if not runs:
            raise FlowerError("`flwr list` did not say how the run ended")
        return str(runs[0]["status"])

    def _runs(self) -> list[dict[str, Any]]:
        """List the runs that the SuperLink knows; none if it does not answer."""
        command = ["flwr", "list", CONNECTION, "--format", "json"]
        result = self._call(command, stdout=subprocess.PIPE, stderr=self._log)
        try:
            return list(json.loads(result.stdout)["runs"])
        except (ValueError, KeyError):
            return []

    def _stop_runs(self) -> None:
        """Stop what still runs: the apps live in a session that outlives the SuperLink's."""
        running = [run for run in self._runs() if not run["status"].startswith("finished")]
        for run in running:
            command = ["flwr", "stop", str(run["run-id"]), CONNECTION]
            self._call(command, stdout=self._log, stderr=subprocess.STDOUT)
        if running:
            time.sleep(NOTICE_SECONDS)  # the apps ask the SuperLink now and then, so it has to stay

    def _call(self, command: list[str], **streams: Any) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            command, cwd=self._home, env=self._environment, stdin=subprocess.DEVNULL, **streams
        )

    def _wait_until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + STARTUP_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise FlowerError(f"the SuperLink exited with {process.returncode} on start")
            try:
                health = f"http://127.0.0.1:{self._port}/health"
                with urllib.request.urlopen(health, timeout=1):  # nosec B310
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise FlowerError(f"the SuperLink did not answer within {STARTUP_SECONDS} s")


def _last_exception(log: Path, start: int) -> str:
    """Find the last exception that was printed to a log from a position on."""
    text = log.read_bytes()[start:].decode(errors="replace")
    found = re.findall(r"^(?:\w+\.)*\w+(?:Error|Exception)\b.*$", text, re.MULTILINE)
    return str(found[-1]).strip() if found else ""


def _free_port() -> int:
    """Find a port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _stop_group(process: subprocess.Popen[bytes]) -> None:
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
