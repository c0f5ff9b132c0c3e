"""Changes that make a train reply or a report hostile, as hypothesis draws them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from none_core.flower import messages
from tests.none_core.flower.toys import HOSTILE, net, trained

MAX_SAMPLES = 10_000_000  # the default

Change = Callable[[RecordDict], object]

STATE = net().state_dict()
NAMES = sorted(STATE)
FLOATS = [name for name in NAMES if STATE[name].is_floating_point()]
TEXT = st.text(max_size=20)
NOT_FINITE = st.sampled_from([np.nan, np.inf, -np.inf])


# --- changes to a train reply ---------------------------------------------------------------------


def put_array(name: str, array: Array) -> Change:
    return lambda content: content.array_records["arrays"].__setitem__(name, array)


def put_metric(name: str, value: Any) -> Change:
    return lambda content: content.metric_records["metrics"].__setitem__(name, value)


@st.composite
def other_shape(draw: st.DrawFn) -> Change:
    name = draw(st.sampled_from(NAMES))
    honest = trained(HOSTILE)[name]
    shape = draw(
        st.lists(st.integers(0, 6), max_size=4).map(tuple).filter(lambda s: s != honest.shape)
    )
    return put_array(name, Array(np.zeros(shape, honest.dtype)))


@st.composite
def other_dtype(draw: st.DrawFn) -> Change:
    name = draw(st.sampled_from(NAMES))
    honest = trained(HOSTILE)[name]
    dtypes = ["f2", "f4", "f8", ">f4", "i1", "i4", "i8", "u8", "?", "c8", "U3", "S4", "M8[s]"]
    dtype = draw(st.sampled_from(dtypes).filter(lambda d: np.dtype(d) != honest.dtype))
    return put_array(name, Array(np.zeros(honest.shape, dtype)))


@st.composite
def not_finite(draw: st.DrawFn) -> Change:
    name = draw(st.sampled_from(FLOATS))
    values = trained(HOSTILE)[name].copy()
    values.flat[draw(st.integers(0, values.size - 1))] = draw(NOT_FINITE)
    return put_array(name, Array(values))


@st.composite
def other_bytes(draw: st.DrawFn) -> Change:
    name = draw(st.sampled_from(NAMES))
    honest = Array(trained(HOSTILE)[name])
    cut = st.integers(0, len(honest.data) - 1).map(lambda end: honest.data[:end])
    longer = st.binary(min_size=1, max_size=9).map(lambda more: honest.data + more)
    noise = st.binary(max_size=300)
    header = st.binary(min_size=128, max_size=128).map(lambda h: h + honest.data[128:])
    data = draw(st.one_of(cut, longer, noise, header).filter(lambda d: d != honest.data))
    return put_array(name, Array(honest.dtype, honest.shape, honest.stype, data))


@st.composite
def other_claim(draw: st.DrawFn) -> Change:
    name = draw(st.sampled_from(NAMES))
    honest = Array(trained(HOSTILE)[name])
    claim = {"dtype": honest.dtype, "shape": honest.shape, "stype": honest.stype}
    size = st.integers(-(2**70), 2**70)
    key, value = draw(
        st.one_of(
            st.tuples(st.just("dtype"), TEXT),
            st.tuples(st.just("stype"), TEXT),
            st.tuples(st.just("shape"), st.lists(size, max_size=4).map(tuple)),
        ).filter(lambda pair: claim[pair[0]] != pair[1])
    )
    return put_array(name, Array(**{**claim, key: value}, data=honest.data))


@st.composite
def other_layers(draw: st.DrawFn) -> Change:
    removed = draw(st.lists(st.sampled_from(NAMES), max_size=3, unique=True))
    added = draw(
        st.lists(TEXT.filter(lambda n: n not in NAMES), min_size=0 if removed else 1, max_size=3)
    )

    def change(content: RecordDict) -> None:
        arrays = content.array_records["arrays"]
        for name in removed:
            arrays.pop(name, None)
        for name in added:
            arrays[name] = Array(np.zeros((4, 3), np.float32))

    return change


@st.composite
def other_count(draw: st.DrawFn) -> Change:
    finite = st.floats(allow_nan=False, allow_infinity=False)
    value = draw(
        st.one_of(
            st.integers(max_value=0),
            st.integers(min_value=431),
            st.integers(400, 5000).map(lambda digits: 10**digits),
            finite.filter(lambda x: x <= 0 or x > 430),
            NOT_FINITE,
            st.lists(st.integers(1, 100), max_size=3),
        )
    )
    return put_metric("num-examples", value)


@st.composite
def other_metrics(draw: st.DrawFn) -> Change:
    number = st.integers() | st.floats(allow_nan=False)
    return draw(
        st.one_of(
            st.tuples(TEXT.filter(lambda n: n not in USUAL), number).map(lambda p: put_metric(*p)),
            st.sampled_from(USUAL).map(without_metric),
            NOT_FINITE.map(lambda x: put_metric("train-loss", x)),
            NOT_FINITE.map(lambda x: put_metric("curve", [0.0, x])),
            st.lists(st.floats(0, 1), max_size=4).map(lambda v: put_metric("train-loss", v)),
            st.lists(st.floats(0, 1), max_size=4)
            .filter(lambda v: len(v) != 2)
            .map(lambda v: put_metric("curve", v)),
        )
    )


USUAL = ("curve", "num-examples", "train-loss")


def without_metric(name: str) -> Change:
    return lambda content: content.metric_records["metrics"].pop(name, None)


@st.composite
def other_records(draw: st.DrawFn) -> Change:
    """Always the last change, since others look for the records by name."""
    what = draw(st.sampled_from(["arrays", "metrics"]))
    name = draw(TEXT.filter(lambda n: n not in ("arrays", "metrics")))
    kind = draw(st.sampled_from(["drop", "add", "rename", "other type", "swap"]))

    def change(content: RecordDict) -> None:
        if kind == "swap":
            content["arrays"], content["metrics"] = content["metrics"], content["arrays"]
        elif kind == "other type":
            content[what] = ConfigRecord({"arrays": b"", "num-examples": 40})
        elif kind == "add":
            content[name] = ArrayRecord() if what == "arrays" else MetricRecord({"num-examples": 1})
        else:
            record = content[what]
            del content[what]
            if kind == "rename":
                content[name] = record

    return change


TRAIN = st.tuples(
    st.lists(
        st.one_of(
            other_shape(),
            other_dtype(),
            not_finite(),
            other_bytes(),
            other_claim(),
            other_layers(),
            other_count(),
            other_metrics(),
        ),
        min_size=1,
        max_size=3,
    ),
    st.lists(other_records(), max_size=1),
).map(lambda pair: pair[0] + pair[1]) | other_records().map(lambda change: [change])


# --- changes to a report --------------------------------------------------------------------------

FIELDS = (
    *("predictions", "histograms", "sums", "at_least_zero", "positions", "confident_count"),
    *("confident_max", "unlikely_count", "unlikely_sum", "unlikely_square_sum"),
    *("probes", "mask_size", "mask_success", "shift"),
)
REALS = ("confident_max", "unlikely_sum", "unlikely_square_sum", "mask_size", "mask_success")


def pack(values: np.ndarray) -> bytes:
    """Wire form of a field: the width of a number, then zlib over the byte planes."""
    width = values.dtype.itemsize
    planes = np.ascontiguousarray(values.reshape(-1, 1).view(np.uint8).T)
    return bytes([width]) + zlib.compress(planes.tobytes())


def flat(data: bytes) -> Array:
    return Array(np.frombuffer(data, np.uint8))


def put_field(name: str, array: Array) -> Change:
    return lambda content: content.array_records[messages.REPORT].__setitem__(name, array)


def alter(name: str, dtype: str, change: Callable[[np.ndarray], object]) -> Change:
    """Change a field's numbers, and pack them as they should be."""

    def apply(content: RecordDict) -> None:
        record = content.array_records[messages.REPORT]
        if name not in record:  # removed by another change
            return
        packed = record[name].numpy()
        letter = {"f": "f", "i": "i"}.get(dtype[1], "u")
        planes = np.frombuffer(zlib.decompress(packed[1:].tobytes()), np.uint8)
        values = np.ascontiguousarray(planes.reshape(int(packed[0]), -1).T)
        values = values.view(f"<{letter}{packed[0]}").ravel().astype(dtype)
        change(values)
        record[name] = flat(pack(values))

    return apply


