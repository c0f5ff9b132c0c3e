"""A deployment of plain processes on 127.0.0.1: one SuperLink, one gateway, many SuperNodes.

What separates the participants from the operator here is what they are told, not the machine: a
process on it can reach every port. Between machines, or containers, the network does the rest.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from rich.console import Console

from deployment import folder
from deployment.control import Operator
from deployment.folder import Participant, Site
from deployment.processes import Processes
from simulations.config import Experiment
from simulations.engines.commands import SETTINGS, FlowerError, free_port, healthy, last_exception
from simulations.engines.flower import CHECKOUT
from simulations.runner import RunError

STARTUP_SECONDS = 180
ONLINE_SECONDS = 300
POLL_SECONDS = 0.5
LOGS = "logs"
SUPERNODE = CHECKOUT / "deployment" / "supernode.py"

# How often the starter of an app looks for work. The SuperNode and the ServerApp themselves ask the
# SuperLink every three seconds, and nothing changes that.
POLLING = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5"}


class Local:
    """The processes of one deployment.

    Parameters
    ----------
    site : Site
    homes : Path
        A folder for what they keep.
    processes : Processes
    """

    def __init__(self, site: Site, homes: Path, processes: Processes) -> None:
        self.site = site
        self._homes = homes
        self._processes = processes
        self.superlink = f"127.0.0.1:{free_port()}"
        self.gateway = f"127.0.0.1:{free_port()}"

    def operator(self, log: IO[bytes]) -> Operator:
        """Return who commands the SuperLink."""
        home = self._homes / "operator"
        home.mkdir(mode=0o700)
        return Operator(home, self.superlink, log, self.site.authority)

    def start_servers(self) -> None:
        """Start the SuperLink, what starts its ServerApps, and the gateway; wait for them."""
        site = self.site
        trust = ["--ssl-ca-certfile", str(site.authority)]
        secret = ["--superexec-auth-secret-file", str(site.secret)]
        superlink = ["flower-superlink", *_listen(self.superlink), *trust]
        superlink += ["--ssl-certfile", str(site.superlink / "certificate.pem")]
        superlink += ["--ssl-keyfile", str(site.superlink / "key.pem"), "--enable-supernode-auth"]
        superlink += ["--database", str(site.state / "state.db"), "--isolation", "process"]
        superlink += [*secret, "--disable-runtime-dependency-installation"]
        self._start("superlink", superlink)
        self._wait_for("superlink", self.superlink)
        runner = ["flower-superexec", "--runtime-api-address", self.superlink]
        self._start("server-app", [*runner, "--root-certificates", str(site.authority), *secret])
        gateway = [sys.executable, "-m", "deployment.gateway", *_listen(self.gateway)]
        gateway += ["--superlink", self.superlink, "--authority", str(site.authority)]
        gateway += ["--certificate", str(site.gateway / "certificate.pem")]
        gateway += ["--key", str(site.gateway / "key.pem")]
        self._start("gateway", gateway, {"PYTHONPATH": str(CHECKOUT)})
        self._wait_for("gateway", self.gateway)

    def start_participant(self, participant: Participant) -> None:
        """Start a SuperNode; `Operator.wait_for` waits until it is online."""
        command = [sys.executable, "-P", str(SUPERNODE), f"--participant={participant.folder}"]
        command += ["--attack"] if participant.attacker is not None else []
        command += ["--superlink", self.gateway, "--root-certificates", str(self.site.authority)]
        self._start(participant.name, [*command, "--port", str(free_port())])

    def _start(self, name: str, command: list[str], more: dict[str, str] | None = None) -> None:
        home = self._homes / name
        settings = {**SETTINGS, "FLWR_HOME": str(home / "flwr"), **POLLING, **(more or {})}
        self._processes.start(name, command, home, settings)

    def _wait_for(self, name: str, address: str) -> None:
        def is_healthy() -> bool:
            return healthy(f"https://{address}", self.site.authority)

        wait_until(is_healthy, f"the {name} did not answer", self._processes, STARTUP_SECONDS)


def run_locally(experiment: Experiment, log: Path, console: Console) -> None:
    """Run an experiment's apps between processes of this machine, all of which are ended.

    Parameters
    ----------
    experiment : Experiment
    log : Path
        Where the ServerApp logs go; those of each process go to ``logs/`` beside it.
    console : Console
        Is told how far the deployment is.

    Raises
    ------
    RunError
        When a process does not start, ends before its time, or the run fails.
    """
    logs = log.parent / LOGS
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - began:6.1f} s  {text}", highlight=False, soft_wrap=True)

    try:
        with (
            tempfile.TemporaryDirectory(prefix="deployment-") as scratch,
            Processes(logs) as processes,
            log.open("ab") as stream,
        ):
            site = folder.prepare(Path(scratch) / "site", experiment)
            say(f"keys, certificates and {len(site.participants)} shares of the data written")
            local = Local(site, Path(scratch) / "homes", processes)
            local.start_servers()
            say(f"SuperLink at {local.superlink}, gateway at {local.gateway}")
            operator = local.operator(stream)
            nodes = operator.enrol(site.participants)
            say("keys registered")
            for participant in site.participants:
                local.start_participant(participant)
            operator.wait_for(nodes, processes.revive, ONLINE_SECONDS)
            say(f"{len(nodes)} SuperNodes online")
            operator.run(experiment, site.test_data, processes.revive)
            say("run completed")
    except (FlowerError, OSError) as error:
        raise RunError(last_exception(log) or str(error)) from error


def _listen(address: str) -> list[str]:
    host, _, port = address.partition(":")
    return ["--host", host, "--port", port]


def wait_until(
    condition: Callable[[], bool], otherwise: str, processes: Processes, seconds: float
) -> None:
    """Wait until something holds.

    Raises
    ------
    FlowerError
        When it does not in time, or a process has ended.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        processes.check()
        if time.monotonic() > deadline:
            raise FlowerError(f"{otherwise} within {seconds:.0f} s")
        time.sleep(POLL_SECONDS)
