"""What the defence did in one round, and how the audit trail takes it down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from none_core.detection import Detection, Standing
from none_core.detection.base import IntArray
from none_core.refusal import Refusal


@dataclass
class RoundRecord:
    """What the defence did in one round.

    Attributes
    ----------
    server_round : int
    decision : str
        One sentence; empty if the round did not query.
    asked, reports : int
        Clients that were asked, and valid reports.
    refused : list of Refusal
        Train replies and reports that were refused.
    missing : int
        Clients that were asked and did not report: no answer, an error, or declined.
    declined : list of int
        Node ids of the missing clients that said that they do not report, ascending.
    purified : dict of int to int
        Samples that each client says it dropped before training.
    patterns : dict of int to ndarray
        For watched classes the mask and pattern that clients show, uint8 (1 + C, *positions), the
        median over those that do.
    repaired : list of int
        Classes for whose backdoor weights were aggregated by the clients' median, ascending.
    repaired_rows : dict of str to ndarray of int64
        Rows of the model's tensors that were, or would have been if that had not cost too much.
    neurons_reset : ndarray of int64
        Flat indices, the worst first.
    detection : Detection or None
    named : list of int
        Node ids of the clients whose updates stand out where the backdoor lives, ascending.
    evidence : dict of int to float
        What is held against each client after this round.
    left_out : list of int
        Node ids of the clients whom this round's evidence names beyond doubt, so that it was
        aggregated again without them, ascending; those in quarantine before are not among them.
    quarantined : list of int
        Node ids of the clients whose updates will be left out from the next round on, ascending.
    before : dict of str to Tensor or None
        State dict of the aggregated model, where it was repaired or neurons were reset.
    """

    server_round: int
    decision: str = ""
    asked: int = 0
    reports: int = 0
    refused: list[Refusal] = field(default_factory=list)
    missing: int = 0
    declined: list[int] = field(default_factory=list)
    purified: dict[int, int] = field(default_factory=dict)
    patterns: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    repaired: list[int] = field(default_factory=list)
    repaired_rows: dict[str, IntArray] = field(default_factory=dict)
    neurons_reset: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    detection: Detection | None = None
    named: list[int] = field(default_factory=list)
    evidence: dict[int, float] = field(default_factory=dict)
    left_out: list[int] = field(default_factory=list)
    quarantined: list[int] = field(default_factory=list)
    before: dict[str, Tensor] | None = None

    @property
    def suspected(self) -> list[int]:
        """Node ids of the suspected clients, ascending."""
        suspicions = self.detection.suspicions if self.detection else ()
        return sorted({suspicion.client for suspicion in suspicions})

    @property
    def standings(self) -> dict[str, int]:
        """How many neurons look compromised, by how far that can be trusted; all lower case."""
        detection = self.detection
        counts = {standing.name.lower(): 0 for standing in Standing}
        if detection is not None:
            for neuron in np.union1d(self.neurons_reset, detection.held_back):
                counts[standing_of(detection, int(neuron)).name.lower()] += 1
        return counts


def standing_of(detection: Detection | None, neuron: int) -> Standing:
    """How far it can be trusted that a neuron is compromised."""
    standing = None if detection is None else detection.standing
    return Standing.CONTESTED if standing is None else Standing(int(standing[neuron]))


def audit_entry(
    record: RoundRecord, reset: Sequence[tuple[tuple[str, int], dict[str, int]]]
) -> dict[str, Any]:
    """Write what a round decided, and on which evidence, as plain JSON.

    Parameters
    ----------
    record : RoundRecord
    reset : sequence
        Of each neuron that was reset, in the record's order: its layer and number there, and of
        each tensor of the model the row that it stands for.
    """
    detection = record.detection
    scores = detection.scores if detection else np.empty(0)
    return {
        "round": record.server_round,
        "decision": record.decision,
        "asked": record.asked,
        "missing": record.missing,
        "declined": record.declined,
        "refused": [str(refusal) for refusal in record.refused],
        "alive": bool(detection and detection.alive),
        "suspicions": [
            {
                "node": s.client,
                "label": s.label,
                "foreign": round(s.foreign, 6),
                "surprise": round(s.surprise, 6),
                "alive": s.alive,
                "certified": s.certified,
            }
            for s in (detection.suspicions if detection else ())
        ],
        "attacks": [
            {
                "label": a.label,
                "size": round(a.size, 6),
                "usual": round(a.usual, 6),
                "strength": round(a.strength, 6),
                "certified": a.certified,
            }
            for a in (detection.attacks if detection else ())
        ],
        "named": record.named,
        "evidence": {str(c): round(e, 6) for c, e in record.evidence.items() if e},
        "left_out": record.left_out,
        "quarantined": record.quarantined,
        "standings": record.standings,
        "repaired": record.repaired,
        "repaired_rows": {
            name: rows.tolist() for name, rows in record.repaired_rows.items() if record.repaired
        },
        "reset": [
            {
                "layer": layer,
                "neuron": channel,
                "score": round(float(scores[j]), 6),
                "standing": standing_of(detection, int(j)).name.lower(),
                "rows": rows,
            }
            for ((layer, channel), rows), j in zip(reset, record.neurons_reset, strict=True)
        ],
    }
