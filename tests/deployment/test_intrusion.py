"""What a participant cannot do with its own key, from where it is in the network."""

from __future__ import annotations

import json
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto import control_pb2, fleet_pb2, message_pb2, runtime_pb2
from flwr.proto.node_pb2 import Node

from deployment import folder
from deployment.control import Operator
from deployment.gateway import CALLS
from deployment.local import Local
from deployment.processes import Processes
from none_core.flower.standalone import task_identity
from simulations import config
from simulations.engines.commands import Commands
from tests.deployment.intruder import Intruder

pytestmark = [pytest.mark.flower, pytest.mark.timeout(900)]

SERVER = 1  # the SuperLink's node id
APPS = '''
"""Asks two nodes twice, and writes down what they say."""
import json, pathlib, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@server.main()
def main(grid, context):
    heard = []
    while len(nodes := sorted(grid.get_node_ids())) < 2:
        time.sleep(0.5)
    for number in (1, 2):
        said = {n: ConfigRecord({"round": number, "for": str(n)}) for n in nodes}
        messages = [Message(RecordDict({"ask": said[n]}), n, "train") for n in nodes]
        replies = grid.send_and_receive(messages, timeout=120)
        answers = [(str(r.metadata.src_node_id), r.content["say"]["what"]) for r in replies]
        heard.append(sorted(answers))
    pathlib.Path(context.run_config["toy.output"]).write_text(json.dumps(heard))
'''
PYPROJECT = """
[project]
name = "toy"
version = "0.1.0"
[tool.flwr.app]
publisher = "toy"
[tool.flwr.app.components]
serverapp = "apps:server"
clientapp = "apps:client"
[tool.flwr.app.config]
toy.output = ""
"""


@dataclass
class Deployment:
    """A SuperLink, its gateway, its operator, and two participants that will not behave."""

    local: Local
    operator: Operator
    scratch: Path
    mine: Intruder
    other: Intruder


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    scratch = tmp_path_factory.mktemp("deployed")
    (scratch / "logs").mkdir()
    site = folder.prepare(
        scratch / "site", config.build({"experiment": {"name": "t", "clients": 2}})
    )
    with (
        Processes(scratch / "logs") as processes,
        (scratch / "operator.log").open("ab") as log,
    ):
        local = Local(site, scratch / "homes", processes)
        local.start_servers()
        operator = local.operator(log)
        operator.enrol(site.participants)
        mine, other = (Intruder(p, local.gateway, site.authority) for p in site.participants)
        yield Deployment(local, operator, scratch, mine, other)


def test_no_path_but_those_of_the_gateway_leads_anywhere(deployed: Deployment) -> None:
    # The operator can read what there is; the participant tries all of it.
    trust = ssl.create_default_context(cafile=deployed.local.site.authority)
    url = f"https://{deployed.local.superlink}/openapi.json"
    with urllib.request.urlopen(url, context=trust) as answer:
        api = json.load(answer)["paths"]
    attempts = [(verb.upper(), path) for path, verbs in api.items() for verb in verbs]
    assert len(attempts) > 60

    open_ = set()
    for verb, path in [*attempts, ("GET", "/openapi.json"), ("GET", "/docs")]:
        if deployed.mine.status_of(f"{verb} {path} HTTP/1.1") != 404:
            open_.add(path)

    assert open_ == {"/health", *(f"/v1/fleet/{call}" for call in CALLS)}


@pytest.mark.parametrize(
    "target",
    [
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/get-run/../../control/list-runs",
        "/v1/fleet/get-run%2f..%2f..%2fcontrol%2flist-runs",
        "//v1/control/list-runs",
        "/v1//control/list-runs",
        "/v1/fleet/get-run;/v1/control/list-runs",
        "https://127.0.0.1/v1/control/list-runs",
    ],
)
def test_no_way_of_writing_a_path_leads_past_the_gateway(deployed: Deployment, target: str) -> None:
    assert deployed.mine.status_of(f"POST {target} HTTP/1.1") in (400, 404)


def test_the_control_and_runtime_apis_are_the_operators(deployed: Deployment) -> None:
    mine = deployed.mine
    for path, request in (
        ("/v1/control/list-runs", control_pb2.ListRunsRequest()),
        ("/v1/control/start-run", control_pb2.StartRunRequest()),
        ("/v1/control/register-node", control_pb2.RegisterNodeRequest(public_key=b"mine")),
        ("/v1/control/list-nodes", control_pb2.ListNodesRequest()),
        ("/v1/runtime/acquire-task", runtime_pb2.AcquireTaskRequest()),
        ("/v1/runtime/get-nodes", runtime_pb2.GetNodesRequest()),
        ("/v1/fleet/register-node", fleet_pb2.RegisterNodeFleetRequest(public_key=b"mine")),
    ):
        assert mine.post(path, request).status_code == 404, path


