"""Thousands of hostile train replies and reports: none ends the run, none has any effect."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
from flwr.app import Message, RecordDict
from hypothesis import HealthCheck, given, settings

from none_core.activations import decode_report
from none_core.flower import messages
from none_core.flower.messages import record_of
from tests.none_core.flower.changes import REPORT, TRAIN, Change, alter, changed
from tests.none_core.flower.toys import (
    HOSTILE,
    answering,
    honest_answer,
    honest_round,
    net,
    play,
    report_content,
    train_content,
)

HONESTLY: list[Change] = []
PLANS = st.one_of(
    st.tuples(TRAIN, st.just(HONESTLY)),
    st.tuples(st.just(HONESTLY), REPORT),
    st.tuples(TRAIN, REPORT),
)


@settings(
    max_examples=2000,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(PLANS)
def test_hostile_replies_are_refused_and_have_no_effect(
    plan: tuple[list[Change], list[Change]],
) -> None:
    to_train, to_report = plan
    outcome = play(
        answering(
            lambda m: [Message(changed(train_content(HOSTILE), to_train), reply_to=m)],
            lambda m: [Message(changed(report_content(HOSTILE, m), to_report), reply_to=m)],
        )
    )
    expected = honest_round(trains=not to_train, reports=not to_report)

    assert outcome.bits() == expected.bits()
    assert outcome.arrays is not None
    assert all(np.isfinite(array.numpy()).all() for array in outcome.arrays.values())

    detection, wanted = outcome.record.detection, expected.record.detection
    assert detection is not None
    assert wanted is not None
    assert sorted(detection.client_evidence) == sorted(wanted.client_evidence)
    assert detection.scores.tobytes() == wanted.scores.tobytes()
    assert outcome.record.reports == expected.record.reports
    assert outcome.record.missing == 0  # it did answer

    kinds = ["train reply"] * bool(to_train) + ["activation report"] * bool(to_report)
    assert [what for what, *_ in outcome.refusals()] == kinds
    for refusal in outcome.record.refused:
        assert refusal.sender == f"node {HOSTILE}"
        assert refusal.field.strip()
        assert refusal.reason.strip()
        assert str(refusal) == (
            f"{refusal.what} of {refusal.sender} refused: {refusal.field} {refusal.reason}"
        )
        assert len(str(refusal)) < 400
        assert str(refusal).isprintable()


def test_the_unchanged_reply_and_report_are_let_in() -> None:
    """Otherwise the test above would pass by refusing everything."""
    outcome = play(answering(honest_answer, honest_answer))
    assert outcome.record.refused == []
    assert outcome.record.reports == 5
    assert outcome.bits() != honest_round(trains=False, reports=True).bits()


def test_altering_nothing_packs_what_the_product_packs() -> None:
    """The changes to single numbers of a report are hostile because of the numbers alone."""
    defence = honest_round(trains=True, reports=True).defence
    query = Message(
        messages.query_content(record_of(net().state_dict()), defence.spec, 1, 2), HOSTILE, "query"
    )
    kinds = {"count": "<u8", "histogram": "<u4", "sum": "<i1", "real": "<f8", "half": "<f2"}
    for name, (kind, _) in defence.spec.fields().items():
        content = report_content(HOSTILE, query)
        honest = decoded(content, defence.spec)
        alter(name, kinds[kind], lambda values: None)(content)
        again = decoded(content, defence.spec)
        for field, values in honest.arrays.items():
            np.testing.assert_array_equal(values, again[field])


def decoded(content: RecordDict, spec: Any) -> Any:
    fields = {k: a.numpy() for k, a in content.array_records[messages.REPORT].items()}
    return decode_report(fields, spec, sender="toy", max_samples=1000)
