"""Flower apps that write what the real ones would, without training anything."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from simulations import plots
from tests.simulations.synthetic import leave_behind


@pytest.fixture
def apps(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replace both Flower apps; the body of the ServerApp is under "main"."""
    body = {"main": leave_behind}
    server, client = ServerApp(), ClientApp()

    @server.main()
    def main(grid: Any, context: Any) -> None:
        body["main"](Path(context.run_config["run.output"]), context.run_config)

    for name, app in (("server.app", server), ("client.app", client)):
        module = ModuleType(name)
        module.app = app
        monkeypatch.setitem(sys.modules, name, module)
    return body


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing: figures take most of the time of a run that trains nothing."""
    monkeypatch.setattr(plots, "draw", lambda *_: [])
