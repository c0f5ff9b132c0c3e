"""(b) A legacy app with a ``server_fn`` and a ``client_fn``, and NONE around its strategy."""

import torch
from flwr.app import Context
from flwr.client import Client, ClientApp, NumPyClient
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from one_process import simulate
from scene import PARTICIPANTS, ROUNDS, SIDE, Net, report, samples, train
from torch.utils.data import Dataset, Subset

from none_core.flower.legacy import NoneClient, NoneStrategy


def get_weights(net):
    """Read a model's parameters."""
    return [value.numpy() for value in net.state_dict().values()]


def set_weights(net, parameters):
    """Write a model's parameters."""
    net.load_state_dict(dict(zip(net.state_dict(), map(torch.tensor, parameters), strict=True)))


def load_data(context: Context) -> Dataset:
    """Give a node's samples, always in the same order."""
    return samples(int(context.node_config["partition-id"]))


class FlowerClient(NumPyClient):
    """As Flower's old templates have it."""

    def __init__(self, net, trainset):
        self.net, self.trainset = net, trainset

    def fit(self, parameters, config):
        """Train."""
        set_weights(self.net, parameters)
        train(self.net, self.trainset)
        return get_weights(self.net), len(self.trainset), {}


none = NoneClient(Net, load_data)


def client_fn(context: Context) -> Client:
    """Make a node's client, with the samples that NONE left."""
    trainset = load_data(context)
    trainset = Subset(trainset, none.kept(context))
    return FlowerClient(Net(), trainset).to_client()


def server_fn(defended: bool) -> ServerAppComponents:
    """Make the server's half."""
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_available_clients=PARTICIPANTS,
        initial_parameters=ndarrays_to_parameters(get_weights(Net())),
        evaluate_fn=lambda server_round, weights, _: show(defended, server_round, weights),
    )
    if defended:
        strategy = NoneStrategy(strategy, Net, torch.zeros(1, 1, SIDE, SIDE))
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=ROUNDS))


def show(defended: bool, server_round: int, weights) -> None:
    """Print what the last round released."""
    if server_round == ROUNDS:
        net = Net()
        set_weights(net, weights)
        report(defended, net.state_dict())


client_app = ClientApp(client_fn=none.wrap(client_fn))

if __name__ == "__main__":
    for defended in (False, True):
        server_app = ServerApp(server_fn=lambda context, defended=defended: server_fn(defended))
        simulate(server_app, client_app, PARTICIPANTS)
