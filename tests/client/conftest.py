"""Flower's task identity, without which no message can be built."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def in_a_run(task_identity: None) -> Iterator[None]:
    """Messages are built everywhere; the app keeps torch to one thread."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