def setting(position: int, value: float) -> Callable[[np.ndarray], object]:
    return lambda values: values.__setitem__(position % len(values), value)


@st.composite
def field_bytes(draw: st.DrawFn) -> Change:
    name = draw(st.sampled_from(FIELDS))

    cut = st.integers(1, 200).map(lambda n: lambda data: data[: max(0, len(data) - n)])
    longer = st.binary(min_size=1, max_size=2000).map(lambda more: lambda data: data + more)
    noise = st.binary(max_size=200).map(lambda other: lambda data: other)
    width = st.integers(0, 255).map(lambda w: lambda data: bytes([(data[0] + w) % 256 or 3]))
    bomb = st.sampled_from([10**4, 10**7]).map(
        lambda size: lambda data: data[:1] + zlib.compress(bytes(size))
    )
    change = draw(st.one_of(cut, longer, noise, width, bomb))

    def apply(content: RecordDict) -> None:
        record = content.array_records[messages.REPORT]
        if name in record:
            record[name] = flat(change(record[name].numpy().tobytes()))

    return apply


@st.composite
def field_form(draw: st.DrawFn) -> Change:
    name = draw(st.sampled_from(FIELDS))
    dtype = draw(st.sampled_from(["i1", "u2", "i8", "f4", "f8", "?", "U2"]))
    shape = draw(st.sampled_from([(), (1,), (7,), (2, 5), (0,)]))
    return put_field(name, Array(np.zeros(shape, dtype)))


