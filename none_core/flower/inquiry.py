"""Asking the participants of a round about a model, and reading what they answer."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from logging import INFO
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.common.logger import log
from flwr.serverapp import Grid
from numpy.typing import NDArray

from none_core.activations import ReportSpec
from none_core.detection import Detector
from none_core.flower import messages
from none_core.refusal import Refusal
from none_core.trigger_inversion import Probe


class Question(NamedTuple):
    """What all are asked.

    Attributes
    ----------
    arrays : ArrayRecord
        The model.
    spec : ReportSpec
    min_count : int
        Labels with fewer samples are to be left out.
    server_round : int
    max_samples : int
        Largest credible number of samples in an answer.
    """

    arrays: ArrayRecord
    spec: ReportSpec
    min_count: int
    server_round: int
    max_samples: int


class Answer(NamedTuple):
    """One valid report.

    Attributes
    ----------
    summary : Any
        As the detector keeps it; None if nothing but predictions was asked for.
    accuracy : float
        Of the model on the client's samples.
    digest : str
        SHA-256 of what was received.
    """

    summary: Any
    accuracy: float
    digest: str


@dataclass
class Answers:
    """What came back.

    Attributes
    ----------
    asked : int
        Clients that were asked.
    reports : dict of int to Answer
        Valid reports by node id.
    refused : list of Refusal
    missing : int
        Clients that did not report: no answer, an error, or declined.
    declined : list of int
        Those that said that they do not, ascending.
    patterns : dict of int to ndarray
        Watched classes' masks and patterns, uint8 (1 + C, *positions), the median over those shown.
    """

    asked: int
    reports: dict[int, Answer] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)
    missing: int = 0
    declined: list[int] = field(default_factory=list)
    patterns: dict[int, NDArray[np.uint8]] = field(default_factory=dict)


def ask(
    grid: Grid,
    nodes: Sequence[int],
    question: Question,
    detector: Detector,
    *,
    timeout: float,
    probes: Mapping[int, Probe],
    shape: tuple[int, ...],
    unheard: Collection[int] = (),
) -> Answers:
    """Ask each node and wait for the answers; hostile ones are refused, and none raises an error.

    Parameters
    ----------
    grid : Grid
    nodes : sequence of int
        Distinct node ids.
    question : Question
    detector : Detector
        Summarises each report as it comes, so that memory does not grow with them.
    timeout : float
        Seconds.
    probes : mapping of int to Probe
        By node, the triggers that it is to look for; nodes without one are not asked to.
    shape : tuple of int
        Of one input, (C, *positions) or (features,).
    unheard : collection of int
        Nodes whose patterns are not shown.
    """
    spec, server_round = question.spec, question.server_round
    contents = {
        probe: messages.query_content(
            question.arrays, spec, question.min_count, server_round, probe
        )
        for probe in {probes.get(node) for node in nodes}
    }
    outgoing = [
        Message(contents[probes.get(node)], node, messages.MESSAGE_TYPE, group_id=str(server_round))
        for node in nodes
    ]
    watched = {label for probe in probes.values() for label in probe.watched}
    answers, asked = Answers(len(nodes)), set(nodes)
    answered: set[int] = set()
    declined: set[int] = set()
    patterns: dict[int, list[NDArray[np.uint8]]] = {}
    for reply in grid.send_and_receive(outgoing, timeout=timeout):
        node, sender = reply.metadata.src_node_id, messages.sender_of(reply)
        if reply.has_error():
            log(INFO, "\t> node %s failed to report: %.1000s", node, reply.error.reason)
            continue
        try:
            answered.add(node)
            if node not in asked or node in answers.reports:
                reason = "was not asked for" if node not in asked else "is a second one"
                raise Refusal(sender, "report", reason)
            if (excuse := messages.read_declined(reply.content)) is not None:
                log(INFO, "\t> node %s does not report: %s", node, excuse)
                declined.add(node)
                continue
            report = messages.read_report(
                reply.content,
                spec,
                sender=sender,
                server_round=server_round,
                max_samples=question.max_samples,
            )
            seen = messages.read_patterns(reply.content, watched, shape, sender=sender)
        except Refusal as refusal:
            answers.refused.append(refusal)
            continue
        if node not in unheard:
            for label, pattern in seen.items():
                patterns.setdefault(label, []).append(pattern)
        summary = detector.summarise(report) if spec.statistics else None
        digest = _digest(reply.content.array_records[messages.REPORT])
        answers.reports[node] = Answer(summary, report.accuracy, digest)
    answers.patterns = {
        label: np.median(np.stack(shown), axis=0).astype(np.uint8)
        for label, shown in patterns.items()
    }
    answers.declined = sorted(declined - answers.reports.keys())
    answers.missing = len(asked - answered) + len(answers.declined)
    return answers


def _digest(report: ArrayRecord) -> str:
    """SHA-256 over a report as it was received, in a fixed order: what a decision was based on."""
    digest = hashlib.sha256()
    for name in sorted(report):
        digest.update(name.encode())
        digest.update(report[name].data)
    return digest.hexdigest()
