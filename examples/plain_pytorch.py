"""Federated averaging in plain PyTorch, without Flower, and NONE in it."""

import copy

import numpy as np
import torch
from scene import CLASSES, PARTICIPANTS, ROUNDS, SIDE, Net, report, samples, train
from torch.utils.data import DataLoader

from none_core.activations import ReportSpec, build_report
from none_core.decision import Policy, decide
from none_core.detection import Mixture
from none_core.neurons import NeuronMap


def run(defended: bool) -> None:
    model, datasets = Net(), [samples(p) for p in range(PARTICIPANTS)]
    for _ in range(ROUNDS):
        states = []
        for dataset in datasets:
            local = copy.deepcopy(model)
            train(local, dataset)
            states.append(local.state_dict())
        model.load_state_dict({k: torch.stack([s[k] for s in states]).mean(0) for k in states[0]})
        report("x", model.state_dict())
run(False)