def test_flowers_own_commands_get_nowhere_through_the_gateway(
    deployed: Deployment, tmp_path: Path
) -> None:
    local = deployed.local
    (tmp_path / "home").mkdir()
    nodes = deployed.operator.online()
    assert nodes == {str(deployed.mine.node_id), str(deployed.other.node_id)}
    with (tmp_path / "log").open("ab") as log:
        theirs = Commands(tmp_path / "home", local.gateway, log, local.site.authority)
        listed = theirs.ask("list")
        registered = theirs.ask("supernode", "register", str(local.site.participants[0].public_key))
        submitted = theirs.submit(_app(tmp_path), {})
        submitted.wait()

    assert not listed.get("success")
    assert not registered.get("success")
    assert submitted.returncode != 0
    assert deployed.operator.online() == nodes
    assert deployed.operator.ask("list") == {"success": True, "runs": []}


def test_messages_of_others_are_neither_read_nor_answered_nor_made(deployed: Deployment) -> None:
    mine, other, output = deployed.mine, deployed.other, deployed.scratch / "heard.json"
    app = _app(deployed.scratch)
    run = deployed.operator.submit(app, {"toy.output": str(output)})
    try:
        first = _wait_for(mine.receive)
        # Reading: the other's instruction waits for the other.
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            mine.receive(other.node_id)
        theirs = _wait_for(other.receive)
        assert first.content["ask"]["for"] == str(mine.node_id)
        assert theirs.content["ask"]["for"] == str(other.node_id)

        # Answering for it, with all that there is to know of its instruction.
        forged = _reply(theirs, "forged")
        assert mine.push(forged, sender=other.node_id).status_code == 403
        assert _asked_for(mine.push(_reply(theirs, "forged"))) == []
        # Instructing it, in the server's name or in the own.
        order = _order(first, other.node_id)
        assert mine.push(order, sender=SERVER).status_code == 403
        assert mine.push(order).status_code == 403
        assert other.receive() is None

        old = _reply(first, "old")
        mine.reply(old)
        other.reply(_reply(theirs, "true"))
        second = _wait_for(mine.receive)
        # Replaying: what was said once is not taken again.
        assert _asked_for(mine.push(old)) == []
        mine.reply(_reply(second, "new"))
        other.reply(_reply(_wait_for(other.receive), "true"))
        run.wait(120)
    finally:
        run.kill()
        run.wait()

    both = str(mine.node_id), str(other.node_id)
    expected = [sorted(zip(both, (said, "true"), strict=True)) for said in ("old", "new")]
    assert json.loads(output.read_text()) == [[list(pair) for pair in each] for each in expected]


def test_a_key_speaks_for_its_own_node_only(deployed: Deployment) -> None:
    node = Node(node_id=deployed.other.node_id)
    for name, request in (
        ("pull-messages", fleet_pb2.PullMessagesRequest(node=node)),
        ("push-messages", fleet_pb2.PushMessagesRequest(node=node)),
        ("pull-object", message_pb2.PullObjectRequest(node=node)),
        ("deactivate-node", fleet_pb2.DeactivateNodeRequest(node_id=node.node_id)),
    ):
        assert deployed.mine.post(f"/v1/fleet/{name}", request).status_code == 401, name


def _app(parent: Path) -> Path:
    app = parent / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(PYPROJECT)
    (app / "apps.py").write_text(APPS)
    return app


def _reply(message: Message, what: str) -> Message:
    with task_identity():
        return Message(RecordDict({"say": ConfigRecord({"what": what})}), reply_to=message)


def _order(message: Message, node_id: int) -> Message:
    with task_identity():
        order = Message(RecordDict({"ask": ConfigRecord({"round": 9})}), node_id, "train")
    order.metadata.__dict__["_run_id"] = message.metadata.run_id
    return order


def _asked_for(response: httpx.Response) -> list[str]:
    """Return the objects of a message that the SuperLink wants, none if it was not taken."""
    response.raise_for_status()
    answer = fleet_pb2.PushMessagesResponse()
    answer.ParseFromString(response.content)
    return list(answer.objects_to_push)


def _wait_for(receive: Callable[[], Message | None], seconds: float = 90) -> Message:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if message := receive():
            return message
        time.sleep(0.5)
    raise AssertionError(f"no message within {seconds} s")
