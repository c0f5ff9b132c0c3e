"""Clients of one process trace and run models on threads; torch.fx knows of one thread only."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from none_core.neurons import NeuronMap


def build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def test_models_can_be_traced_and_run_on_several_threads_at_once() -> None:
    x = torch.ones(2, 1, 8, 8)

    def traced(_: int) -> int:
        return NeuronMap.trace(build(), x).size

    def run(_: int) -> type[Tensor]:
        return type(build()(x))

    with ThreadPoolExecutor(4) as pool:
        sizes = [pool.submit(traced, i) for i in range(60)]
        types = [pool.submit(run, i) for i in range(300)]

        assert {size.result() for size in sizes} == {4}
        assert {kind.result() for kind in types} == {Tensor}
