"""What tests of several rooms need."""

from __future__ import annotations

import ast
import logging
import threading
from collections.abc import Iterator
from typing import Any

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


@pytest.fixture
def one_syntax_tree_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clients share a process, as threads: each array they read has a header that is parsed.

    CPython 3.11 counts the depth of a syntax tree for all threads together, and raises
    "SystemError: AST constructor recursion depth mismatch" when two are built at once.
    """
    parse, turn = ast.parse, threading.Lock()

    def parsed(*args: Any, **kwargs: Any) -> Any:
        with turn:
            return parse(*args, **kwargs)

    monkeypatch.setattr(ast, "parse", parsed)
