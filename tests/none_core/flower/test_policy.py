"""What a client refuses to say, what it counts, and how a server takes it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch.utils.data import TensorDataset

from none_core.accounting import epsilon
from none_core.activations import LABEL_HISTOGRAMS, STATISTICS, ReportSpec, build_report
from none_core.flower import NoneClient, messages
from none_core.flower.messages import record_of
from none_core.flower.policy import ReportPolicy, answers
from none_core.purification import SampleFilter
from none_core.trigger_inversion import Probe
from none_core.undo import Undo
from tests.none_core.flower.toys import (
    HIDDEN,
    HONEST,
    HOSTILE,
    LABELS,
    answering,
    data_of,
    honest_round,
    net,
    neurons,
    play,
)

NODE = 11
SPEC = ReportSpec(HIDDEN, LABELS, frozenset({LABEL_HISTOGRAMS}))


def context(run: dict[str, Any] | None = None, **node: Any) -> Context:
    limits = {f"privacy.{name}": value for name, value in node.items()}
    return Context(1, NODE, {"partition-id": 0, **limits}, RecordDict(), run or {})


def tensors(_: Context) -> TensorDataset:
    return TensorDataset(*data_of(NODE))


def seeded(where: Context) -> np.random.Generator:
    return np.random.default_rng(answers(where))


def query(spec: ReportSpec = SPEC, min_count: int = 1, probe: Probe | None = None) -> Message:
    arrays = record_of(net().state_dict())
    content = messages.query_content(arrays, spec, min_count, 4, probe)
    return Message(content, NODE, messages.MESSAGE_TYPE)


def read(reply: Message, spec: ReportSpec = SPEC) -> Any:
    return messages.read_report(reply.content, spec, sender="x", server_round=4, max_samples=10**6)


# --- reading the limits ---------------------------------------------------------------------------


def test_there_are_no_limits_by_default() -> None:
    assert ReportPolicy.of(context()) == ReportPolicy(True, 1, 0.0, 1e-5, math.inf)


@pytest.mark.parametrize(
    ("run", "node", "name", "expected"),
    [
        (3, 7, "min_count", 7),
        (7, 3, "min_count", 7),
        (0.5, 2.0, "noise", 2.0),
        (2, 0.5, "noise", 2.0),
        (1e-5, 1e-6, "delta", 1e-6),
        (1e-7, 1e-6, "delta", 1e-7),
        (True, False, "reports", False),
        (False, True, "reports", False),
        (None, 4.0, "noise", 4.0),
        (4.0, None, "noise", 4.0),
        ("", 4.0, "noise", 4.0),
    ],
)
def test_the_stricter_of_two_limits_holds(run: Any, node: Any, name: str, expected: Any) -> None:
    runs = {} if run is None else {f"privacy.{name}": run}
    nodes = {} if node is None else {name: node}
    assert getattr(ReportPolicy.of(context(runs, **nodes)), name) == expected


def test_a_run_cannot_loosen_what_a_node_left_at_its_default() -> None:
    run = {"privacy.delta": 0.5, "privacy.patterns": True, "privacy.min_count": 3}
    assert ReportPolicy.of(context(run)) == ReportPolicy(delta=0.5, min_count=3)
    limited = ReportPolicy.of(context(run, noise=2.0))
    assert limited == ReportPolicy(noise=2.0, min_count=3)
    assert ReportPolicy.of(context(run, patterns=True)).patterns


def test_the_smaller_budget_holds() -> None:
    run = {"privacy.max_epsilon": 9.0, "privacy.noise": 1.0}
    assert ReportPolicy.of(context(run, max_epsilon=3)).max_epsilon == 3.0


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"nois": 1.0}, "privacy.nois is not a known key"),
        ({"noise": "1.0"}, "privacy.noise = '1.0' is not legal: expected float"),
        ({"noise": True}, "privacy.noise = True is not legal"),
        ({"min_count": 2.5}, "privacy.min_count = 2.5 is not legal: expected int"),
        ({"reports": 0}, "privacy.reports = 0 is not legal: expected bool"),
        ({"min_count": 0}, "min_count must be >= 1"),
        ({"noise": -1.0}, "noise must be >= 0"),
        ({"noise": math.inf}, "noise must be >= 0 and finite"),
        ({"noise": math.nan}, "noise must be >= 0 and finite"),
        ({"delta": 0.0}, "delta must be in"),
        ({"max_epsilon": 3.0}, "max_epsilon needs noise"),
        ({"max_epsilon": -1.0, "noise": 1.0}, "max_epsilon must be > 0"),
    ],
)
def test_a_limit_that_is_not_understood_is_an_error_and_no_report(
    node: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        NoneClient(net, tensors).query(query(), context(**node))


# --- what the client says -------------------------------------------------------------------------


def test_without_limits_the_reply_is_what_it_was_before_there_were_any() -> None:
    reply = NoneClient(net, tensors).query(query(), context())
    report = build_report(net(), neurons(), [data_of(NODE)], SPEC)
    expected = messages.report_content(report, ConfigRecord({"round": 4}))
    assert reply.content == expected


@pytest.mark.parametrize(("asked", "own"), [(1, 15), (15, 1), (15, 14)])
def test_the_larger_of_both_minimum_counts_wins(asked: int, own: int) -> None:
    def few_of_one(_: Context) -> TensorDataset:
        inputs, labels = data_of(NODE)
        kept = np.r_[np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)[:14]]
        return TensorDataset(inputs[kept], labels[kept])

    reply = NoneClient(net, few_of_one).query(query(min_count=asked), context(min_count=own))
    assert read(reply).counts.tolist() == [20, 0]


def test_a_client_without_a_label_that_is_common_enough_declines() -> None:
    reply = NoneClient(net, tensors).query(query(), context(min_count=21))
    assert messages.read_declined(reply.content) == "no label has 21 samples"
    assert messages.REPORT not in reply.content


def test_a_client_can_refuse_to_report() -> None:
    reply = NoneClient(net, tensors).query(query(), context(reports=False))
    assert set(reply.content) == {messages.DECLINED}
    assert messages.read_declined(reply.content) == "its policy is not to report"


def test_noise_is_drawn_anew_for_every_answer_and_from_the_system_by_default() -> None:
    none = NoneClient(net, tensors)
    replies = [none.query(query(), context(noise=1.0)) for _ in range(2)]
    one, other = (reply.content.array_records[messages.REPORT] for reply in replies)
    assert one != other


def test_a_private_answer_says_what_all_of_them_cost() -> None:
    none, where = NoneClient(net, tensors, noise=seeded), context(noise=0.5, delta=1e-6)
    for number in (1, 2, 3):
        reply = none.query(query(), where)
        assert messages.read_privacy(reply.content) == {
            "answers": number,
            "noise": 0.5,
            "delta": 1e-6,
            "epsilon": epsilon(0.5, number, 1e-6),
            "withheld": [],
        }
        read(reply)


def test_it_stops_before_its_budget_is_exceeded() -> None:
    most = epsilon(2.0, 3, 1e-5)
    none, where = NoneClient(net, tensors, noise=seeded), context(noise=2.0, max_epsilon=most)
    replies = [none.query(query(), where) for _ in range(5)]
    declined = [messages.read_declined(reply.content) for reply in replies]
    assert declined[:3] == [None] * 3
    assert all("would cost more privacy than epsilon" in str(said) for said in declined[3:])
    assert answers(where) == 3


def test_what_cannot_be_private_is_withheld_and_named() -> None:
    spec, where = ReportSpec(HIDDEN, LABELS, frozenset(STATISTICS)), context(noise=0.1)
    probe = Probe(tuple(range(LABELS)), steps=2, images=2)
    reply = NoneClient(net, tensors, noise=seeded).query(query(spec, probe=probe), where)
    said = messages.read_privacy(reply.content)
    assert said is not None
    assert said["withheld"] == ["linear-share", "prediction-extremes", "trigger-shift"]
    report = read(reply, spec)
    for name in ("positions", "confident_count", "unlikely_count", "probes", "shift"):
        assert not report[name].any()
    assert "none.triggers" not in where.state


def test_how_many_samples_were_dropped_is_not_said_by_a_private_client() -> None:
    fields = {
        "labels": np.array([1]),
        "neurons": np.array([[0]]),
        "sign": np.ones((1, 1), np.float32),
        "mean": np.zeros((1, 1), np.float32),
        "deviation": np.ones((1, 1), np.float32),
        "threshold": np.array([-1e9], np.float32),
    }
    for limits, said in (({}, {"dropped": 20}), ({"noise": 1.0}, None)):
        content = RecordDict({"arrays": record_of(net().state_dict())})
        content.update(messages.filter_content(SampleFilter(**fields), Undo({}, {}), 4))
        message = Message(content, NODE, "train")
        where = context(**limits)
        none = NoneClient(net, tensors)
        reply = none.mod(message, where, lambda m, _: Message(RecordDict(), reply_to=m))
        assert len(none.kept(where)) == 20
        assert reply.content.config_records.get(messages.PURIFIED) == said


# --- what the server makes of it ------------------------------------------------------------------


def declining(content: RecordDict) -> Any:
    return play(answering(report=lambda m: [Message(content, reply_to=m)]))


@pytest.mark.parametrize(
    "content",
    [
        messages.declined_content("I would rather not"),
        messages.declined_content("x" * 10**6 + "\n"),
        RecordDict({messages.DECLINED: ConfigRecord()}),
        RecordDict({messages.DECLINED: ConfigRecord({"reason": [1.5]})}),
        # Who declines, declines: a report beside it does not count.
        RecordDict({messages.DECLINED: ConfigRecord(), messages.REPORT: ArrayRecord()}),
    ],
)
def test_a_client_that_declines_is_missing_and_not_hostile(content: RecordDict) -> None:
    outcome = declining(content)
    silent = honest_round(trains=True, reports=False)
    assert outcome.bits() == silent.bits()
    assert outcome.record.refused == []
    assert outcome.record.declined == [HOSTILE]
    assert (outcome.record.reports, outcome.record.missing) == (len(HONEST), 1)
    assert outcome.record.evidence.get(HOSTILE, 0) == silent.record.evidence.get(HOSTILE, 0)
    assert outcome.metrics is not None
    assert outcome.metrics["none-declined"] == 1


def test_what_is_said_about_declining_cannot_flood_or_forge_a_log() -> None:
    said = messages.read_declined(messages.declined_content("no\nNONE round 1: all well" * 10**5))
    assert said is not None
    assert len(said) <= 200
    assert said.isprintable()


def test_all_may_decline_and_the_model_is_kept() -> None:
    content = messages.declined_content("no")
    none_left = play(
        answering(report=lambda m: [Message(content, reply_to=m)]),
        quorum=1.0,
    )
    assert none_left.record.decision.startswith("kept the aggregated model: 4 valid reports of 5")


@pytest.mark.parametrize(
    "claim",
    [
        {},
        {"answers": 1, "noise": 1.0, "delta": 1e-5, "epsilon": math.nan, "withheld": []},
        {"answers": 1, "noise": 1.0, "delta": 1e-5, "epsilon": math.inf, "withheld": []},
        {"answers": -1, "noise": 1.0, "delta": 1e-5, "epsilon": 1.0, "withheld": []},
        {"answers": True, "noise": 1.0, "delta": 1e-5, "epsilon": 1.0, "withheld": []},
        {"answers": 10**400, "noise": 1.0, "delta": 1e-5, "epsilon": 1.0, "withheld": []},
        {"answers": 1, "noise": 1.0, "delta": 1e-5, "epsilon": "1", "withheld": []},
        {"answers": 1, "noise": 1.0, "delta": 1e-5, "epsilon": 1.0, "withheld": ["../../x"]},
        {"answers": 1, "noise": 1.0, "delta": 1e-5, "epsilon": 1.0, "withheld": "trigger-shift"},
        {"answers": 1, "noise": 1.0, "delta": 1e-5, "epsilon": 1.0},
    ],
)
def test_nonsense_about_privacy_is_not_taken_down(claim: dict[str, Any]) -> None:
    content = RecordDict({messages.PRIVACY: ConfigRecord(claim)})
    assert messages.read_privacy(content) is None
