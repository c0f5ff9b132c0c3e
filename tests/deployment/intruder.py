"""A participant that holds a registered key and does with it what no SuperNode would."""

from __future__ import annotations

import socket
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, message_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable import inflatable_object as inflatable
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from google.protobuf.message import Message as Protobuf

from deployment.folder import Participant

Answer = TypeVar("Answer", bound=Protobuf)


@dataclass
class Intruder:
    """Sends signed requests, true or not, to one address.

    Parameters
    ----------
    participant : Participant
        Whose key it has.
    address : str
        ``HOST:PORT``, all of the network that it can reach.
    authority : Path
        Verifies that address.
    """

    participant: Participant
    address: str
    authority: Path
    node_id: int = field(init=False)

    def __post_init__(self) -> None:
        self._trust = ssl.create_default_context(cafile=self.authority)
        private = load_ssh_private_key(self.participant.key.read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        self._public = private.public_key()
        self._sign = NodeAuthHttpInterceptor(private, self._public)
        self._client = httpx.Client(verify=self._trust, timeout=30)
        public_key = public_key_to_bytes(self._public)
        request = fleet_pb2.ActivateNodeRequest(public_key=public_key, heartbeat_interval=600)
        answer = self.call("activate-node", request, fleet_pb2.ActivateNodeResponse)
        self.node_id = answer.node_id

    def post(self, path: str, content: Protobuf) -> httpx.Response:
        """Send a request, signed as a SuperNode does, and return whatever comes back."""
        request = self._client.build_request(
            "POST",
            f"https://{self.address}{path}",
            content=content.SerializeToString(),
            headers={"content-type": "application/protobuf"},
        )
        context = ProtobufRequestContext("", content, request)
        return self._sign.intercept(context, lambda signed: self._client.send(signed.request))

    def call(self, name: str, content: Protobuf, expected: type[Answer]) -> Answer:
        """Make a call of the Fleet API that is allowed."""
        response = self.post(f"/v1/fleet/{name}", content)
        response.raise_for_status()
        answer = expected()
        answer.ParseFromString(response.content)
        return answer

    def status_of(self, request_line: str) -> int:
        """Send a request line as it is, which no client library would."""
        host, _, port = self.address.partition(":")
        with (
            socket.create_connection((host, int(port)), timeout=10) as plain,
            self._trust.wrap_socket(plain, server_hostname=host) as connection,
        ):
            connection.sendall(
                f"{request_line}\r\nhost: {host}\r\ncontent-length: 0\r\n\r\n".encode()
            )
            return int(connection.recv(4096).split()[1])

    def receive(self, node_id: int | None = None) -> Message | None:
        """Take the next instruction for a node, its own if not another's, with its content."""
        node = Node(node_id=self.node_id if node_id is None else node_id)
        pulled = self.call(
            "pull-messages",
            fleet_pb2.PullMessagesRequest(node=node),
            fleet_pb2.PullMessagesResponse,
        )
        if not pulled.messages_list:
            return None
        head, tree = message_from_proto(pulled.messages_list[0]), pulled.message_object_trees[0]
        contents = {}
        for each in inflatable.iterate_object_tree(tree):
            request = message_pb2.PullObjectRequest(
                node=node, run_id=head.metadata.run_id, object_id=each.object_id
            )
            while True:  # the head of a message may be there before all of its content is
                answer = self.call("pull-object", request, message_pb2.PullObjectResponse)
                assert answer.object_found
                if answer.object_available:
                    break
                time.sleep(0.1)
            contents[each.object_id] = answer.object_content
        message = inflate_object_from_contents(head.metadata.message_id, contents)
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = head.metadata.message_id
        return message

    def push(self, message: Message, sender: int | None = None) -> httpx.Response:
        """Hand in the head of a message, in its own name or in another's."""
        message.metadata.__dict__["_message_id"] = message.object_id
        head = message_to_proto(message)
        head.content.Clear()  # it follows, object by object
        head.content.SetInParent()
        head.metadata.src_node_id = self.node_id if sender is None else sender
        request = fleet_pb2.PushMessagesRequest(
            node=Node(node_id=self.node_id),
            messages_list=[head],
            message_object_trees=[inflatable.get_object_tree(message)],
            clientapp_runtime_list=[0.1],
        )
        return self.post("/v1/fleet/push-messages", request)

    def reply(self, message: Message) -> None:
        """Hand in a whole reply, as a SuperNode does."""
        pushed = fleet_pb2.PushMessagesResponse()
        response = self.push(message)
        response.raise_for_status()
        pushed.ParseFromString(response.content)
        objects = inflatable.get_all_nested_objects(message)
        for object_id in pushed.objects_to_push:
            request = message_pb2.PushObjectRequest(
                node=Node(node_id=self.node_id),
                run_id=message.metadata.run_id,
                object_id=object_id,
                object_content=objects[object_id].deflate(),
                session_id=pushed.session_id,
            )
            self.call("push-object", request, message_pb2.PushObjectResponse)
