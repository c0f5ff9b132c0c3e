"""The containers of docker-compose.yml as they are: who runs as whom, and who reaches what.

Needs a Docker engine and the image (``make deploy`` builds it).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployment import folder
from deployment.containers import HOSTS, INSIDE, Compose, owner_of
from simulations import config
from simulations.engines.commands import free_port

IMAGE = os.environ.get("IMAGE", "none-defense")
STARTED = ("superlink", "gateway", "server-app")


def missing() -> str:
    """Why there can be no containers, or nothing."""
    for command in (["docker", "info"], ["docker", "image", "inspect", IMAGE]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except OSError as error:
            return f"docker: {error.strerror}"
        if done.returncode:
            return f"`{' '.join(command)}`: {done.stderr.strip().splitlines()[-1]}"
    return ""


REASON = missing()
pytestmark = [
    *(pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1200)),
    pytest.mark.skipif(bool(REASON), reason=REASON or "there is a Docker engine"),
]

# Tries to reach something, and says whether it could.
REACH = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)
    print("reached")
except OSError as error:
    print("refused")
"""


class Project:
    """Some of the containers, running."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def id_of(self, service: str) -> str:
        command = ["docker-compose", "--profile", "attack", "ps", "-q", service]
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(
            command, cwd=root, env=self.environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def inspect(self, service: str) -> dict[str, object]:
        command = ["docker", "inspect", self.id_of(service)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return dict(json.loads(done.stdout)[0])

    def run(self, service: str, *command: str) -> subprocess.CompletedProcess[str]:
        words = ["docker", "exec", self.id_of(service), *command]
        return subprocess.run(words, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    scratch = tmp_path_factory.mktemp("containers")
    results = scratch / "results"
    results.mkdir()
    experiment = config.build(
        {"experiment": {"name": "t", "clients": 10}, "attack": {"name": "dba", "malicious": 4}}
    )
    site = folder.prepare(scratch / "site", experiment, HOSTS, INSIDE[0])
    variables = {
        "COMPOSE_PROJECT_NAME": f"test{os.getpid()}",
        "SITE": str(site.folder),
        "RESULTS": str(results),
        "OPERATOR_PORT": str(free_port()),
        "OWNER": owner_of(site.folder, results),
    }
    with (scratch / "log").open("wb") as log:
        compose = Compose(variables, "attack", log)
        try:
            compose("up", "--detach", "--no-build", *STARTED)
            yield Project({**os.environ, **variables})
        finally:
            compose("down", "--volumes")


@pytest.mark.parametrize("service", ["superlink", "gateway", "server-app"])
def test_a_server_is_confined(project: Project, service: str) -> None:
    host = project.inspect(service)["HostConfig"]
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert host["Memory"] > 0
    assert project.run(service, "id", "-u").stdout.strip() != "0"
    assert project.run(service, "touch", "/app/x").returncode != 0
    capabilities = project.run(service, "grep", "CapEff", "/proc/self/status").stdout.split()
    assert int(capabilities[1], 16) == 0


def test_from_where_participants_are_only_the_gateway_can_be_reached(project: Project) -> None:
    networks = project.inspect("superlink")["NetworkSettings"]["Networks"]
    addresses = [network["IPAddress"] for network in networks.values()]
    assert len(addresses) == 2
    image = project.inspect("gateway")["Config"]["Image"]
    people = next(
        n for n in project.inspect("gateway")["NetworkSettings"]["Networks"] if "parti" in n
    )

    def reach(host: str, port: int) -> str:
        command = ["docker", "run", "--rm", "--network", people, image, "python", "-c", REACH]
        done = subprocess.run(
            [*command, host, str(port)], capture_output=True, text=True, timeout=120
        )
        return done.stdout.strip()

    assert reach("gateway", 8443) == "reached"
    assert reach("superlink", 8000) == "refused"
    assert [reach(address, 8000) for address in addresses] == ["refused"] * 2


def test_the_operator_reaches_the_superlink_on_loopback_alone(project: Project) -> None:
    ports = project.inspect("superlink")["NetworkSettings"]["Ports"]["8000/tcp"]
    assert ports == [{"HostIp": "127.0.0.1", "HostPort": project.environment["OPERATOR_PORT"]}]
    assert not any((project.inspect("gateway")["NetworkSettings"]["Ports"] or {}).values())
