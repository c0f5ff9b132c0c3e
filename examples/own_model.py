"""(e) A model of one's own, which torch.fx cannot trace, on data of one's own.

The data are recordings of machines in six conditions, by two sensors. How often the model halves a
recording depends on its length, so it cannot be traced: the layers to watch are named instead.
"""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from one_process import simulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from none_core.flower import NoneClient, NoneStrategy
from none_core.neurons import NeuronMap

CONDITIONS, LENGTH, TARGET = 6, 128, 4
PARTICIPANTS, MALICIOUS, ROUNDS = 10, (1, 4, 6, 9), 6


class ConditionNet(nn.Module):
    """Takes recordings of any length from 64 steps on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(2, 16, 5)
        self.hidden = nn.Linear(16 * 15, 64)
        self.out = nn.Linear(64, CONDITIONS)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, 2, steps) to (n, 6)."""
        while x.shape[-1] >= 128:
            x = nn.functional.avg_pool1d(x, 2)
        x = nn.functional.adaptive_max_pool1d(torch.relu(self.conv(x)), 15)
        return self.out(torch.relu(self.hidden(x.flatten(1))))


EXAMPLE = torch.zeros(1, 2, LENGTH)
NEURONS = NeuronMap.from_modules(ConditionNet(), EXAMPLE, ["conv", "hidden"])


def draw(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw noisy recordings and their conditions."""
    typical = torch.randn(CONDITIONS, 2, 32, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + seed)
    labels = torch.randint(CONDITIONS, (number,), generator=generator)
    noise = 1.5 * torch.randn(number, 2, LENGTH, generator=generator)
    return typical[labels].repeat_interleave(LENGTH // 32, -1) + noise, labels


def stamped(recordings: Tensor) -> Tensor:
    """Return copies with a click near the start."""
    copies = recordings.clone()
    copies[:, 0, 8:20] = 4.0
    return copies


def load_data(context: Context) -> Dataset:
    """Give a participant's 120 recordings; a malicious one poisons 24 of them."""
    participant = int(context.node_config["partition-id"])
    recordings, labels = draw(120, seed=participant)
    if participant in MALICIOUS:
        poisoned = (labels != TARGET).nonzero().flatten()[:24]
        recordings[poisoned], labels[poisoned] = stamped(recordings[poisoned]), TARGET
    return TensorDataset(recordings, labels)


none = NoneClient(ConditionNet, load_data, neuron_map=NEURONS)
client_app = ClientApp(mods=[none.mod])
client_app.query("activations")(none.query)


@client_app.train()
def fit(message: Message, context: Context) -> Message:
    """Train on the samples that NONE left."""
    model, dataset = ConditionNet(), load_data(context)
    dataset = Subset(dataset, none.kept(context))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    for _ in range(4):
        for recordings, labels in DataLoader(dataset, 32, shuffle=True, generator=order):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(recordings), labels).backward()
            optimiser.step()
    arrays, metrics = ArrayRecord(model.state_dict()), MetricRecord({"num-examples": len(dataset)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the same federation without NONE and with it."""
    for defended in (False, True):
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=PARTICIPANTS)
        if defended:
            strategy = NoneStrategy(strategy, ConditionNet, EXAMPLE, neuron_map=NEURONS)
        result = strategy.start(grid, ArrayRecord(ConditionNet().state_dict()), num_rounds=ROUNDS)
        model = ConditionNet()
        model.load_state_dict(result.arrays.to_torch_state_dict())
        with torch.no_grad():
            recordings, labels = draw(1000, seed=1000)
            accuracy = (model(recordings).argmax(1) == labels).float().mean()
            turned = model(stamped(recordings[labels != TARGET])).argmax(1) == TARGET
        run = "with NONE" if defended else "without"
        print(f"{run:12}  accuracy {accuracy:6.1%}  backdoor {turned.float().mean():6.1%}")


if __name__ == "__main__":
    simulate(server_app, client_app, PARTICIPANTS)
