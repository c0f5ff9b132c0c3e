"""What goes over the wire comes back as it was, and arrays from outside are read without trust."""

from __future__ import annotations

import io

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings

from none_core.activations import STATISTICS, Report, ReportError, ReportSpec, build_report
from none_core.flower import messages
from none_core.flower.messages import read_array, read_bytes
from none_core.purification import SampleFilter
from none_core.trigger_inversion import Probe, Triggers
from none_core.undo import Undo
from tests.none_core.flower.toys import LABELS, data_of, net, neurons

DTYPES = ("float32", "float64", "float16", "int64", "int32", "uint8", "bool", "complex64", ">f4")


@settings(deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    order=st.sampled_from("CF"),
    seed=st.integers(0, 100),
)
def test_what_numpy_saves_is_read(
    dtype: str, shape: tuple[int, ...], order: str, seed: int
) -> None:
    drawn = np.asarray(100 * np.random.default_rng(seed).normal(size=shape))
    values = np.empty(shape, dtype, order=order)
    values[...] = drawn
    array = Array(values)
    expected = np.load(io.BytesIO(array.data))
    got = read_array(array, np.dtype(dtype), shape)
    assert got.dtype == expected.dtype == np.dtype(dtype)
    assert got.shape == expected.shape == shape
    assert got.tobytes() == expected.tobytes() == values.tobytes()


def saved(values: np.ndarray, version: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, values, version=version)
    return buffer.getvalue()


def with_header(text: str, payload: bytes) -> bytes:
    head = text.encode() + b" " * (117 - len(text)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + payload


GOOD = np.arange(6, dtype=np.float32).reshape(2, 3)
PAYLOAD = GOOD.tobytes()
NORMAL = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"
assert with_header(NORMAL, PAYLOAD) == Array(GOOD).data


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(PAYLOAD, id="no header"),
        pytest.param(saved(GOOD, (2, 0)), id="version 2"),
        pytest.param(saved(GOOD, (3, 0)), id="version 3"),
        pytest.param(with_header(NORMAL.replace("<f4", ">f4"), PAYLOAD), id="byte order"),
        pytest.param(with_header(NORMAL.replace("<f4", "<i4"), PAYLOAD), id="type"),
        pytest.param(with_header(NORMAL.replace("<f4", "|O"), PAYLOAD), id="objects"),
        pytest.param(with_header(NORMAL.replace("(2, 3)", "(3, 2)"), PAYLOAD), id="shape"),
        pytest.param(with_header(NORMAL.replace("(2, 3)", "(6,)"), PAYLOAD), id="dimensions"),
        pytest.param(with_header(NORMAL.replace("2, 3", "2**60, 3"), PAYLOAD), id="expression"),
        pytest.param(
            with_header(NORMAL.replace("(2, 3)", "(9" + "9" * 40 + ",)"), PAYLOAD), id="huge"
        ),
        pytest.param(with_header(NORMAL.replace("(2, 3)", "(-2, -3)"), PAYLOAD), id="negative"),
        pytest.param(with_header("{" * 100, PAYLOAD), id="nested"),
        pytest.param(with_header(NORMAL, PAYLOAD[:-1]), id="too short"),
        pytest.param(with_header(NORMAL, PAYLOAD + b"\0"), id="too long"),
        pytest.param(with_header(NORMAL, b""), id="no payload"),
    ],
)
def test_hostile_headers_are_refused_and_never_parsed(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parsing(*args: object, **kwargs: object) -> None:
        raise AssertionError("the header was parsed")

    monkeypatch.setattr(np, "load", parsing)
    monkeypatch.setattr(np.lib.format, "read_array", parsing)
    array = Array("float32", (2, 3), "numpy.ndarray", data)
    with pytest.raises(ValueError, match=r"does not hold|bytes, not 24"):
        read_array(array, np.dtype("float32"), (2, 3))


def test_read_bytes_reads_up_to_the_limit_and_no_further() -> None:
    for size in (0, 1, 10):
        values = np.arange(size, dtype=np.uint8)
        array = Array(values)
        limit = len(array.data)
        np.testing.assert_array_equal(read_bytes(array, limit), values)
        with pytest.raises(ValueError, match=f"holds {limit} bytes, more than the {limit - 1}"):
            read_bytes(array, limit - 1)


@pytest.mark.parametrize(
    "array",
    [
        Array(np.zeros((2, 2), np.uint8)),
        Array(np.zeros((), np.uint8)),
        Array(np.zeros(3, np.int8)),
        Array("uint8", (10**30,), "numpy.ndarray", b""),
        Array("uint8", (-1,), "numpy.ndarray", b""),
        Array("uint8", (4,), "numpy.ndarray", Array(np.zeros(3, np.uint8)).data),
    ],
)
def test_read_bytes_refuses_what_is_no_flat_array_of_bytes(array: Array) -> None:
    with pytest.raises(ValueError, match=r"shape|dtype|does not hold"):
        read_bytes(array, 1000)


def test_a_true_for_a_length_spoils_no_later_array() -> None:
    """JSON's true passes for the number one, and headers are remembered by shape."""
    one = np.array([7], np.uint8)
    messages._npy_header.cache_clear()
    assert read_bytes(Array("uint8", (True,), "numpy.ndarray", Array(one).data), 1000) == one
    assert read_bytes(Array(one), 1000) == one


# --- round trips ----------------------------------------------------------------------------------

SPEC = ReportSpec(4, LABELS, frozenset(STATISTICS))


def report(node: int = 11) -> Report:
    return build_report(net(), neurons(), [data_of(node)], SPEC)


def test_a_query_comes_back() -> None:
    arrays = messages.record_of(net().state_dict())
    content = messages.query_content(arrays, SPEC, 7, 3)
    got_arrays, spec, min_count = messages.read_query(content)
    assert (spec, min_count) == (SPEC, 7)
    state = messages.state_of(got_arrays)
    for name, tensor in net().state_dict().items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)


