"""The Flower ServerApp: runs a strategy, scores every model it releases, records all."""

from __future__ import annotations

import gc
import json
import time
from logging import ERROR, INFO
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp
from torch import nn

from none_core import snapshot
from none_core.flower import NoneStrategy, RoundRecord, resume
from none_core.flower.messages import record_of, state_of
from none_core.flower.resume import Continued
from server import strategies
from server.config import DefenseConfig, ThresholdsConfig
from server.grid import MeteredGrid
from server.peers.base import Validated
from server.record import Folder
from tasks import data, metrics, models
from tasks.config import (
    AttackConfig,
    ConfigError,
    ExperimentConfig,
    PrivacyConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    from_run_config,
)
from tasks.poisoning import DEFAULT_TRIGGER, Trigger, malicious_clients

app = ServerApp()

_KEPT = ("rounds", "timing", "_strongest")  # of a run, for when it is resumed


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one experiment from the flat run configuration."""
    Run(grid, context).start()


class Run:
    """One experiment, seen from the server.

    Parameters
    ----------
    grid : Grid
    context : Context
        Its run configuration holds the sections experiment, task, attack, defense and run.

    Raises
    ------
    ConfigError, FolderError
        Before anything is trained.
    """

    def __init__(self, grid: Grid, context: Context) -> None:
        config = context.run_config
        self.experiment = from_run_config(config, "experiment", ExperimentConfig)
        self.task = from_run_config(config, "task", TaskConfig)
        self.attack = from_run_config(config, "attack", AttackConfig)
        self.defense = from_run_config(config, "defense", DefenseConfig)
        thresholds = from_run_config(config, "thresholds", ThresholdsConfig)
        where = from_run_config(config, "run", RunConfig)
        self.keeps_checkpoints = where.checkpoints

        torch.set_num_threads(1)
        self.grid = MeteredGrid(grid, self.experiment.clients, where.node_timeout)
        key = Path(where.audit_key) if where.audit_key else None
        self.folder = Folder(Path(where.output), key)
        self.data = data.load(
            self.task.dataset,
            Path(where.data_root) if where.data_root else None,
            held_out=self.task.held_out,
        )
        self.trigger = (
            Trigger(self.attack.trigger)
            if self.attack.trigger
            else DEFAULT_TRIGGER[self.task.dataset]
        )
        self.model = self._build()
        self.strategy = strategies.build(
            self.defense,
            thresholds,
            self.experiment.clients,
            self._build,
            self.data.shape,
            self.experiment.seed,
            self.folder.trail,
        )
        self.rounds: list[dict[str, Any]] = []
        self.timing: list[dict[str, float]] = []
        self._dropped = (0, 0)  # samples, and poisoned ones among them, in the rounds so far
        # Of the round whose evidence is kept: whether neurons were reset, and how clear it was.
        self._strongest: tuple[bool, float] = (False, -1.0)
        self._round_began = time.perf_counter()
        # What the run is, wherever and however often it is started.
        self._settings = {
            name: section.model_dump(mode="json", exclude={"resume", "engine"})
            for name, section in (
                ("experiment", self.experiment),
                ("task", self.task),
                ("train", from_run_config(config, "train", TrainConfig)),
                ("attack", self.attack),
                ("defense", self.defense),
                ("thresholds", thresholds),
                ("privacy", from_run_config(config, "privacy", PrivacyConfig)),
            )
        }

    def start(self) -> None:
        """Run all rounds, or those that a stopped run has left, and write what is left to write."""
        done, arrays = self._resumed() if self.experiment.resume else (None, None)
        if arrays is None:
            arrays = record_of(self._build().state_dict())
            self.folder.trail.open(run=self._settings)
        try:
            Continued(self.strategy, done).start(
                self.grid,
                arrays,
                num_rounds=self.experiment.rounds,
                timeout=self.defense.timeout,
                evaluate_fn=self.released,
            )
        finally:
            gc.unfreeze()
        self.folder.model("model.pt", self.model.state_dict())
        self._write_history()
        self.folder.trail.close(round=self.experiment.rounds)
        for name, reason in self.folder.unwritten.items():
            log(ERROR, "could not write %s: %s", self.folder.path / name, reason)

    def _resumed(self) -> tuple[int | None, ArrayRecord | None]:
        """Go back to where a stopped run was: its last complete round and the model of that.

        Raises
        ------
        ConfigError
            If it was another experiment.
        SnapshotError, TrailError
            If what it left was altered.
        """
        if not self.folder.snapshot.exists():
            log(INFO, "There is nothing to resume from, so this is a new run")
            return None, None
        kept = snapshot.read(self.folder.snapshot)["more"]
        for section, values in self._settings.items():
            for key, value in values.items():
                before = kept["settings"].get(section, {}).get(key)
                if value != before:
                    raise ConfigError(
                        f"{section}.{key} = {json.dumps(value)} is not legal: expected "
                        f"{json.dumps(before)}, as in the run that is resumed"
                    )
        done, arrays, _ = resume.recall(self.folder.snapshot, self.strategy)
        for name in _KEPT:
            setattr(self, name, kept[name])
        self._dropped = tuple(kept["_dropped"])
        self.grid.partition_of = {int(node): p for node, p in kept["partition_of"].items()}
        self.grid.truth = {int(partition): truth for partition, truth in kept["truth"].items()}
        self.grid.privacy = {int(node): said for node, said in kept["privacy"].items()}
        self.model.load_state_dict(state_of(arrays))
        self.folder.trail.resume(after=done)
        log(INFO, "Resumed after round %s of %s", done, self.experiment.rounds)
        return done, arrays

    def _keep(self, server_round: int, arrays: ArrayRecord) -> None:
        """Write what a resumed run needs."""
        more = {
            **{name: getattr(self, name) for name in _KEPT},
            "settings": self._settings,
            "_dropped": list(self._dropped),
            "partition_of": {str(node): p for node, p in self.grid.partition_of.items()},
            "truth": {str(partition): truth for partition, truth in self.grid.truth.items()},
            "privacy": {str(node): said for node, said in self.grid.privacy.items()},
        }
        self.folder.keep(self.strategy, server_round, arrays, more)

    def released(self, server_round: int, arrays: ArrayRecord) -> MetricRecord:
        """Score and record the model that a round releases; Flower calls it after each."""
        began = time.perf_counter()
        self.model.load_state_dict(state_of(arrays))
        scores = metrics.evaluate(
            self.model,
            self.data.test_images,
            self.data.test_labels,
            self.trigger,
            self.attack.target,
        )
        ended = time.perf_counter()
        defence = self._defence_record(server_round)
        entry = {
            "round": server_round,
            "ba": scores.ba,
            "asr": scores.asr,
            "recovered": scores.recovered,
            "neurons_reset": len(defence.neurons_reset),
            "suspected": self._partitions(defence.suspected),
            "named": self._partitions(defence.named),
            "left_out": self._partitions(defence.left_out),
            "quarantined": self._partitions(defence.quarantined),
            "attacked": [a.label for a in defence.detection.attacks] if defence.detection else [],
            "standings": defence.standings,
            "repaired": defence.repaired,
            "refused": len(defence.refused),
            "filtered": self._newly_dropped(),
            "decision": defence.decision,
            "bytes": self._costs(server_round, began, ended),
        }
        self.rounds.append(entry)
        self.folder.released(server_round, arrays, defence, self.keeps_checkpoints)
        self._keep_evidence(defence)
        self._write_history()
        self.folder.progress(entry)
        self._keep(server_round, arrays)  # from here on the round is complete
        gc.collect()  # Flower's records hold themselves, and so all models of the round
        if not gc.get_freeze_count():
            gc.freeze()  # libraries, mostly: from now on this takes milliseconds
        self._round_began = time.perf_counter()
        return MetricRecord({"ba": scores.ba, "asr": scores.asr, "recovered": scores.recovered})

    def _costs(self, server_round: int, began: float, ended: float) -> dict[str, int]:
        """Keep the seconds of the round and return its bytes, which repeat for a seed.

        Deciding takes what is left before evaluation.
        """
        seconds, traffic = self.grid.take()
        train, query = seconds.get("train", 0.0), seconds.get("query", 0.0)
        spent = {
            "train": train,
            "query": query,
            "decide": max(0.0, began - self._round_began - train - query),
            "evaluate": ended - began,
        }
        phases = {name: round(value, 4) for name, value in spent.items()}
        self.timing.append({"round": server_round, **phases})
        directions = ("train_down", "train_up", "query_down", "query_up")
        return {name: traffic.get(name, 0) for name in directions}

    def _defence_record(self, server_round: int) -> RoundRecord:
        if isinstance(self.strategy, NoneStrategy) and server_round:
            return self.strategy.defence.record
        if isinstance(self.strategy, Validated) and server_round:
            return self.strategy.record
        return RoundRecord(server_round)

    def _newly_dropped(self) -> dict[str, int]:
        """Count the samples that the participants' filters dropped since the last round."""
        truth = self.grid.truth.values()
        now = sum(t["dropped"] for t in truth), sum(t["dropped-poisoned"] for t in truth)
        before, self._dropped = self._dropped, now
        return {"dropped": now[0] - before[0], "poisoned": now[1] - before[1]}

    def _keep_evidence(self, record: RoundRecord) -> None:
        """Keep the evidence of the reset, or repair, at which the backdoor was seen best."""
        if record.patterns:
            self.folder.patterns(record)
        if record.detection is None or record.before is None:
            return
        seen = [s.surprise for s in record.detection.suspicions]
        seen += [attack.strength for attack in record.detection.attacks]
        strength = bool(record.neurons_reset.size), float(max(seen, default=0.0))
        if strength > self._strongest and isinstance(self.strategy, NoneStrategy):
            self._strongest = strength
            self.folder.evidence(self.strategy.defence, record, self.grid.partition_of)

    def _partitions(self, nodes: list[int]) -> list[int]:
        return sorted(self.grid.partition_of.get(node, node) for node in nodes)

    def _write_history(self) -> None:
        attack = self.attack
        malicious = (
            []
            if attack.name == "none"
            else malicious_clients(self.experiment.clients, attack.malicious, self.experiment.seed)
        )
        poisoned = sum(t["poisoned"] for t in self.grid.truth.values())
        truth = {"malicious": list(malicious), "poisoned": poisoned}
        partition_of = self.grid.partition_of
        privacy = {partition_of.get(n, n): said for n, said in self.grid.privacy.items()}
        self.folder.history(self.rounds, truth, privacy)
        self.folder.timing(self.timing)

    def _build(self) -> nn.Module:
        return models.build(
            self.task.model_name,
            self.data.shape,
            len(self.data.classes),
            self.experiment.seed,
            self.task.activation,
        )
