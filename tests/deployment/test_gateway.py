"""What the gateway passes on, and that nothing else reaches the SuperLink."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator

import httpx
import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from starlette.testclient import TestClient

from deployment import gateway

MINE, OTHER = 11, 22
MAX_BYTES = 4096


class SuperLink:
    """Records what reaches it."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.answer = httpx.Response(200, content=b"answer")

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self.answer


@pytest.fixture
def superlink() -> SuperLink:
    return SuperLink()


@pytest.fixture
def door(superlink: SuperLink) -> Iterator[TestClient]:
    transport = httpx.MockTransport(superlink)
    app = gateway.build("superlink:8000", ssl.create_default_context(), MAX_BYTES, transport)
    with TestClient(app, base_url="https://gateway", follow_redirects=False) as client:
        yield client


def pushed(sender: int, *, reply_to: str = "an-instruction") -> bytes:
    metadata = Metadata(src_node_id=sender, dst_node_id=1, reply_to_message_id=reply_to)
    return PushMessagesRequest(
        node=Node(node_id=MINE), messages_list=[Message(metadata=metadata)]
    ).SerializeToString()


def test_of_the_whole_api_only_the_calls_of_an_enrolled_node_pass(
    door: TestClient, superlink: SuperLink
) -> None:
    fleet = {path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    expected = fleet - {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
    others = ("/openapi.json", "/docs", "/redoc", "/", "/v1/fleet/", "/v1/fleet", "/metrics")

    for method, path in [*PROTOBUF_REQUEST_TYPES, *(("GET", path) for path in others)]:
        status = door.request(method, path).status_code
        assert status == (200 if path in expected else 404), path

    assert len(expected) == 10
    assert {request.url.path for request in superlink.requests} == expected


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("POST", "/health", 405),
        ("GET", "/v1/fleet/get-run", 405),
        ("PUT", "/v1/fleet/get-run", 405),
        ("POST", "/v1/fleet/get-run/", 404),
        ("POST", "/v1/fleet//get-run", 404),
        ("POST", "//v1/fleet/get-run", 404),
        ("POST", "/V1/fleet/get-run", 404),
        ("POST", "/v1/fleet/get-run%2f..%2f..%2fcontrol%2flist-runs", 404),
        ("POST", "/v1/fleet/%2e%2e/control/list-runs", 404),
        ("POST", "/v1/control/list-runs", 404),
    ],
)
def test_a_path_passes_as_it_is_written_or_not_at_all(
    door: TestClient, superlink: SuperLink, method: str, path: str, status: int
) -> None:
    assert door.request(method, path).status_code == status
    assert len(superlink.requests) == (status == 200)


def test_a_request_passes_with_its_body_and_no_more_headers_than_it_needs(
    door: TestClient, superlink: SuperLink
) -> None:
    needed = {"flwr-public-key": "k", "flwr-signature": "s", "flwr-timestamp": "t"}
    dangerous = {
        "flwr-task-token": "1",
        "flwr-superexec-signature": "1",
        "authorization": "Bearer 1",
        "cookie": "a=b",
        "x-forwarded-for": "127.0.0.1",
        "host": "superlink",
    }

    door.post("/v1/fleet/get-run?as=operator", content=b"body", headers=needed | dangerous)

    (request,) = superlink.requests
    assert str(request.url) == "https://superlink:8000/v1/fleet/get-run"
    assert request.content == b"body"
    assert {name: request.headers[name] for name in needed} == needed
    assert not set(dangerous) - {"host"} & set(request.headers)
    assert request.headers["host"] == "superlink:8000"


def test_an_answer_passes_with_its_status_and_no_other_headers(
    door: TestClient, superlink: SuperLink
) -> None:
    headers = {"content-type": "application/protobuf", "location": "/", "set-cookie": "a=b"}
    superlink.answer = httpx.Response(401, content=b"no", headers=headers)

    answer = door.post("/v1/fleet/pull-messages")

    assert (answer.status_code, answer.content) == (401, b"no")
    assert set(answer.headers) == {"content-type", "content-length"}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (pushed(MINE), 200),
        (PushMessagesRequest(node=Node(node_id=MINE)).SerializeToString(), 200),
        (pushed(OTHER), 403),
        (pushed(1), 403),  # the server's own id
        (pushed(MINE, reply_to=""), 403),
        (pushed(1, reply_to=""), 403),  # an instruction to another participant
        (b"\xff no protobuf", 400),
    ],
)
def test_messages_are_their_senders_replies_or_refused(
    door: TestClient, superlink: SuperLink, body: bytes, status: int
) -> None:
    assert door.post("/v1/fleet/push-messages", content=body).status_code == status
    assert [request.content for request in superlink.requests] == [body] * (status == 200)


def test_one_forged_message_among_others_is_enough(door: TestClient, superlink: SuperLink) -> None:
    request = PushMessagesRequest()
    request.ParseFromString(pushed(MINE))
    forged = PushMessagesRequest()
    forged.ParseFromString(pushed(OTHER))
    request.messages_list.extend(forged.messages_list)

    answer = door.post("/v1/fleet/push-messages", content=request.SerializeToString())

    assert answer.status_code == 403
    assert superlink.requests == []


def test_too_large_a_request_is_refused(door: TestClient, superlink: SuperLink) -> None:
    assert door.post("/v1/fleet/push-object", content=bytes(MAX_BYTES)).status_code == 200
    assert door.post("/v1/fleet/push-object", content=bytes(MAX_BYTES + 1)).status_code == 413
    assert len(superlink.requests) == 1


def test_a_superlink_that_is_away_is_worth_another_try() -> None:
    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    context = ssl.create_default_context()
    app = gateway.build("superlink:8000", context, MAX_BYTES, httpx.MockTransport(away))
    with TestClient(app) as door:
        assert door.post("/v1/fleet/pull-messages").status_code == 502


def test_what_a_superlink_fails_at_is_worth_another_try(
    door: TestClient, superlink: SuperLink
) -> None:
    superlink.answer = httpx.Response(500, content=b"database is locked")
    answer = door.post("/v1/fleet/push-object")
    assert (answer.status_code, answer.content) == (503, b"")


def test_a_superlink_is_asked_a_few_things_at_a_time() -> None:
    inside = most = 0

    async def slow(_: httpx.Request) -> httpx.Response:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0.01)
        inside -= 1
        return httpx.Response(200)

    context = ssl.create_default_context()
    app = gateway.build("superlink:8000", context, MAX_BYTES, httpx.MockTransport(slow))

    async def crowd() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="https://gateway") as client:
            calls = (client.post("/v1/fleet/pull-messages") for _ in range(5 * gateway.AT_ONCE))
            return [answer.status_code for answer in await asyncio.gather(*calls)]

    assert asyncio.run(crowd()) == [200] * (5 * gateway.AT_ONCE)
    assert most == gateway.AT_ONCE
