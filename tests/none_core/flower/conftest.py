"""What every test of the Flower half needs: an identity to build messages with, and silence."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity


@pytest.fixture(autouse=True, scope="module")
def task_identity() -> Iterator[None]:
    """Say which task this is: Flower builds no message without, and has no public way to say it."""
    names = ("_task_id", "_run_id", "_node_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    for name in names:
        setattr(TaskIdentity, name, 1)
    yield
    for name, value in before.items():
        setattr(TaskIdentity, name, value)


@pytest.fixture(autouse=True, scope="module")
def quiet_and_deterministic() -> Iterator[None]:
    """Thousands of rounds would log a lot; sums must not depend on the number of threads."""
    logger, threads = logging.getLogger("flwr"), torch.get_num_threads()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    yield
    logger.setLevel(level)
    torch.set_num_threads(threads)
