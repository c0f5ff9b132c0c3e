"""What tests of several rooms need."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


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
