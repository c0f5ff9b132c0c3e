"""What containers use, as a stand-in for ``docker`` on the PATH tells it."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from deployment import memory
from deployment.memory import MemoryWatch

DOCKER = """#!/bin/sh
echo "$@" >> {calls}
case "$1" in
ps) printf 'aaa superlink\\nbbb supernode-1\\n';;
stats) printf 'aaa 1.5MiB / 320MiB\\nbbb 1GiB / 2GiB\\n';;
esac
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ``docker`` with two containers, and the file where it notes what it was asked."""
    noted = tmp_path / "calls"
    program = tmp_path / "docker"
    program.write_text(DOCKER.format(calls=noted), encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return noted


@pytest.mark.parametrize(
    ("usage", "size"),
    [
        ("123.5MiB / 690MiB", 129_499_136),
        ("1.25GiB / 8GiB", 1_342_177_280),
        ("512B / 1MiB", 512),
        ("4KiB", 4096),
        ("-- / --", 0),
        ("", 0),
        ("7XiB / 8XiB", 0),
    ],
)
def test_what_docker_prints_becomes_bytes(usage: str, size: int) -> None:
    assert memory.parse(usage) == size


def test_a_projects_containers_are_asked_by_their_ids(calls: Path) -> None:
    assert memory.used("mine") == {"superlink": 3 << 19, "supernode-1": 1 << 30}
    listed, asked = calls.read_text(encoding="utf-8").splitlines()
    assert "label=com.docker.compose.project=mine" in listed
    assert asked.endswith("aaa bbb")


def test_the_peak_is_that_of_all_containers_at_the_same_time() -> None:
    watch = MemoryWatch("mine")
    for sample in ({"a": 5, "b": 1}, {}, {"a": 2, "b": 3, "c": 2}):
        watch.note(sample)
    assert watch.peaks() == {"together": 7, "containers": {"a": 5, "b": 3, "c": 2}, "samples": 2}


def test_a_watch_samples_until_it_is_ended(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PERIOD_SECONDS", 0.01)
    watch = MemoryWatch("mine")
    watch.start()
    deadline = time.monotonic() + 30
    while watch.samples < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    watch.stop()
    asked = calls.read_text(encoding="utf-8")
    assert watch.samples >= 2
    assert watch.together == (3 << 19) + (1 << 30)
    time.sleep(0.1)
    assert calls.read_text(encoding="utf-8") == asked


@pytest.mark.parametrize("error", [FileNotFoundError("docker"), subprocess.TimeoutExpired("x", 1)])
def test_an_engine_that_does_not_answer_leaves_no_samples(
    error: Exception, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*words: object, **settings: object) -> None:
        tried.append(words)
        raise error

    tried: list[object] = []
    monkeypatch.setattr(memory, "PERIOD_SECONDS", 0.01)
    monkeypatch.setattr(subprocess, "run", fail)
    watch = MemoryWatch("mine")
    watch.start()
    deadline = time.monotonic() + 30
    while len(tried) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    watch.stop()
    assert len(tried) >= 2
    assert watch.peaks() == {"together": 0, "containers": {}, "samples": 0}


def test_a_watch_that_never_began_can_be_ended() -> None:
    watch = MemoryWatch("mine")
    watch.stop()
    assert watch.peaks()["samples"] == 0


def test_without_docker_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="docker"):
        memory.used("mine")