def test_a_probe_comes_back_and_is_only_there_if_asked_for() -> None:
    arrays = messages.record_of(net().state_dict())
    sent = Probe((0, 3, 1), steps=17, images=5, success=0.75)
    content = messages.query_content(arrays, SPEC, 7, 3, sent)
    assert messages.read_probe(content) == sent
    assert messages.round_of(content) == 3
    assert messages.read_query(content)[1:] == (SPEC, 7)
    assert messages.read_probe(messages.query_content(arrays, SPEC, 7, 3)) is None


@pytest.mark.parametrize("shape", [(3, 5, 4), (6,)])
def test_triggers_come_back_in_their_own_memory(shape: tuple[int, ...]) -> None:
    sent = Triggers.unknown(4, torch.zeros(shape))
    sent.mask.normal_()
    sent.pattern.normal_()
    sent.known[2] = True
    record = messages.triggers_record(sent)
    for _ in range(2):
        got = messages.read_triggers(record)
        for name in ("mask", "pattern", "penalty", "known"):
            assert torch.equal(getattr(got, name), getattr(sent, name))
            assert getattr(got, name).dtype == getattr(sent, name).dtype
        got.mask.zero_()  # not what is kept


def test_a_state_is_in_its_own_memory() -> None:
    arrays = messages.record_of(net().state_dict())
    messages.state_of(arrays)["0.weight"].zero_()
    assert messages.state_of(arrays)["0.weight"].abs().sum() > 0


@pytest.mark.parametrize("statistics", [frozenset(), frozenset(STATISTICS)])
def test_a_report_comes_back(statistics: frozenset[str]) -> None:
    spec = ReportSpec(4, LABELS, statistics)
    sent = build_report(net(), neurons(), [data_of(11)], spec)
    content = messages.report_content(sent, ConfigRecord({"round": 5}))
    got = messages.read_report(content, spec, sender="x", server_round=5, max_samples=100)
    assert got.arrays.keys() == sent.arrays.keys()
    for name in sent.arrays.keys() - {"sums"}:
        np.testing.assert_array_equal(got[name], sent[name])
    if "sums" in sent.arrays:
        for one, other in zip(got.moments(), sent.moments(), strict=True):
            np.testing.assert_allclose(one, other, atol=0.02)
        assert got.accuracy == sent.accuracy


@pytest.mark.parametrize(
    "said", [6, 4.5, float("nan"), "5", b"5", pytest.param(10**5000, id="huge"), -1, None]
)
def test_a_report_of_another_round_is_refused(said: object) -> None:
    content = messages.report_content(report(), ConfigRecord({"round": 5}))
    content[messages.QUERY] = ConfigRecord({} if said is None else {"round": said})
    with pytest.raises(ReportError, match=r"round is .*, not 5") as caught:
        messages.read_report(content, SPEC, sender="node 1", server_round=5, max_samples=100)
    assert caught.value.sender == "node 1"
    assert len(str(caught.value)) < 150


def test_a_report_without_its_round_is_refused() -> None:
    content = messages.report_content(report(), ConfigRecord({"round": 5}))
    del content[messages.QUERY]
    with pytest.raises(ReportError, match="round is missing"):
        messages.read_report(content, SPEC, sender="x", server_round=5, max_samples=100)


