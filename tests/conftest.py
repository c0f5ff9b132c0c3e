"""What tests of several rooms need."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from none_core.flower import standalone


@pytest.fixture(scope="module")
def task_identity() -> Iterator[None]:
    """Flower builds no message outside a task."""
    with standalone.task_identity():
        yield


@pytest.fixture
def flower_log() -> Iterator[list[str]]:
    """Lines that Flower's logger takes, whatever others have made of its level and handlers."""
    logger, handler, lines = logging.getLogger("flwr"), logging.Handler(), []
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.setLevel(level)
    logger.removeHandler(handler)
