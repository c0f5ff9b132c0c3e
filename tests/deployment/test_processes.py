"""Processes are ended with all that they started, and those that end early are complained of."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from deployment.processes import PAUSES, RECORD, Processes
from simulations.engines.commands import FlowerError

# Starts a child that ignores the polite signal, says both ids, and waits.
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import signal, time;"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def start(processes: Processes, name: str, home: Path, code: str) -> None:
    processes.start(name, [sys.executable, "-c", code], home, {})


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, FlowerError])
def test_all_are_ended_whatever_happens(tmp_path: Path, error: type[BaseException] | None) -> None:
    pids: list[int] = []
    try:
        with Processes(tmp_path) as processes:
            start(processes, "parent", tmp_path / "home", PARENT)
            log = processes.log("parent")
            wait_for(lambda: "ready" in log.read_text() and len(log.read_text().split()) == 3)
            pids = [int(word) for word in log.read_text().split() if word.isdigit()]
            assert (tmp_path / RECORD).read_text() == f"{pids[0]} parent\n"
            assert all(map(alive, pids))
            if error:
                raise error
    except (KeyboardInterrupt, FlowerError):
        pass
    assert len(pids) == 2
    wait_for(lambda: not any(map(alive, pids)))
    assert not (tmp_path / RECORD).exists()


def test_one_that_ends_by_itself_is_named_with_its_log(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        start(processes, "waits", tmp_path / "a", "import time; time.sleep(600)")
        processes.check()
        start(processes, "fails", tmp_path / "b", "raise SystemExit(7)")
        wait_for(lambda: not _passes(processes))
        with pytest.raises(FlowerError, match=rf"^fails ended with status 7 \(log: {tmp_path}"):
            processes.check()
        processes.stop("fails")
        processes.check()


def test_what_ends_is_revived_after_longer_and_longer_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("deployment.processes.time", SimpleNamespace(monotonic=lambda: now))
    with Processes(tmp_path) as processes:
        start(processes, "waits", tmp_path / "a", "import time; time.sleep(600)")
        waiting = processes.process_id("waits")
        start(processes, "fails", tmp_path / "b", "raise SystemExit(7)")
        for pause in PAUSES:
            before = processes.process_id("fails")
            wait_for(lambda: processes.ended() == ["fails"])
            processes.revive()
            if pause:
                assert processes.process_id("fails") == before  # not yet
                now += pause - 0.1
                processes.revive()
                assert processes.process_id("fails") == before
                now += 0.1
                processes.revive()
            assert processes.process_id("fails") != before
            assert f"{processes.process_id('fails')} fails" in (tmp_path / RECORD).read_text()
        wait_for(lambda: processes.ended() == ["fails"])
        with pytest.raises(FlowerError, match="fails ended with status 7"):
            processes.revive()
        assert processes.process_id("waits") == waiting


def test_a_program_sees_its_own_home_and_none_of_the_operators_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN_OF_THE_OPERATOR", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Processes(tmp_path) as processes:
        code = "import os; print(*os.environ, os.environ['HOME'], os.getcwd())"
        processes.start("says", [sys.executable, "-c", code], tmp_path / "home", {"GIVEN": "1"})
        wait_for(lambda: not _passes(processes))
    said = processes.log("says").read_text().split()
    assert said[-2:] == [str(tmp_path / "home")] * 2
    assert {"GIVEN", "PATH"} <= set(said)
    assert not {"TOKEN_OF_THE_OPERATOR", "PYTHONPATH"} & set(said)
    assert os.stat(tmp_path / "home").st_mode & 0o077 == 0


def _passes(processes: Processes) -> bool:
    try:
        processes.check()
    except FlowerError:
        return False
    return True
