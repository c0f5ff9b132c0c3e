"""A SuperNode's ClientApps start in its nursery, or as Flower starts them if there is none."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from deployment.folder import Participant

ROOT = Path(__file__).resolve().parents[2]
SUPERNODE = ROOT / "deployment" / "supernode.py"
STAND_IN = ROOT / "deployment" / "bin" / "flwr-clientapp"


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def handed(tmp_path: Path) -> Participant:
    folder = tmp_path / "handed"
    folder.mkdir()
    participant = Participant(0, 3, 1, folder)
    participant.write_config(10, "/data of mine")
    return participant


def environment(*folders: Path) -> dict[str, str]:
    # The interpreter is found, Flower's own programs are not.
    python = folders[0] / "python3"
    python.unlink(missing_ok=True)
    python.symlink_to(sys.executable)
    path = [str(folder) for folder in folders]
    return {"PATH": os.pathsep.join([*path, "/usr/bin", "/bin"]), "HOME": str(folders[0])}


@pytest.mark.parametrize(
    ("flags", "config"),
    [
        ([], 'partition-id=3 num-partitions=10 data-root="/data of mine"'),
        (["--attack"], 'partition-id=3 num-partitions=10 data-root="/data of mine" attacker=1'),
    ],
)
def test_a_supernode_is_told_what_the_folder_says(
    tmp_path: Path, handed: Participant, flags: list[str], config: str
) -> None:
    program(tmp_path / "bin", "flower-supernode", 'for flag in "$@"; do echo "$flag"; done')
    command = [sys.executable, "-P", str(SUPERNODE), f"--participant={handed.folder}", *flags]
    done = subprocess.run(
        [*command, "--superlink", "gateway:8443"],
        env=environment(tmp_path / "bin"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == [
        *("--superlink", "gateway:8443"),
        f"--auth-supernode-private-key={handed.key}",
        f"--node-config={config}",
    ]


def test_clientapps_are_started_by_the_nursery_which_ends_with_the_supernode(
    tmp_path: Path, handed: Participant
) -> None:
    # On a busy machine the nursery may need longer to be ready than a request waits.
    ask = (
        'echo "$NURSERY"; until flwr-clientapp --help && flwr-clientapp --help; do :; done; sleep 5'
    )
    program(tmp_path / "bin", "flower-supernode", ask)
    command = [sys.executable, "-P", str(SUPERNODE), f"--participant={handed.folder}"]
    with (tmp_path / "log").open("wb") as log:
        subprocess.run(
            command,
            env=environment(tmp_path / "bin"),
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=200,
        )
    said = (tmp_path / "log").read_text()
    socket = Path(said.splitlines()[0])
    deadline = time.monotonic() + 60
    while socket.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not socket.exists()
    assert said.count("usage: flwr-clientapp") >= 2


def test_without_a_nursery_flowers_program_starts(tmp_path: Path) -> None:
    program(tmp_path / "bin", "flwr-clientapp", 'echo "$@"')
    done = subprocess.run(
        [str(STAND_IN), "--token", "a b"],
        env=environment(tmp_path / "bin", STAND_IN.parent) | {"NURSERY": str(tmp_path / "none")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "--token a b\n"


def test_the_stand_in_has_the_name_of_flowers_program() -> None:
    assert STAND_IN.name == "flwr-clientapp"
    assert os.access(STAND_IN, os.X_OK)
    assert (Path(sysconfig.get_path("scripts")) / STAND_IN.name).exists()
