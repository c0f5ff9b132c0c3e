"""What every test of the Flower half needs: an identity to build messages with, and silence."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def in_a_task(task_identity: None) -> None:
    """Messages are built everywhere."""


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
