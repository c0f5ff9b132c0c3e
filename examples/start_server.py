"""(c) A legacy ``start_server`` deployment: gRPC channel, client and strategy stay as they are.

The ten clients are threads here, each with a connection of its own; elsewhere they are programs.
"""

import logging
import socket
import threading
import time

import torch
from client_fn import FlowerClient, get_weights, set_weights
from flwr.client import start_client
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerConfig, start_server
from flwr.server.strategy import FedAvg
from scene import PARTICIPANTS, ROUNDS, SIDE, Net, report, samples
from torch.utils.data import Subset

from none_core.flower.legacy import NoneClient, NoneStrategy


def client(address: str, participant: int) -> None:
    """Run one participant's program, once the server listens."""
    while not listening(address):
        time.sleep(0.1)
    trainset = samples(participant)
    none = NoneClient(Net, lambda context: trainset)

    def client_fn(context):
        return FlowerClient(Net(), Subset(trainset, none.kept(context))).to_client()

    start_client(server_address=address, client_fn=none.wrap(client_fn))


def server(address: str, defended: bool) -> None:
    """Run the server's program."""
    released = []
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_available_clients=PARTICIPANTS,
        initial_parameters=ndarrays_to_parameters(get_weights(Net())),
        evaluate_fn=lambda server_round, weights, _: released.append(weights),
    )
    if defended:
        strategy = NoneStrategy(strategy, Net, torch.zeros(1, 1, SIDE, SIDE))
    start_server(server_address=address, config=ServerConfig(num_rounds=ROUNDS), strategy=strategy)
    net = Net()
    set_weights(net, released[-1])
    report(defended, net.state_dict())


def free_address() -> str:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def listening(address: str) -> bool:
    """Tell whether a server can be reached."""
    host, port = address.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.ERROR)
    for defended in (False, True):
        address = free_address()
        clients = [
            threading.Thread(target=client, args=(address, participant), daemon=True)
            for participant in range(PARTICIPANTS)
        ]
        for thread in clients:
            thread.start()
        server(address, defended)
        for thread in clients:
            thread.join()