@st.composite
def field_claim(draw: st.DrawFn) -> Change:
    name = draw(st.sampled_from(FIELDS))
    data = Array(np.arange(9, dtype=np.uint8)).data
    size = st.integers(-(2**70), 2**70).filter(lambda n: n != 9)
    shape = draw(st.lists(size, max_size=3).map(tuple))
    return put_field(name, Array("uint8", shape, "numpy.ndarray", data))


@st.composite
def other_fields(draw: st.DrawFn) -> Change:
    if draw(st.booleans()):
        name = draw(st.sampled_from(FIELDS))
        return lambda content: content.array_records[messages.REPORT].pop(name, None)
    name = draw(TEXT.filter(lambda n: n not in FIELDS))
    return put_field(name, flat(b"\x01"))


@st.composite
def false_counts(draw: st.DrawFn) -> Change:
    """Negative and gigantic counts, and counts that contradict each other."""
    position = draw(st.integers(0, 10**6))
    counts = draw(
        st.sampled_from(["predictions", "confident_count", "unlikely_count", "positions", "probes"])
    )
    beyond = st.integers(MAX_SAMPLES << 24 | 1, (1 << 64) - 1)
    return draw(
        st.one_of(
            st.integers(-(2**63), -1).map(lambda n: alter(counts, "<i8", setting(position, n))),
            beyond.map(lambda n: alter(counts, "<u8", setting(position, n))),
            st.integers(1, 10**6).map(
                lambda n: alter("histograms", "<u4", lambda v: shift(v, position, n))
            ),
            st.integers(1, 10**6).map(
                lambda n: alter("predictions", "<u8", lambda v: shift(v, position, n))
            ),
            st.just(alter("at_least_zero", "<u8", setting(position, 10**6))),
            st.integers(17, 10**6).map(lambda n: alter("probes", "<u8", setting(position, n))),
            # What was said about a class is still there.
            st.just(alter("probes", "<u8", setting(position, 0))),
        )
    )


def shift(values: np.ndarray, position: int, by: int) -> None:
    values[position % len(values)] += by


@st.composite
def false_reals(draw: st.DrawFn) -> Change:
    name = draw(st.sampled_from(REALS))
    # Minus infinity is what a maximum over no sample is.
    value = draw(st.sampled_from([np.nan, np.inf, 1e300] + [-np.inf] * (name != "confident_max")))
    return alter(name, "<f8", setting(draw(st.integers(0, 10**6)), value))


@st.composite
def false_shares(draw: st.DrawFn) -> Change:
    """Masks of more than the whole input or less than none, and shifts beyond belief."""
    position = draw(st.integers(0, 10**6))
    share = st.floats(-10, -1e-6) | st.floats(1.0001, 10)
    shift = st.floats(1001, 60_000) | st.sampled_from([np.nan, np.inf])
    return draw(
        st.one_of(
            *(
                share.map(lambda x, name=name: alter(name, "<f8", setting(position, x)))
                for name in ("mask_size", "mask_success")
            ),
            *(
                shift.map(lambda x, s=sign: alter("shift", "<f2", setting(position, s * x)))
                for sign in (-1, 1)
            ),
        )
    )


@st.composite
def other_envelope(draw: st.DrawFn) -> Change:
    """Always the last change."""
    kind = draw(st.sampled_from(["round", "no round", "no report", "other type", "renamed"]))
    anything = st.one_of(
        st.integers(),
        st.floats(),
        TEXT,
        st.binary(max_size=9),
        st.just(10**5000),
        st.just(b"\0" * 9**6),
    )
    value = draw(anything.filter(lambda v: v != 2))
    name = draw(TEXT.filter(lambda n: n not in (messages.QUERY, messages.REPORT)))

    def change(content: RecordDict) -> None:
        if kind == "round":
            content[messages.QUERY] = ConfigRecord({"round": value})
        elif kind == "no round":
            del content[messages.QUERY]
        elif kind == "other type":
            content[messages.REPORT] = MetricRecord({"predictions": 1})
        else:
            record = content[messages.REPORT]
            del content[messages.REPORT]
            if kind == "renamed":
                content[name] = record

    return change


REPORT = st.tuples(
    st.lists(
        st.one_of(
            field_bytes(),
            field_form(),
            field_claim(),
            other_fields(),
            false_counts(),
            false_reals(),
            false_shares(),
        ),
        min_size=1,
        max_size=1,
    ),
    st.lists(other_envelope(), max_size=1),
).map(lambda pair: pair[0] + pair[1]) | other_envelope().map(lambda change: [change])


def changed(content: RecordDict, changes: list[Change]) -> RecordDict:
    """Apply changes to a content, one after the other."""
    for change in changes:
        change(content)
    return content
