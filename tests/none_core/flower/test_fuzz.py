"""The decoders of train replies and reports against inputs that nobody thought of.

Whatever comes in: no crash, no second of processor time, little memory beyond the input, and what
is let in satisfies everything that validation promises, by checks of this file's own. A few
thousand inputs here; ``make fuzz`` tries a hundred thousand, others for every FUZZ_SEED.
"""

from __future__ import annotations

import io
import math
import os
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from hypothesis import HealthCheck, given, seed, settings

from none_core.activations import (
    MOST_SHIFT,
    STATISTICS,
    HistogramGrid,
    Report,
    ReportSpec,
    decode_report,
)
from none_core.flower import messages
from none_core.flower.messages import record_of
from none_core.flower.validation import admit, template_of
from none_core.refusal import Refusal
from tests.none_core.flower.changes import (
    FIELDS,
    MAX_SAMPLES,
    NAMES,
    REPORT,
    TEXT,
    TRAIN,
    Change,
    changed,
)
from tests.none_core.flower.toys import (
    HIDDEN,
    HONEST,
    HOSTILE,
    INPUTS,
    LABELS,
    net,
    report_content,
    train_content,
)

OTHERS = HONEST[:2]  # who reply beside the hostile client
SECONDS = 1.0
BYTES = 64 << 20
LOT = 2000
LOTS = 50  # of the long run

SPEC = ReportSpec(HIDDEN, LABELS, frozenset(STATISTICS))
TEMPLATE = template_of(record_of(net().state_dict()))


# --- inputs ---------------------------------------------------------------------------------------