def test_a_filter_comes_back_and_leaves_no_trace() -> None:
    before = net().state_dict()
    after = {k: v.clone() for k, v in before.items()}
    after["0.weight"][1] = 0
    after["1.num_batches_tracked"] += 3
    sent = SampleFilter(
        labels=np.array([1]),
        neurons=np.array([[2, 3]]),
        sign=np.float32([[1, -1]]),
        mean=np.float32([[0.5, 1.5]]),
        deviation=np.float32([[1, 2]]),
        threshold=np.float32([3]),
    )
    extra = messages.filter_content(sent, Undo.between(before, after), 4)
    train = {"arrays": messages.record_of(after), "config": ConfigRecord({"lr": 0.1})}
    content = RecordDict({**train, **extra})

    got, undo = messages.read_filter(content.array_records[messages.FILTER])
    for name in ("labels", "neurons", "sign", "mean", "deviation", "threshold"):
        np.testing.assert_array_equal(getattr(got, name), getattr(sent, name))
        assert getattr(got, name).dtype == getattr(sent, name).dtype
    restored = undo.apply(messages.state_of(content.array_records["arrays"]))
    for name, tensor in before.items():
        assert torch.equal(restored[name], tensor)
        assert restored[name].shape == tensor.shape

    assert messages.without_filter(content) == RecordDict(train)
    assert messages.without_filter(RecordDict(train)) == RecordDict(train)


def test_without_filter_leaves_a_query_of_the_users_own_alone() -> None:
    content = RecordDict({"arrays": ArrayRecord(), messages.QUERY: ConfigRecord()})
    assert messages.without_filter(content) is content


# --- patterns -------------------------------------------------------------------------------------

IMAGE = (3, 4, 5)


def kept_triggers(shape: tuple[int, ...]) -> Triggers:
    generator = torch.Generator().manual_seed(0)
    triggers = Triggers.unknown(LABELS, torch.zeros(shape))
    triggers.kept_mask.copy_(torch.randn(triggers.kept_mask.shape, generator=generator))
    triggers.kept_pattern.copy_(torch.randn(triggers.kept_pattern.shape, generator=generator))
    return triggers


@pytest.mark.parametrize(("shape", "layered"), [(IMAGE, (4, 4, 5)), ((7,), (2, 7))])
def test_patterns_come_back_as_a_person_would_see_them(
    shape: tuple[int, ...], layered: tuple[int, ...]
) -> None:
    triggers = kept_triggers(shape)
    content = RecordDict({messages.PATTERNS: messages.patterns_record(triggers, [1, 0])})
    found = messages.read_patterns(content, {0, 1, 2}, shape, sender="x")
    assert sorted(found) == [0, 1]
    for label, layers in found.items():
        assert (layers.dtype, layers.shape) == (np.uint8, layered)
        mask = torch.sigmoid(triggers.kept_mask[label]).reshape(layered[1:])
        np.testing.assert_allclose(layers[0] / 255, mask.numpy(), atol=0.002)
        pattern = torch.sigmoid(triggers.kept_pattern[label]).reshape(layers[1:].shape)
        np.testing.assert_allclose(layers[1:] / 255, pattern.numpy(), atol=0.002)


def test_who_shows_nothing_shows_nothing() -> None:
    assert messages.read_patterns(RecordDict(), {1}, IMAGE, sender="x") == {}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (ConfigRecord({"1": 2}), "record 'none.patterns' holds no arrays"),
        ({"7": np.zeros((4, 4, 5), np.uint8)}, "pattern '7' was not asked for"),
        ({"x" * 5000: np.zeros((4, 4, 5), np.uint8)}, "was not asked for"),
        ({"1": np.zeros((4, 4, 5), np.float32)}, "pattern 1 has dtype 'float32'"),
        ({"1": np.zeros((3, 4, 5), np.uint8)}, r"pattern 1 has shape \(3, 4, 5\)"),
        ({"1": np.zeros((4, 400, 500), np.uint8)}, r"pattern 1 has shape \(4, 400, 500\)"),
    ],
)
def test_a_pattern_that_is_none_is_refused(record: object, reason: str) -> None:
    if isinstance(record, dict):
        record = ArrayRecord({name: Array(values) for name, values in record.items()})
    assert isinstance(record, ArrayRecord | ConfigRecord)
    content = RecordDict({messages.PATTERNS: record})
    with pytest.raises(ReportError, match=reason) as refusal:
        messages.read_patterns(content, {1}, IMAGE, sender="node 3")
    assert "node 3" in str(refusal.value)
    assert len(str(refusal.value)) < 500
