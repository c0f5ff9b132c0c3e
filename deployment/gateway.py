"""The participants' door: a reverse proxy that passes the calls of an enrolled SuperNode alone.

Flower's SuperLink serves its Fleet, Control and Runtime APIs on one port, and SuperNode keys guard
the Fleet API alone: whoever reaches that port may list runs, start one, or register a key. So the
participants reach this gateway instead. It passes ten calls by their exact paths, without query and
with the few headers that they need, and it reads the one call that hands in messages: the SuperLink
checks that a request comes from the node that it names, but not that the messages in it do. A
proxy that only compares paths could not see that.

``python -m deployment.gateway --superlink HOST:PORT --authority CA.pem ...``
"""

from __future__ import annotations

import argparse
import asyncio
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from flwr.proto.fleet_pb2 import PushMessagesRequest
from google.protobuf.message import DecodeError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

HEALTH, FLEET, PUSH = "/health", "/v1/fleet/", "push-messages"
# All calls of the Fleet API but two: registering and unregistering a node is the operator's.
CALLS = (
    *("activate-node", "deactivate-node", "send-node-heartbeat", "get-run", "get-fab"),
    *("pull-messages", "pull-object", "confirm-message-received", PUSH, "push-object"),
)
_ASKED = ("accept", "content-type", "flwr-public-key", "flwr-signature", "flwr-timestamp")
_ASKED_OF_VERSIONS = ("flwr-package-name", "flwr-package-version", "flwr-component-name")
_ANSWERED = ("content-type", "flwr-version-incompatibility-message")

MEGABYTE = 1 << 20
UPLOAD_SECONDS = 60.0  # for a request to arrive whole
ANSWER_SECONDS = 60.0  # for the SuperLink to answer it
CONNECTIONS = 512
# Requests in the SuperLink at a time: its database has one writer, and who waits for that longer
# than five seconds is answered with an error, for which a SuperNode gives its message up.
AT_ONCE = 4


class RefusedError(Exception):
    """A request that is not passed on, with the status that says why."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def build(
    superlink: str,
    verify: ssl.SSLContext,
    max_bytes: int,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Starlette:
    """Build the gateway.

    Parameters
    ----------
    superlink : str
        ``HOST:PORT``, reached with TLS.
    verify : ssl.SSLContext
        How the SuperLink's certificate is verified.
    max_bytes : int
        The largest body of a request; Flower sends arrays in pieces of 5 MiB.
    transport : httpx.AsyncBaseTransport, optional
        Stands in for the network.
    """
    client = httpx.AsyncClient(
        base_url=f"https://{superlink}",
        verify=verify,
        timeout=ANSWER_SECONDS,
        limits=httpx.Limits(max_connections=CONNECTIONS),
        transport=transport,
        trust_env=False,
    )
    turn = asyncio.Semaphore(AT_ONCE)

    async def passed(request: Request, url: str) -> Response:
        """Pass a request on, or answer why not; a SuperNode repeats what got 502 or 503."""
        try:
            body = await _body(request, max_bytes)
            if url == FLEET + PUSH:
                _check_sender(body)
            headers = {
                name: request.headers[name]
                for name in (*_ASKED, *_ASKED_OF_VERSIONS)
                if name in request.headers
            }
            async with turn:
                answer = await client.request(request.method, url, content=body, headers=headers)
        except RefusedError as refusal:
            return Response(status_code=refusal.status)
        except httpx.TransportError:
            return Response(status_code=502)
        if answer.status_code == 500:  # its database was locked, say; nothing was done
            return Response(status_code=503)
        kept = {name: answer.headers[name] for name in _ANSWERED if name in answer.headers}
        return Response(answer.content, answer.status_code, kept)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    def route(url: str, method: str) -> Route:
        # Where a request goes is said here; nothing of its own address is used.
        async def endpoint(request: Request) -> Response:
            return await passed(request, url)

        return Route(url, endpoint, methods=[method])

    routes = [route(FLEET + call, "POST") for call in CALLS]
    app = Starlette(routes=[*routes, route(HEALTH, "GET")], lifespan=lifespan)
    app.router.redirect_slashes = False
    return app


async def _body(request: Request, most: int) -> bytes:
    """Read the body, which may be neither too large nor too slow."""
    received = bytearray()
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for piece in request.stream():
                received += piece
                if len(received) > most:
                    raise RefusedError(413)
    except TimeoutError:
        raise RefusedError(408) from None
    return bytes(received)


def _check_sender(body: bytes) -> None:
    """Refuse messages that claim to be another's, and those that are no replies.

    Only the server gives instructions, and only to a node that asks for its own.
    """
    pushed = PushMessagesRequest()
    try:
        pushed.ParseFromString(body)
    except DecodeError:
        raise RefusedError(400) from None
    for message in pushed.messages_list:
        metadata = message.metadata
        if metadata.src_node_id != pushed.node.node_id or not metadata.reply_to_message_id:
            raise RefusedError(403)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until the process is told to stop."""
    parser = argparse.ArgumentParser(prog="python -m deployment.gateway")
    parser.add_argument("--superlink", required=True, metavar="HOST:PORT")
    parser.add_argument("--authority", required=True, type=Path, help="verifies the SuperLink")
    parser.add_argument("--certificate", required=True, type=Path, help="shown to SuperNodes")
    parser.add_argument("--key", required=True, type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8443)
    parser.add_argument("--max-megabytes", type=int, default=32, help="of one request")
    arguments = parser.parse_args(argv)
    verify = ssl.create_default_context(cafile=arguments.authority)
    uvicorn.run(
        build(arguments.superlink, verify, arguments.max_megabytes * MEGABYTE),
        host=arguments.host,
        port=arguments.port,
        ssl_certfile=arguments.certificate,
        ssl_keyfile=arguments.key,
        limit_concurrency=CONNECTIONS,
        server_header=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
