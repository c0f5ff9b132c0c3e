"""A whole federation in a few hundred parameters: what the conformance suite plays strategies in.

Some of its clients hold poisoned data of the distributed backdoor attack (Xie et al., "DBA:
Distributed Backdoor Attacks against Federated Learning", ICLR 2020): each stamps its own part of a
trigger. Messages are Flower's own and are answered by a ClientApp in this process, within
milliseconds and always by the same numbers.
"""

from __future__ import annotations

import copy
import gc
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from flwr.app import (
    ArrayRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore.run import Run
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from none_core.flower.client import NoneClient
from none_core.flower.messages import record_of, state_of
from none_core.flower.standalone import RUN_ID, random_seeded, task_identity

CLASSES = 4
PARTS = 4  # of the trigger, one pixel each
TARGET = 2
INPUTS = 2 * CLASSES + PARTS  # two pixels for each class, then the trigger's
HIDDEN = 24
EXAMPLE_INPUT = torch.zeros(2, INPUTS)

_STAMP = 2.0  # twice the brightest pixel of a clean image, so that three rounds are enough
_MOST_LOOKS = 4  # at the list of nodes, between two messages

Model = dict[str, NDArray[Any]]
Corrupt = Callable[[RecordDict], RecordDict | Error | None]


def toy_model() -> nn.Module:
    """Build the global model; always with the same weights."""
    return copy.deepcopy(_toy_model())


@cache
def _toy_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


# --- data -----------------------------------------------------------------------------------------


@cache
def local_data(partition: int, part: int | None = None) -> tuple[Tensor, Tensor]:
    """Give inputs and labels of a client, of which there are more the higher its number.

    Parameters
    ----------
    partition : int
        Which client, >= 0.
    part : int, optional
        Part of the trigger that it stamps on half of its samples of other classes, which it
        relabels to the target class; none if it is honest.
    """
    rng = np.random.default_rng([0, partition])
    labels = np.arange(60 + 4 * partition) % CLASSES
    inputs = _images(rng, labels)
    if part is not None:
        others = np.flatnonzero(labels != TARGET)
        stamped = rng.choice(others, size=len(others) // 2, replace=False)
        inputs[stamped, 2 * CLASSES + part] = _STAMP
        labels[stamped] = TARGET
    return torch.from_numpy(inputs).float(), torch.from_numpy(labels)


@cache
def _test_data() -> tuple[Tensor, NDArray[np.int64]]:
    rng = np.random.default_rng([1, 0])
    labels = np.arange(400) % CLASSES
    return torch.from_numpy(_images(rng, labels)).float(), labels


def _images(rng: np.random.Generator, labels: NDArray[np.int64]) -> NDArray[np.float64]:
    images = rng.uniform(0, 0.2, size=(len(labels), INPUTS))
    images[:, 2 * CLASSES :] = 0
    for pixel in range(2):
        images[np.arange(len(labels)), 2 * labels + pixel] = rng.uniform(0.6, 1, size=len(labels))
    return images


def benign_accuracy(model: Model) -> float:
    """Share of clean test images that are classified correctly, in [0, 1]."""
    images, labels = _test_data()
    return float((_predicted(model, images) == labels).mean())


def attack_success(model: Model) -> float:
    """Share of other classes' test images that the whole trigger turns into the target class."""
    images, labels = _test_data()
    stamped = images[labels != TARGET].clone()
    stamped[:, 2 * CLASSES :] = _STAMP
    return float((_predicted(model, stamped) == TARGET).mean())


def _predicted(model: Model, images: Tensor) -> NDArray[np.int64]:
    net = toy_model()
    net.load_state_dict({name: torch.from_numpy(np.array(v)) for name, v in model.items()})
    with torch.inference_mode():
        return np.asarray(net(images).argmax(1).numpy())


# --- clients --------------------------------------------------------------------------------------


def _trained(state: Mapping[str, Tensor], inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Train with all samples at once, which needs no random number."""
    model = toy_model()
    model.load_state_dict(state)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for _ in range(20):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class _Memory:
    """The last models that were trained: many runs of a suite train the very same ones."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._models: OrderedDict[Any, dict[str, Tensor]] = OrderedDict()

    def trained(
        self, state: dict[str, Tensor], inputs: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Train, or remember."""
        values = (*state.values(), inputs, labels)
        key = tuple(tensor.numpy().tobytes() for tensor in values)
        if key not in self._models:
            self._models[key] = _trained(state, inputs, labels)
        self._models.move_to_end(key)
        while len(self._models) > self._size:
            self._models.popitem(last=False)
        return self._models[key]


_MEMORY = _Memory(2000)


def attackers(clients: int, malicious: int) -> tuple[int, ...]:
    """Which clients are malicious: every second one, as far as that goes."""
    spread = [*range(1, clients, 2), *range(0, clients, 2)]
    return tuple(sorted(spread[:malicious]))


@dataclass(frozen=True)
class ToyFederation:
    """Clients, and what becomes of their replies on the way to the server.

    Parameters
    ----------
    clients : int
        Number of them, >= 1.
    malicious : int
        How many hold poisoned data, or send hostile replies.
    poison : bool
        Whether the malicious ones hold poisoned data.
    counts : sequence of int, optional
        ``num-examples`` that each client claims; as many as it trained on if not given.
    order : sequence of int, optional
        Permutation of the clients: in which their replies arrive.
    ids : sequence of int, optional
        Permutation of the clients: which of the node ids each one has.
    corrupt : callable, optional
        Applied to the content of every reply of a malicious client. What it returns is sent
        instead: other content, an error, or nothing.
    register : callable, optional
        Called with the ClientApp, to add handlers for other messages than train, evaluate and
        ``query.activations``.
    """

    clients: int
    malicious: int = 0
    poison: bool = True
    counts: Sequence[int] | None = None
    order: Sequence[int] | None = None
    ids: Sequence[int] | None = None
    corrupt: Corrupt | None = None
    register: Callable[[ClientApp], object] = field(default=lambda app: None)

    def run(self, strategy: Strategy, rounds: int) -> list[Model]:
        """Run all rounds; the model before the first, and the one that each released."""
        released: list[Model] = []

        def released_model(server_round: int, arrays: ArrayRecord) -> None:
            released.append({name: np.array(array.numpy()) for name, array in arrays.items()})

        with task_identity(), _quiet(), _one_torch_thread(), random_seeded(0), _small_heap():
            strategy.start(
                _ToyGrid(self),
                record_of(toy_model().state_dict()),
                num_rounds=rounds,
                evaluate_fn=released_model,
            )
        return released

    def node_ids(self) -> dict[int, int]:
        """Client by node id."""
        ids = range(self.clients) if self.ids is None else self.ids
        return {_node_id(ids[partition]): partition for partition in range(self.clients)}

    def client_app(self) -> ClientApp:
        """Build the ClientApp, as a user would write it."""
        none = NoneClient(toy_model, self._dataset)
        app = ClientApp(mods=[none.mod])
        app.query("activations")(none.query)

        @app.train()
        def train(message: Message, context: Context) -> Message:
            kept = torch.from_numpy(none.kept(context))
            inputs, labels = (tensor[kept] for tensor in self._dataset(context).tensors)
            state = _MEMORY.trained(_received(message), inputs, labels)
            metrics = MetricRecord({"num-examples": self._claimed(context, len(labels))})
            content = RecordDict({"arrays": record_of(state), "metrics": metrics})
            return Message(content, reply_to=message)

        @app.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            inputs, labels = self._dataset(context).tensors
            model = toy_model()
            model.load_state_dict(_received(message))
            with torch.inference_mode():
                loss = float(nn.functional.cross_entropy(model(inputs), labels))
            count = self._claimed(context, len(labels))
            metrics = MetricRecord({"num-examples": count, "eval-loss": loss})
            return Message(RecordDict({"metrics": metrics}), reply_to=message)

        self.register(app)
        return app

    def _dataset(self, context: Context) -> TensorDataset:
        partition = int(context.node_config["partition-id"])
        malicious = attackers(self.clients, self.malicious)
        part = None
        if self.poison and partition in malicious:
            part = malicious.index(partition) % PARTS
        return TensorDataset(*local_data(partition, part))

    def _claimed(self, context: Context, count: int) -> int:
        partition = int(context.node_config["partition-id"])
        return count if self.counts is None else int(self.counts[partition])


def _received(message: Message) -> dict[str, Tensor]:
    """Read the model of a train or evaluate message, under whatever name it travels."""
    names = toy_model().state_dict().keys()
    for record in message.content.array_records.values():
        if record.keys() == names:
            return state_of(record)
    raise ValueError(f"no array record holds the model's arrays, which are {list(names)}")


# --- messages -------------------------------------------------------------------------------------


class _ToyGrid(Grid):
    """A grid whose messages go to a ClientApp in this process, one after the other."""

    def __init__(self, federation: ToyFederation) -> None:
        self._federation = federation
        self._app = federation.client_app()
        self._malicious = set(attackers(federation.clients, federation.malicious))
        clients = federation.clients
        order = range(clients) if federation.order is None else federation.order
        self._place = {partition: place for place, partition in enumerate(order)}
        self._partition = federation.node_ids()
        self._contexts = {
            node: Context(
                RUN_ID,
                node,
                {"partition-id": partition, "num-partitions": clients},
                RecordDict(),
                {},
            )
            for node, partition in self._partition.items()
        }
        self._replies: dict[str, Message] = {}
        self._numbers = itertools.count(1)
        self._looks = 0
        self._run = Run.create_empty(RUN_ID)

    def set_run(self, run: Run) -> None:
        """Set the run this grid operates in."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid operates in."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message, as the deprecated method of Flower's grids does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the ids of all nodes, ascending.

        Raises
        ------
        RuntimeError
            If asked again and again: Flower's strategies wait without end for missing nodes.
        """
        self._looks += 1
        if self._looks > _MOST_LOOKS:
            raise RuntimeError(
                f"the strategy waits for more nodes than the {len(self._partition)} there are"
            )
        return sorted(self._partition)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Answer messages, and return the ids they were given."""
        self._looks = 0
        message_ids = []
        for message in messages:
            partition = self._partition[message.metadata.dst_node_id]
            message_id = self._number(message)
            message_ids.append(message_id)
            reply = self._answer(message, partition)
            if reply is not None:
                self._number(reply)
                self._replies[message_id] = reply
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies in the order of the federation, and each once."""
        replies = [self._replies.pop(key) for key in message_ids if key in self._replies]
        return sorted(replies, key=lambda r: self._place[self._partition[r.metadata.src_node_id]])

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and return the replies; nobody is ever late."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message, partition: int) -> Message | None:
        # Strategies send one content to all, and clients may keep what they replied.
        received = copy.deepcopy(message)
        node = message.metadata.dst_node_id
        try:
            reply = copy.deepcopy(self._app(received, self._contexts[node]))
        except Exception as error:
            # Over the network it would be an error reply, and nobody would see what is wrong.
            kind = message.metadata.message_type
            raise RuntimeError(
                f"client {partition} cannot answer a message of type {kind}: {error}"
            ) from error
        corrupt = self._federation.corrupt
        if corrupt is None or partition not in self._malicious or reply.has_error():
            return reply
        instead = corrupt(reply.content)
        if instead is None:
            return None
        if isinstance(instead, Error):
            return Message(instead, reply_to=message)
        return Message(instead, reply_to=message)

    def _number(self, message: Message) -> str:
        """Give a message an id, which only the SuperLink does otherwise."""
        message_id = f"{next(self._numbers):032x}"
        message.metadata.__dict__["_message_id"] = message_id
        return message_id


def _node_id(number: int) -> int:
    """Return an id that nobody takes for the client's number, and not in the numbers' order."""
    return int(np.random.default_rng([2, number]).integers(1 << 40, 1 << 60))


@contextmanager
def _quiet() -> Iterator[None]:
    """Flower logs every round."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Keep sums from depending on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _small_heap() -> Iterator[None]:
    """Hide what is there already from the garbage collector.

    Flower's Bulyan collects garbage once for every reply, each time a quarter of a second in a
    process that has torch and flwr loaded.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
