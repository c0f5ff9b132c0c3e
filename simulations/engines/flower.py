"""Runs the apps through a real ``flwr run``, with a SuperLink, a Flower home and ports of its own.

Nothing that Flower would keep in the user's home folder is read or written. All processes are
stopped; after an interrupted run, two agents of Ray's may take two minutes to notice.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from simulations.engines.commands import (
    COMPLETED,
    Commands,
    FlowerError,
    free_port,
    healthy,
    last_exception,
    stop_group,
)
from tasks.config import RunConfigValue

CHECKOUT = Path(__file__).resolve().parents[2]
STARTUP_SECONDS = 60


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
    cpus = workers or os.cpu_count() or 1
    federation = f"num-supernodes={clients} client-resources-num-cpus=1 init-args-num-cpus={cpus}"
    with tempfile.TemporaryDirectory(prefix="flower-") as folder, log.open("ab") as stream:
        port = free_port()
        commands = Commands(Path(folder), f"127.0.0.1:{port}", stream)
        with _superlink(commands, port, Path(folder), stream):
            run = commands.submit(app.resolve(), run_config, "--federation-config", federation)
            try:
                run.wait()
            finally:
                run.kill()  # no effect unless this was interrupted
            if run.returncode:
                raise FlowerError(f"`flwr run` exited with {run.returncode}")
            status = commands.status()
    if status != COMPLETED:
        raise FlowerError(last_exception(log, start) or f"the run ended as {status}")


@contextmanager
def _superlink(commands: Commands, port: int, home: Path, log: IO[bytes]) -> Iterator[None]:
    """Run a SuperLink with its simulation runtime; stop it and all that it started."""
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        cwd=home,
        env=commands.environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        _wait_until_healthy(process, port)
        yield
    except BaseException:
        commands.stop_runs()
        raise
    finally:
        stop_group(process)


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise FlowerError(f"the SuperLink exited with {process.returncode} on start")
        if healthy(f"http://127.0.0.1:{port}"):
            return
        time.sleep(0.2)
    raise FlowerError(f"the SuperLink did not answer within {STARTUP_SECONDS} s")
