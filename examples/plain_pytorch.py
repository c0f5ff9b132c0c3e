"""(d) Federated averaging in plain PyTorch, without Flower, and NONE in its loop."""

import copy

import torch
from scene import PARTICIPANTS, ROUNDS, SIDE, Net, report, samples, train
from torch.utils.data import DataLoader

from none_core.loop import LoopDefence


def average(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Average state dicts."""
    return {name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]}


def federate(defended: bool) -> None:
    """Train for all rounds."""
    datasets = [samples(participant) for participant in range(PARTICIPANTS)]
    model = Net()
    none = LoopDefence(model, torch.zeros(1, 1, SIDE, SIDE))
    for _ in range(ROUNDS):
        states = {}
        for participant, dataset in enumerate(datasets):
            local = copy.deepcopy(model)
            train(local, dataset)
            states[participant] = local.state_dict()
        if defended:
            states = {p: state for p, state in states.items() if p not in none.quarantined}
        model.load_state_dict(average(list(states.values())))
        if defended:
            reports = {p: none.report(model, DataLoader(d, 64)) for p, d in enumerate(datasets)}
            none.defend(model, reports)
    report(defended, model.state_dict())
    if defended:
        print("left out of the average:", *sorted(none.quarantined))


if __name__ == "__main__":
    for defended in (False, True):
        federate(defended)
