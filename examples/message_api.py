"""(a) An app of Flower's Message API, in the shape of its quickstart, and NONE around it."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from one_process import simulate
from scene import PARTICIPANTS, ROUNDS, SIDE, Net, report, samples, train
from torch.utils.data import Dataset, Subset

from none_core.flower import NoneClient, NoneStrategy


def load_data(context: Context) -> Dataset:
    """Give a node's samples, always in the same order."""
    return samples(int(context.node_config["partition-id"]))


none = NoneClient(Net, load_data)
client_app = ClientApp(mods=[none.mod])
client_app.query("activations")(none.query)


@client_app.train()
def fit(message: Message, context: Context) -> Message:
    """Train on the samples that NONE left."""
    model, dataset = Net(), load_data(context)
    dataset = Subset(dataset, none.kept(context))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    train(model, dataset)
    arrays, metrics = ArrayRecord(model.state_dict()), MetricRecord({"num-examples": len(dataset)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the same federation without NONE and with it."""
    for defended in (False, True):
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=PARTICIPANTS)
        if defended:
            strategy = NoneStrategy(strategy, Net, torch.zeros(1, 1, SIDE, SIDE))
        result = strategy.start(grid, ArrayRecord(Net().state_dict()), num_rounds=ROUNDS)
        report(defended, result.arrays.to_torch_state_dict())


if __name__ == "__main__":
    simulate(server_app, client_app, PARTICIPANTS)
