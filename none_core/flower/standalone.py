"""For apps that run outside Flower's own processes, in simulations and tests."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1


@contextmanager
def task_identity() -> Iterator[None]:
    """Say which task this process is.

    Flower has no public way to do so, and ``Message`` cannot be built without: its own processes
    set these three when they start a task.
    """
    names = ("_task_id", "_run_id", "_node_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    for name, value in zip(names, (1, RUN_ID, SUPERLINK_NODE_ID), strict=True):
        setattr(TaskIdentity, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


@contextmanager
def random_seeded(seed: int) -> Iterator[None]:
    """Seed the global generator that Flower's strategies draw nodes from; its state is put back."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