SIZE = st.sampled_from([0, 1, 2, 3, 5, 9, 99, 101] * 8 + [1001] * 3 + [20_000])
# Mostly small: what is large takes long to make, not to refuse.
GIANT = st.sampled_from([8] * 60 + [10**3] * 30 + [10**5] * 9 + [5 * 10**6])
ODD = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    TEXT,
    st.binary(max_size=40),
    st.booleans(),
    st.lists(st.floats(), max_size=5),
    st.lists(TEXT, max_size=5),
    GIANT.map(lambda n: "\n\x00" * (n // 2)),
    GIANT.map(lambda n: b"x" * n),
    GIANT.map(lambda n: [0.5] * (n // 8)),
    GIANT.map(lambda n: [""] * (n // 8)),
)
NAME = st.one_of(
    TEXT,
    st.sampled_from(["../../etc/passwd", "arrays", "metrics", "config", "num-examples", "\0"]),
    st.sampled_from([messages.REPORT, messages.QUERY, messages.DECLINED, messages.PRIVACY]),
    st.sampled_from([messages.PATTERNS, "0", "1"]),
    st.sampled_from(NAMES + list(FIELDS)),
    GIANT.map(lambda n: "\x00" * n),
)
NUMBER = st.integers(-(2**63), 2**63 - 1) | st.floats()
METRIC = NUMBER | st.lists(st.floats(), max_size=5) | GIANT.map(lambda n: [0.5] * (n // 8))
SHAPE = st.lists(st.integers(-(2**62), 2**62), max_size=5) | GIANT.map(lambda n: [1] * (n // 8))


@st.composite
def odd_array(draw: st.DrawFn) -> Array:
    """An array that need not hold what it declares, nor anything."""
    dtype = draw(st.sampled_from(["float32", "uint8", "int64", "|O"]) | NAME)
    stype = draw(st.just("numpy.ndarray") | NAME)
    data = draw(st.binary(max_size=200) | GIANT.map(bytes))
    return Array(dtype, tuple(draw(SHAPE)), stype, data)


@st.composite
def flood(draw: st.DrawFn) -> Change:
    """Add many records, or many entries to the records that there are."""
    number, what = draw(SIZE), draw(st.sampled_from(["records", "arrays", "metrics", "configs"]))
    value: Any = draw(NUMBER)

    def change(content: RecordDict) -> None:
        kinds = {"arrays": ArrayRecord, "metrics": MetricRecord, "configs": ConfigRecord}
        for i in range(number):
            if what == "records":
                content[f"r{i}"] = list(kinds.values())[i % 3]()
                continue
            entry = Array(np.zeros(1, np.uint8)) if what == "arrays" else value
            for record in content.values():
                if isinstance(record, kinds[what]):
                    record[f"e{i}"] = entry

    return change


@st.composite
def odd_entry(draw: st.DrawFn) -> Change:
    """Put anything anywhere."""
    record, name = draw(NAME), draw(NAME)
    array, metric, config = draw(odd_array()), draw(METRIC), draw(ODD)
    kind = draw(st.sampled_from([ArrayRecord, MetricRecord, ConfigRecord]))

    def change(content: RecordDict) -> None:
        known = content.get(record)
        if known is None:
            known = content[record] = kind()
        if isinstance(known, ArrayRecord):
            known[name] = array
        elif isinstance(known, MetricRecord):
            known[name] = metric
        else:
            known[name] = config

    return change


@st.composite
def odd_bytes(draw: st.DrawFn) -> Change:
    """Damage the message as it is on the wire; what Flower itself cannot read changes nothing."""
    places = draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6))
    end = draw(st.floats(0.5, 1) | st.just(1.0))

    def change(content: RecordDict) -> None:
        try:
            data = bytearray(recorddict_to_proto(content).SerializeToString())
        except (ValueError, TypeError):  # nothing that fits on the wire
            return
        data = data[: math.ceil(end * len(data))]
        for where, value in places:
            if data:
                data[int(where * (len(data) - 1))] = value
        proto = ProtoRecordDict()
        try:
            proto.ParseFromString(bytes(data))
            damaged = recorddict_from_proto(proto)
        except Exception:  # Flower's own decoder answers for itself
            return
        content.clear()
        content.update(damaged)

    return change


ANYWHERE = st.lists(st.one_of(flood(), odd_entry(), odd_bytes()), min_size=1, max_size=3)
HOSTILE_TRAIN = st.one_of(TRAIN, ANYWHERE, st.tuples(TRAIN, ANYWHERE).map(lambda p: p[0] + p[1]))
HOSTILE_REPORT = st.one_of(REPORT, ANYWHERE)


# --- what must hold -------------------------------------------------------------------------------


def tried(decode: Callable[[], Any]) -> Any:
    """Decode, within bounds of time and memory; what took long is timed again, to be fair."""
    tracemalloc.start()
    seconds, decoded = timed(decode)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if seconds > SECONDS / 10:
        seconds = min(timed(decode)[0] for _ in range(3))
    WORST["seconds"] = max(WORST["seconds"], seconds)
    WORST["bytes"] = max(WORST["bytes"], peak)
    assert seconds < SECONDS, f"took {seconds:.2f} s"
    assert peak <= BYTES, f"took {peak >> 20} MB"
    return decoded


def timed(decode: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    decoded = decode()
    return time.perf_counter() - begin, decoded


WORST = {"seconds": 0.0, "bytes": 0.0}


@cache
def instruction(node: int) -> Message:
    return Message(RecordDict(), node, "train")


@cache
def honest_replies() -> list[Message]:
    return [Message(train_content(n), reply_to=instruction(n)) for n in OTHERS]


def try_train(content: RecordDict) -> bool:
    """Feed one train reply; whether it is let in."""
    reply = Message(content, reply_to=instruction(HOSTILE))
    asked = {*OTHERS, HOSTILE}
    admitted, refused = tried(lambda: admit([*honest_replies(), reply], TEMPLATE, asked=asked))
    assert [m.metadata.src_node_id for m in admitted[: len(OTHERS)]] == list(OTHERS)
    assert len(admitted) + len(refused) == len(OTHERS) + 1
    for refusal in refused:
        assert len(str(refusal)) < 400
        assert str(refusal).isprintable()
    if refused:
        return False
    (arrays,) = reply.content.array_records.items()
    (metrics,) = reply.content.metric_records.items()
    assert (arrays[0], metrics[0]) == ("arrays", "metrics")
    assert list(arrays[1]) == list(TEMPLATE)
    for name, (dtype, shape) in TEMPLATE.items():
        values = np.load(io.BytesIO(arrays[1][name].data), allow_pickle=False)
        assert (values.dtype, values.shape) == (dtype, shape)
        assert np.isfinite(values).all()
    usual: Mapping[str, Any] = train_content(HOSTILE).metric_records["metrics"]
    assert metrics[1].keys() == usual.keys()
    for name, value in metrics[1].items():
        assert np.shape(value) == np.shape(usual[name])
        assert np.isfinite(np.asarray(value, float)).all()
    claims = sorted([*(30 + n for n in OTHERS), metrics[1]["num-examples"]])
    assert 0 < claims[0] <= claims[-1] <= 10 * claims[1]
    return True


def try_report(content: RecordDict) -> bool:
    """Feed one report; whether it is let in."""

    def read() -> Report | Refusal:
        messages.read_declined(content)
        messages.read_privacy(content)
        try:
            shown = messages.read_patterns(content, {0, 1}, (INPUTS,), sender="x")
            assert all(pattern.shape == (2, INPUTS) for pattern in shown.values())
            return messages.read_report(
                content, SPEC, sender="x", server_round=2, max_samples=MAX_SAMPLES
            )
        except Refusal as refusal:
            return refusal

    report = tried(read)
    if isinstance(report, Refusal):
        assert len(str(report)) < 400
        assert str(report).isprintable()
        return False
    assert set(content.array_records[messages.REPORT]) == set(FIELDS)
    assert content.config_records[messages.QUERY]["round"] == 2
    count = [int(n) for n in report["predictions"].sum(1, dtype=object)]
    assert 0 < sum(count) <= MAX_SAMPLES
    assert report["histograms"].shape == (LABELS, HIDDEN, HistogramGrid.BINS)
    for k, j in np.ndindex(LABELS, HIDDEN):
        assert sum(map(int, report["histograms"][k, j])) == count[k]
    for name, array in report.arrays.items():
        if name not in ("confident_max", "shift", "sums"):
            assert (array >= 0).all() or name == "unlikely_sum"
        if name != "confident_max":
            assert np.isfinite(array.astype(float)).all()
    assert (report["at_least_zero"] <= report["positions"]).all()
    for k, probes in enumerate(report["probes"]):
        assert 0 <= report["mask_size"][k] <= probes
        assert 0 <= report["mask_success"][k] <= probes
        assert (np.abs(report["shift"][k]) <= MOST_SHIFT * probes).all()
        held = report["confident_count"][k] > 0
        assert np.isfinite(report["confident_max"][k]).all() == held
    assert (report["unlikely_square_sum"] >= 0).all()
    for moment in report.moments():
        assert np.isfinite(moment[report.counts > 0]).all()
    return True


@cache
def report_query() -> Message:
    model = record_of(net().state_dict())
    return Message(messages.query_content(model, SPEC, 1, 2), HOSTILE, messages.MESSAGE_TYPE)


def fuzz(inputs: int, number: int) -> None:
    """Try so many inputs, half of them train replies; the same for the same number."""
    outcomes: Counter[tuple[str, bool]] = Counter()

    @settings(
        max_examples=inputs // 2,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @seed(number)
    @given(HOSTILE_TRAIN)
    def trains(changes: list[Change]) -> None:
        outcomes["train", try_train(changed(train_content(HOSTILE), changes))] += 1

    @settings(
        max_examples=inputs // 2,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @seed(number)
    @given(HOSTILE_REPORT)
    def reports(changes: list[Change]) -> None:
        content = changed(report_content(HOSTILE, report_query()), changes)
        outcomes["report", try_report(content)] += 1

    trains()
    reports()
    print(
        f"{outcomes.total()} inputs {dict(outcomes)}; worst so far: {WORST['seconds']:.3f} s, "
        f"{WORST['bytes'] / (1 << 20):.1f} MB"
    )
    assert outcomes.total() >= inputs
    # Some damage is none, or hits what nobody reads: otherwise everything would be refused anyway.
    for what in ("train", "report"):
        assert outcomes[what, True] > 0
        assert outcomes[what, False] > inputs // 4


@pytest.mark.timeout(900)
def test_two_thousand_inputs() -> None:
    fuzz(LOT, 0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("lot", range(LOTS))
def test_a_hundred_thousand_inputs(lot: int) -> None:
    fuzz(LOT, 1 + lot + LOTS * int(os.environ.get("FUZZ_SEED", "0")))


def test_the_unchanged_inputs_are_let_in() -> None:
    assert try_train(train_content(HOSTILE))
    assert try_report(report_content(HOSTILE, report_query()))


# --- what is gigantic -----------------------------------------------------------------------------

MANY = 20_000_000

GIGANTIC: dict[str, Change] = {
    "a name": lambda c: c["arrays"].__setitem__("\x00" * MANY, Array(np.zeros(1))),
    "a dtype": lambda c: c["arrays"].__setitem__(
        NAMES[0], Array("\x00" * MANY, (1,), "numpy.ndarray", b"")
    ),
    "a serialisation": lambda c: c["arrays"].__setitem__(
        NAMES[0], Array(str(TEMPLATE[NAMES[0]][0]), (1,), "\x00" * MANY, b"")
    ),
    "a shape": lambda c: c["arrays"].__setitem__(
        NAMES[0], Array(str(TEMPLATE[NAMES[0]][0]), (1,) * MANY, "numpy.ndarray", b"")
    ),
    "an array": lambda c: c["arrays"].__setitem__(NAMES[0], Array(np.zeros(MANY, np.float32))),
    "a list of numbers": lambda c: c["metrics"].__setitem__("curve", [0.5] * (MANY // 4)),
    "a metric's name": lambda c: c["metrics"].__setitem__("\x00" * MANY, 1.0),
    "a record's name": lambda c: c.__setitem__("\x00" * MANY, MetricRecord()),
    "a number of records": lambda c: c.update({str(i): ConfigRecord() for i in range(10**5)}),
    "a number of arrays": lambda c: c["arrays"].update(
        dict.fromkeys(map(str, range(10**5)), Array(np.zeros(1)))
    ),
    "a number of metrics": lambda c: c["metrics"].update(dict.fromkeys(map(str, range(10**5)), 1)),
}


@pytest.mark.parametrize("what", GIGANTIC)
def test_what_is_gigantic_in_a_train_reply_is_refused_at_once(what: str) -> None:
    assert not try_train(changed(train_content(HOSTILE), [GIGANTIC[what]]))


IN_REPORTS: dict[str, Change] = {
    "a field": lambda c: c[messages.REPORT].__setitem__(FIELDS[0], Array(np.zeros(MANY, np.uint8))),
    "a field's shape": lambda c: c[messages.REPORT].__setitem__(
        FIELDS[0], Array("uint8", (1,) * MANY, "numpy.ndarray", b"")
    ),
    "a field's name": lambda c: c[messages.REPORT].__setitem__("\x00" * MANY, Array(np.zeros(1))),
    "a bomb": lambda c: c[messages.REPORT].__setitem__(
        FIELDS[0],
        Array(np.frombuffer(b"\x01" + zlib.compress(bytes(5 * MANY)), np.uint8)[:400]),
    ),
    "a round": lambda c: c[messages.QUERY].__setitem__("round", "\x00" * MANY),
    "a reason": lambda c: c.__setitem__(
        messages.DECLINED, ConfigRecord({"reason": "\x00" * MANY, "round": b"\x00" * MANY})
    ),
    "a claim": lambda c: c.__setitem__(
        messages.PRIVACY, ConfigRecord({"epsilon": [1.0] * (MANY // 4), "withheld": [""] * MANY})
    ),
    "a number of records": lambda c: c.update({str(i): ConfigRecord() for i in range(10**5)}),
}


@pytest.mark.parametrize("what", IN_REPORTS)
def test_what_is_gigantic_in_a_report_costs_nothing(what: str) -> None:
    let_in = try_report(changed(report_content(HOSTILE, report_query()), [IN_REPORTS[what]]))
    # Those that are told apart by name alone are noted, or not, beside the report.
    assert let_in == (what in ("a reason", "a claim"))


def test_the_largest_report_about_the_small_mnist_network_fits() -> None:
    spec = ReportSpec(570, 10, frozenset(STATISTICS))
    number = (1 << 24) + 1  # of samples: the histograms need all four bytes of their numbers
    arrays = {n: np.zeros(shape, np.int64) for n, (_, shape) in spec.fields().items()}
    arrays["predictions"][:, 0] = number
    arrays["histograms"][..., 40] = number
    arrays["confident_max"] = np.full((10, 570), -np.inf)
    fields = Report(spec, arrays).encode()
    report = tried(lambda: decode_report(fields, spec, sender="x", max_samples=20 * number))
    assert (report.counts == number).all()
