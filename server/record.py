"""What a run leaves behind, file by file: history, checkpoints, audit trail and evidence."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from logging import WARNING
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.common.logger import log
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from none_core import files, snapshot
from none_core.flower import Defence, RoundRecord, resume
from none_core.flower.messages import state_of
from none_core.snapshot import plain
from none_core.trail import RELEASED, Trail, checkpoint_of, digest_of_model, undo_of
from none_core.undo import Undo


class FolderError(RuntimeError):
    """A folder that cannot take the results: why, in one sentence."""


class Folder:
    """The output folder of one run.

    While the run goes on, what cannot be written is logged and listed, and the run goes on: most
    files are written anew in every round. The final model and the end of the audit trail must be
    written.

    Parameters
    ----------
    path : Path
        Made if it does not exist.
    audit_key : Path, optional
        The private key of the audit trail.

    Attributes
    ----------
    trail : Trail
        The audit trail; to be opened, or resumed, by its user.
    unwritten : dict of str to str
        What could not be written and why, by file.

    Raises
    ------
    FolderError
        If nothing can be written there.
    """

    def __init__(self, path: Path, audit_key: Path | None = None) -> None:
        self.path = path
        self.unwritten: dict[str, str] = {}
        self.trail = Trail(path / "audit.jsonl", audit_key)
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(b"x")
                os.fsync(file.fileno())
        except OSError as error:
            raise FolderError(f"cannot write to {path}: {error.strerror}") from None

    @property
    def snapshot(self) -> Path:
        """What a run is resumed from."""
        return self.path / "resume.npz"

    def keep(
        self, strategy: Strategy, server_round: int, arrays: ArrayRecord, more: dict[str, Any]
    ) -> None:
        """Write what a resumed run needs of the rounds so far."""
        self._try(
            self.snapshot.name,
            lambda: resume.keep(self.snapshot, strategy, server_round, arrays, more),
        )

    def progress(self, entry: Mapping[str, Any]) -> None:
        """Append one line for whoever watches the run."""
        self._try("progress.jsonl", lambda: self._append("progress.jsonl", entry))

    def released(
        self, server_round: int, arrays: ArrayRecord, record: RoundRecord, checkpoint: bool
    ) -> None:
        """Take down which model a round released, and what leads back over its reset.

        Parameters
        ----------
        server_round : int
        arrays : ArrayRecord
        record : RoundRecord
        checkpoint : bool
            Whether the model itself is kept, too.
        """
        state = state_of(arrays)
        self.trail.append(RELEASED, round=server_round, model=digest_of_model(state))
        if record.before is not None:
            undo = Undo.between(record.before, state)
            target = undo_of(self.trail.file, server_round)
            self._try(
                f"undo/{target.name}", lambda: snapshot.write(target, plain(undo, [Undo])), target
            )
        if checkpoint:
            target = checkpoint_of(self.trail.file, server_round)
            name = f"checkpoints/{target.name}"
            self._try(name, lambda: self.model(name, state), target)

    def model(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Write a state dict."""
        files.replace(self.path / name, lambda file: torch.save(dict(state), file))

    def history(
        self,
        rounds: list[dict[str, Any]],
        truth: Mapping[str, Any],
        privacy: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        """Write everything that was measured and repeats when the same seed is run again.

        What clients say of their privacy is only there if one of them said something.
        """
        content: dict[str, Any] = {"rounds": rounds, "truth": truth}
        if privacy:
            content["privacy"] = {str(client): privacy[client] for client in sorted(privacy)}
        self._try("history.json", lambda: self._json("history.json", **content))

    def timing(self, rounds: list[dict[str, float]]) -> None:
        """Write how long each phase of each round took, in seconds by the clock."""
        self._try("timing.json", lambda: self._json("timing.json", rounds=rounds))

    def patterns(self, record: RoundRecord) -> None:
        """Write what clients show of the triggers that they found: mask and pattern by label."""
        arrays = {str(label): pattern for label, pattern in record.patterns.items()}
        target = self.path / "patterns.npz"
        self._try(
            target.name,
            lambda: files.replace(
                target, lambda file: np.savez_compressed(file, round=record.server_round, **arrays)
            ),
        )

    def evidence(
        self, defence: Defence, record: RoundRecord, partition_of: Mapping[int, int]
    ) -> None:
        """Write what one round's decision was based on."""
        detection, before = record.detection, record.before
        assert detection is not None
        assert before is not None
        reset = np.zeros(defence.neurons.size, dtype=bool)
        reset[record.neurons_reset] = True
        clients = sorted(detection.client_evidence, key=lambda node: partition_of.get(node, node))
        arrays = {
            "clients": np.array([partition_of.get(node, node) for node in clients]),
            "client_evidence": np.array(
                [detection.client_evidence[node] for node in clients], dtype=np.float32
            ),
            "scores": detection.scores,
            "reset": reset,
            "layer_of": defence.layer_of,
            "layer_names": np.array([layer.name for layer in defence.neurons.layers]),
            "round": np.array(record.server_round),
        }
        target = self.path / "evidence.npz"
        self._try(
            target.name,
            lambda: files.replace(target, lambda file: np.savez_compressed(file, **arrays)),
        )
        self._try("evidence_model.pt", lambda: self.model("evidence_model.pt", before))

    def _try(self, name: str, write: Callable[[], object], target: Path | None = None) -> None:
        """Write a file, or say that it could not be written."""
        try:
            if target is not None:
                target.parent.mkdir(exist_ok=True)
            write()
        except OSError as error:
            self.unwritten[name] = str(error.strerror or error)
            log(WARNING, "cannot write %s: %s", self.path / name, self.unwritten[name])
        else:
            self.unwritten.pop(name, None)

    def _json(self, name: str, **content: Any) -> None:
        text = json.dumps(content, indent=1)
        files.replace(self.path / name, lambda file: file.write(text.encode()))

    def _append(self, name: str, entry: Mapping[str, Any]) -> None:
        """Append a line; one that a kill or a full disk has torn is ended first."""
        with (self.path / name).open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(entry).encode() + b"\n")
