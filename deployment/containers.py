"""A deployment in containers, as docker-compose.yml describes it, from start to end."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from rich.console import Console

from deployment import folder
from deployment.control import Operator
from deployment.memory import MemoryWatch
from simulations import results
from simulations.config import ConfigError, Experiment
from simulations.engines.commands import FlowerError, free_port, healthy, last_exception
from simulations.engines.flower import CHECKOUT
from simulations.runner import RunError

PARTICIPANTS = 10  # that docker-compose.yml describes
ATTACKERS = 4
HOSTS = ("localhost", "127.0.0.1", "superlink", "gateway")
INSIDE = "/participant/data", "/data", "/results"  # where containers find what they are given
UNPRIVILEGED = 10001  # whom files are handed to when the operator is root
SERVERS = ("superlink", "server-app", "gateway")
STARTUP_SECONDS = 300
ONLINE_SECONDS = 300
POLL_SECONDS = 1.0

# Limits where torch comes without CUDA, whose libraries take 100 MB and more in each container that
# imports them: with these, all stay below 8 GiB together.
LEAN = {"PARTICIPANT_MEMORY": "690m", "SERVER_APP_MEMORY": "640m"}
_HAS_CUDA = 3  # exit status
_CUDA = f"import sys, importlib.util as i; sys.exit({_HAS_CUDA} * bool(i.find_spec('nvidia')))"


class Compose:
    """docker-compose for this project, whichever of its two forms is installed.

    Parameters
    ----------
    variables : mapping
        What docker-compose.yml leaves open.
    profile : str
        "attack" or "honest".
    log : binary file
        What it prints goes there.
    """

    def __init__(self, variables: dict[str, str], profile: str, log: IO[bytes]) -> None:
        self._environment = {**os.environ, **variables, "DOCKER_BUILDKIT": "1"}
        self._command = [*_compose(), "--file", str(CHECKOUT / "docker-compose.yml")]
        self._command += ["--profile", profile]
        self._log = log

    def __call__(self, *words: str) -> None:
        """Run one of its commands.

        Raises
        ------
        FlowerError
            When it fails.
        """
        _check_status(words, self._status(words))

    def build(self, service: str) -> None:
        """Build a service's image with BuildKit, or without it where its component is not there.

        Raises
        ------
        FlowerError
            When neither succeeds.
        """
        try:
            self("build", service)
        except FlowerError:
            self._environment["DOCKER_BUILDKIT"] = "0"
            self("build", service)

    def grant_memory(self, service: str) -> bool:
        """Lower the limits on memory to `LEAN` if a service's image has no CUDA; say whether.

        Limits that the environment names stay as they are.

        Raises
        ------
        FlowerError
            When a container of it cannot be run.
        """
        words = ("run", "--rm", "--no-deps", service, "python", "-c", _CUDA)
        status = self._status(words)
        if status == _HAS_CUDA:
            return False
        _check_status(words, status)
        self._environment = LEAN | self._environment
        return True

    def _status(self, words: Sequence[str]) -> int:
        return subprocess.run(
            [*self._command, *words],
            cwd=CHECKOUT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        ).returncode


def _check_status(words: Sequence[str], status: int) -> None:
    if status:
        raise FlowerError(f"`docker-compose {' '.join(words)}` exited with {status}")


def run_in_containers(experiment: Experiment, log: Path, console: Console) -> None:
    """Run an experiment's apps between containers, all of which are removed afterwards.

    Parameters
    ----------
    experiment : Experiment
        With ten clients, none or four of them malicious.
    log : Path
        Where the ServerApp logs go; the containers' go to ``containers.log`` beside it, and what
        memory they used to ``memory.json``.
    console : Console
        Is told how far the deployment is.

    Raises
    ------
    ConfigError
        When the file describes another number of participants.
    RunError
        When a container does not start, or the run fails.
    """
    _check(experiment)
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - began:6.1f} s  {text}", highlight=False, soft_wrap=True)

    scratch = CHECKOUT / ".deployment"
    scratch.mkdir(mode=0o700, exist_ok=True)
    try:
        with (
            tempfile.TemporaryDirectory(dir=scratch) as name,
            log.open("ab") as stream,
            (log.parent / "containers.log").open("wb") as containers,
        ):
            site = folder.prepare(Path(name) / "site", experiment, HOSTS, INSIDE[0])
            port = free_port()
            variables = {
                "COMPOSE_PROJECT_NAME": f"deployment{os.getpid()}",
                "SITE": str(site.folder),
                "RESULTS": str(log.parent),
                "OPERATOR_PORT": str(port),
                "OWNER": owner_of(site.folder, log.parent),
            }
            profile = "honest" if experiment.attack.name == "none" else "attack"
            compose = Compose(variables, profile, containers)
            say("keys, certificates and the shares of the data written; building the image")
            compose.build(SERVERS[0])
            watch = MemoryWatch(variables["COMPOSE_PROJECT_NAME"])
            try:
                if not compose.grant_memory(SERVERS[0]):
                    say("the image's torch has CUDA: participants and ServerApp get more memory")
                watch.start()
                compose("up", "--detach", *SERVERS)
                _wait_for_superlink(port, site.authority)
                say(f"SuperLink at 127.0.0.1:{port}, for the operator alone")
                (Path(name) / "operator").mkdir(mode=0o700)
                home, address = Path(name) / "operator", f"127.0.0.1:{port}"
                operator = Operator(home, address, stream, site.authority)
                nodes = operator.enrol(site.participants)
                say("keys registered")
                compose("up", "--detach")
                operator.wait_for(nodes, lambda: None, ONLINE_SECONDS)
                say(f"{len(nodes)} SuperNodes online")
                operator.run(_inside(experiment), Path(INSIDE[1]), lambda: None)
                say("run completed")
            finally:
                watch.stop()
                compose("logs", "--no-color")
                compose("down", "--volumes")
                results.write(log.parent, watch.peaks(), results.MEMORY)
                say(_memory(watch))
    except (FlowerError, OSError) as error:
        raise RunError(last_exception(log) or str(error)) from error
    finally:
        if os.geteuid() == 0:
            folder.hand_over(log.parent, 0)


def _check(experiment: Experiment) -> None:
    clients, attack = experiment.experiment.clients, experiment.attack
    if clients != PARTICIPANTS:
        raise ConfigError(
            f"experiment.clients = {clients} is not legal in containers: expected {PARTICIPANTS}, "
            "which docker-compose.yml describes"
        )
    if attack.name != "none" and attack.malicious != ATTACKERS:
        raise ConfigError(
            f"attack.malicious = {attack.malicious} is not legal in containers: expected "
            f"{ATTACKERS}, which docker-compose.yml describes"
        )


def owner_of(*folders: Path) -> str:
    """Say whom the containers run as: the operator, or if that is root, somebody who is not."""
    if os.geteuid():
        return f"{os.geteuid()}:{os.getegid()}"
    for each in folders:
        folder.hand_over(each, UNPRIVILEGED)
    return f"{UNPRIVILEGED}:{UNPRIVILEGED}"


def _inside(experiment: Experiment) -> Experiment:
    run = experiment.run.model_copy(update={"output": INSIDE[2]})
    return experiment.model_copy(update={"run": run})


def _memory(watch: MemoryWatch) -> str:
    if not watch.samples:
        return "what memory the containers used could not be read"
    return f"all containers together used at most {watch.together / 1e6:,.0f} MB"


def _wait_for_superlink(port: int, authority: Path) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while not healthy(f"https://127.0.0.1:{port}", authority):
        if time.monotonic() > deadline:
            raise FlowerError(f"the SuperLink did not answer within {STARTUP_SECONDS} s")
        time.sleep(POLL_SECONDS)


def _compose() -> list[str]:
    """Find docker-compose."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    if shutil.which("docker"):
        return ["docker", "compose"]
    raise FlowerError("neither docker-compose nor docker is installed")
