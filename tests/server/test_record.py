"""What a run leaves behind: whole files or none."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAvg

from none_core import snapshot
from none_core.detection import Detection
from none_core.flower import RoundRecord
from none_core.flower.messages import record_of
from none_core.snapshot import restored
from none_core.undo import Undo
from server.record import Folder, FolderError


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_it_makes_its_folder_and_takes_one_that_is_there(tmp_path: Path) -> None:
    Folder(tmp_path / "a" / "b")
    Folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_lines_are_appended(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    entries = [{"round": 1, "text": "ä\nb"}, {"round": 2, "text": ""}]
    for entry in entries:
        folder.progress(entry)
    lines = (tmp_path / "progress.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == entries


def test_a_torn_line_is_ended_first(tmp_path: Path) -> None:
    (tmp_path / "progress.jsonl").write_text('{"round": 1}\n{"rou')
    Folder(tmp_path).progress({"round": 2})
    assert (tmp_path / "progress.jsonl").read_text() == '{"round": 1}\n{"rou\n{"round": 2}\n'


def released(
    folder: Folder, server_round: int, state: dict[str, torch.Tensor], **more: Any
) -> None:
    record = RoundRecord(server_round, **more)
    folder.released(server_round, record_of(state), record, checkpoint=True)


def test_models_and_checkpoints_come_back(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    state = {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}
    folder.trail.open()
    folder.model("model.pt", state)
    released(folder, 7, state)
    audit = ["audit.jsonl", "audit.key", "audit.pub"]
    assert names(tmp_path) == [*audit, "checkpoints", "model.pt"]
    assert names(tmp_path / "checkpoints") == ["round-0007.pt"]
    for path in (tmp_path / "model.pt", tmp_path / "checkpoints" / "round-0007.pt"):
        loaded = torch.load(path, weights_only=True)
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_history_replaces_what_was_there(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for rounds in ([{"round": 0}], [{"round": 0}, {"round": 1}]):
        folder.history(rounds, {"malicious": [1]})
        written = json.loads((tmp_path / "history.json").read_text())
        assert written == {"rounds": rounds, "truth": {"malicious": [1]}}
    assert names(tmp_path) == ["history.json"]
    assert (tmp_path / "history.json").stat().st_mode & 0o777 == 0o644


def test_a_reset_leaves_the_way_back(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.trail.open()
    before = {"w": torch.arange(6.0).view(3, 2), "b": torch.ones(3)}
    after = {"w": before["w"].clone(), "b": torch.ones(3)}
    after["w"][1] = 0
    released(folder, 3, after, before=before)
    released(folder, 4, after)
    assert names(tmp_path / "undo") == ["round-0003.npz"]
    undo = restored(snapshot.read(tmp_path / "undo" / "round-0003.npz"), [Undo])
    assert {n: r.tolist() for n, r in undo.rows.items()} == {"w": [1]}
    assert torch.equal(undo.apply(after)["w"], before["w"])


class FullDisk:
    """Lets nothing be put in its place."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        def full(*args: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("none_core.files.os.replace", full)
        patch.setattr("server.record.Folder._append", full)


def test_what_a_full_disk_does_not_take_is_listed_until_it_does(
    tmp_path: Path, flower_log: list[str]
) -> None:
    folder, state = Folder(tmp_path), {"w": torch.ones(2)}
    folder.trail.open()

    def a_round(server_round: int) -> None:
        released(folder, server_round, state, before={"w": torch.zeros(2)})
        folder.history([{"round": server_round}], {})
        folder.timing([])
        folder.progress({"round": server_round})
        folder.keep(FedAvg(), server_round, record_of(state), {})

    with pytest.MonkeyPatch.context() as patch:
        FullDisk(patch)
        a_round(1)
        assert set(folder.unwritten) == {
            *("checkpoints/round-0001.pt", "undo/round-0001.npz", "history.json", "timing.json"),
            *("progress.jsonl", "resume.npz"),
        }
        assert set(folder.unwritten.values()) == {"No space left on device"}
        with pytest.raises(OSError, match="No space left"):
            folder.model("model.pt", state)  # without this the run was for nothing
    assert f"cannot write {tmp_path / 'history.json'}: No space left on device" in flower_log
    a_round(2)
    assert set(folder.unwritten) == {"checkpoints/round-0001.pt", "undo/round-0001.npz"}
    assert json.loads((tmp_path / "history.json").read_text())["rounds"] == [{"round": 2}]
    assert not list(tmp_path.rglob(".*"))  # no half file


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match=r"cannot write to .*Not a directory"):
        Folder(tmp_path / "file" / "inside")


def test_a_full_disk_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.record.os.fsync", full)
        with pytest.raises(FolderError, match="No space left on device"):
            Folder(tmp_path)


def test_the_evidence_is_what_the_contract_says(tmp_path: Path) -> None:
    layers = (SimpleNamespace(name="conv"), SimpleNamespace(name="fc"))
    defence = SimpleNamespace(
        neurons=SimpleNamespace(size=5, layers=layers), layer_of=np.array([0, 0, 1, 1, 1])
    )
    record = RoundRecord(4)
    record.neurons_reset = np.array([4, 1])
    record.before = {"w": torch.ones(2)}
    evidence = {30: np.arange(5.0), 10: np.arange(5.0) + 1, 20: np.arange(5.0) + 2}
    record.detection = Detection(
        np.linspace(0, 1, 5), np.array([4, 1]), True, client_evidence=evidence
    )
    Folder(tmp_path).evidence(defence, record, {10: 2, 20: 0})  # nobody knows node 30's partition
    with np.load(tmp_path / "evidence.npz", allow_pickle=False) as arrays:
        assert arrays["clients"].tolist() == [0, 2, 30]
        assert arrays["client_evidence"].dtype == np.float32
        assert arrays["client_evidence"].tolist() == [
            evidence[node].tolist() for node in (20, 10, 30)
        ]
        assert arrays["scores"].tolist() == np.linspace(0, 1, 5).tolist()
        assert arrays["reset"].tolist() == [False, True, False, False, True]
        assert arrays["layer_of"].tolist() == [0, 0, 1, 1, 1]
        assert arrays["layer_names"].tolist() == ["conv", "fc"]
        assert arrays["round"] == 4
    before = torch.load(tmp_path / "evidence_model.pt", weights_only=True)
    assert torch.equal(before["w"], torch.ones(2))
