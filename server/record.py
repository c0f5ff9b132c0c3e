"""What a run leaves behind, file by file: history, checkpoints, audit trail and evidence."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from none_core.flower import Defence, RoundRecord


class Folder:
    """The output folder of one run.

    Parameters
    ----------
    path : Path
        Made if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def audit(self, entry: Mapping[str, Any]) -> None:
        """Append one line to the audit trail."""
        self._append("audit.jsonl", entry)

    def progress(self, entry: Mapping[str, Any]) -> None:
        """Append one line for whoever watches the run."""
        self._append("progress.jsonl", entry)

    def checkpoint(self, server_round: int, state: Mapping[str, Tensor]) -> None:
        """Write the model of a round."""
        (self.path / "checkpoints").mkdir(exist_ok=True)
        self.model(f"checkpoints/round-{server_round:04d}.pt", state)

    def model(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Write a state dict."""
        self._replace(name, lambda file: torch.save(dict(state), file))

    def history(
        self,
        rounds: list[dict[str, Any]],
        truth: Mapping[str, Any],
        privacy: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        """Write everything that was measured and repeats when the same seed is run again.

        What clients say of their privacy is only there if one of them said something.
        """
        content = {"rounds": rounds, "truth": truth}
        if privacy:
            content["privacy"] = {str(client): privacy[client] for client in sorted(privacy)}
        text = json.dumps(content, indent=1)
        self._replace("history.json", lambda file: file.write(text.encode()))

    def timing(self, rounds: list[dict[str, float]]) -> None:
        """Write how long each phase of each round took, in seconds by the clock."""
        text = json.dumps({"rounds": rounds}, indent=1)
        self._replace("timing.json", lambda file: file.write(text.encode()))

    def evidence(
        self, defence: Defence, record: RoundRecord, partition_of: Mapping[int, int]
    ) -> None:
        """Write what one round's decision was based on."""
        detection = record.detection
        assert detection is not None
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
        self._replace("evidence.npz", lambda file: np.savez_compressed(file, **arrays))
        assert record.before is not None
        self.model("evidence_model.pt", record.before)

    def _append(self, name: str, entry: Mapping[str, Any]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _replace(self, name: str, write: Callable[[Any], object]) -> None:
        """Write a file that is there whole or not at all, also after a crash."""
        target = self.path / name
        with tempfile.NamedTemporaryFile(
            "wb", dir=target.parent, prefix=f".{target.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                temporary.chmod(0o644)
                os.replace(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
