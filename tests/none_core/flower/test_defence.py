"""Reports that come back wrong, late, twice or from strangers are missing or refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message
from flwr.serverapp.strategy import FedAvg

from none_core.activations import ReportBuilder, ReportSpec
from none_core.flower import NoneStrategy, messages
from tests.none_core.flower.toys import (
    HONEST,
    HOSTILE,
    INPUTS,
    Answer,
    Outcome,
    answering,
    honest_answer,
    honest_round,
    net,
    play,
    report_content,
    silence,
)


def reporting(answer: Answer, **settings: object) -> Outcome:
    """One round in which HOSTILE trains honestly and reports as given."""
    return play(answering(report=answer), **settings)


def report(query: Message, node: int = HOSTILE) -> Message:
    return Message(report_content(node, query), reply_to=query)


def forged(message: Message, node: int) -> Message:
    message.metadata.__dict__["_src_node_id"] = node
    return message


def assert_four_reports(outcome: Outcome) -> None:
    expected = honest_round(trains=True, reports=False)
    assert outcome.bits() == expected.bits()
    assert outcome.record.reports == len(HONEST)
    assert outcome.record.detection is not None
    assert expected.record.detection is not None
    assert outcome.record.detection.scores.tobytes() == expected.record.detection.scores.tobytes()
    assert sorted(outcome.record.detection.client_evidence) == list(HONEST)


def test_silence_is_missing() -> None:
    outcome = reporting(silence)
    assert_four_reports(outcome)
    assert (outcome.record.missing, outcome.record.refused) == (1, [])


def test_an_error_is_missing() -> None:
    outcome = reporting(lambda m: [Message(Error(2, "ValueError: no\nreport"), reply_to=m)])
    assert_four_reports(outcome)
    assert (outcome.record.missing, outcome.record.refused) == (1, [])


def test_an_error_in_the_superlinks_name_is_missing() -> None:
    outcome = reporting(lambda m: [forged(Message(Error(5, "gone"), reply_to=m), 1)])
    assert_four_reports(outcome)
    assert outcome.record.missing == 1


def test_of_two_reports_the_first_counts() -> None:
    def twice(query: Message) -> list[Message]:
        return [report(query), report(query, HONEST[0])]

    outcome = reporting(twice)
    expected = honest_round(trains=True, reports=True)
    assert outcome.record.reports == 5
    assert outcome.record.missing == 0
    assert outcome.record.detection is not None
    assert expected.record.detection is not None
    assert outcome.record.detection.scores.tobytes() == expected.record.detection.scores.tobytes()
    ((_, sender, field, text),) = outcome.refusals()
    assert (sender, field) == (f"node {HOSTILE}", "report")
    assert "is a second one" in text


def test_a_bad_report_does_not_spoil_a_good_one_after_it() -> None:
    def second_try(query: Message) -> list[Message]:
        bad = report(query)
        bad.content[messages.REPORT] = ArrayRecord()
        return [bad, report(query)]

    outcome = reporting(second_try)
    assert (outcome.record.reports, outcome.record.missing) == (5, 0)
    assert [r.field for r in outcome.record.refused] == ["at_least_zero"]


def test_a_report_in_the_name_of_a_stranger_is_refused() -> None:
    outcome = reporting(lambda query: [forged(report(query), 12345)])
    assert_four_reports(outcome)
    assert outcome.record.missing == 1
    ((_, sender, _, text),) = outcome.refusals()
    assert sender == "node 12345"
    assert "was not asked for" in text


def test_many_strangers_do_not_make_the_missing_negative() -> None:
    outcome = reporting(lambda query: [forged(report(query), 1000 + i) for i in range(9)])
    assert_four_reports(outcome)
    assert (outcome.record.missing, len(outcome.record.refused)) == (1, 9)


def test_a_report_for_another_round_is_refused() -> None:
    def stale(query: Message) -> list[Message]:
        reply = report(query)
        reply.content[messages.QUERY] = ConfigRecord({"round": 1})
        return [reply]

    outcome = reporting(stale)
    assert_four_reports(outcome)
    ((what, sender, field, text),) = outcome.refusals()
    assert (what, sender, field) == ("activation report", f"node {HOSTILE}", "round")
    assert text.endswith("round is 1, not 2")


def test_more_samples_than_credible_are_refused() -> None:
    outcome = reporting(honest_answer, max_samples=39)
    assert outcome.record.reports == 0
    assert "40 samples, more than the 39 allowed" in str(outcome.record.refused[0])
    assert outcome.record.decision.startswith(
        "kept the aggregated model: 0 valid reports of 5 asked"
    )


@pytest.mark.parametrize(("quorum", "enough"), [(0.8, True), (0.81, False)])
def test_the_quorum_counts_valid_reports_only(quorum: float, enough: bool) -> None:
    def invalid(query: Message) -> list[Message]:
        reply = report(query)
        reply.content[messages.REPORT] = ArrayRecord()
        return [reply]

    outcome = reporting(invalid, quorum=quorum)
    assert (outcome.record.detection is not None) == enough
    assert ("quorum is 5" in outcome.record.decision) != enough


def test_clients_without_a_valid_train_reply_are_asked_all_the_same() -> None:
    outcome = play(answering(train=silence))
    assert (outcome.record.asked, outcome.record.reports) == (5, 5)


def test_the_audit_line_holds_the_digest_of_every_report_that_was_used() -> None:
    lines: list[dict] = []
    reporting(silence, audit=lines.append)
    reporting(honest_answer, audit=lines.append)
    assert sorted(lines[0]["reports"]) == [str(node) for node in HONEST]
    assert sorted(lines[1]["reports"]) == [str(node) for node in (*HONEST, HOSTILE)]
    for node, digest in lines[0]["reports"].items():
        assert lines[1]["reports"][node] == digest
    assert len(set(lines[1]["reports"].values())) == 5


@pytest.mark.parametrize("name", ["linearity", "contrast", "mixture"])
def test_every_detector_survives_reports_that_are_well_formed_lies(name: str) -> None:
    """One sample, or all in one class, or the same as everybody else's, or extreme values."""

    def lies(change: Callable[[np.ndarray], np.ndarray]) -> Answer:
        def answer(query: Message) -> list[Message]:
            config = query.content.config_records[messages.QUERY]
            spec = ReportSpec(config["neurons"], config["labels"], frozenset(config["statistics"]))
            builder = ReportBuilder(spec)
            values = change(np.random.default_rng(0).normal(size=(30, 4))).astype(np.float32)
            labels = torch.arange(len(values)) % 2
            logits = torch.from_numpy(20 * np.eye(2, dtype=np.float32)[labels.numpy()])
            builder.add([torch.from_numpy(values)], logits, labels)
            reply = messages.report_content(builder.report(), ConfigRecord({"round": 2}))
            return [Message(reply, reply_to=query)]

        return answer

    for change in (
        lambda v: v[:1],
        lambda v: 0 * v,
        lambda v: 1e30 * v,
        lambda v: -1e30 + 0 * v,
        lambda v: np.full_like(v, 3e38),
        lambda v: np.full_like(v, np.inf),
        lambda v: np.full_like(v, np.nan),
        lambda v: 1e-30 * v,
    ):
        outcome = reporting(lies(change), detector=name, budget=1.0)
        assert outcome.record.decision
        assert outcome.record.reports + len(outcome.record.refused) == 5
        assert outcome.arrays is not None
        assert all(np.isfinite(a.numpy()).all() for a in outcome.arrays.values())


def test_the_summary_names_the_settings_of_both(flower_log: list[str]) -> None:
    NoneStrategy(FedAvg(), net, torch.zeros(2, INPUTS), quorum=0.7).summary()
    text = "\n".join(flower_log)
    for words in ("NONE", "Detector: mixture", "4 in 1 layers", "Quorum: 0.70", "Sampling"):
        assert words in text
