"""Train replies that are hostile one way each: refused by name, and without any effect."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedAvgM, FedMedian, FedTrimmedAvg, MultiKrum

from none_core.flower import messages
from none_core.flower.messages import record_of
from none_core.flower.validation import TrainReplyError, admit, template_of
from tests.none_core.flower.toys import (
    HONEST,
    HOSTILE,
    Outcome,
    answering,
    bits,
    honest_answer,
    honest_round,
    net,
    plain_average,
    play,
    silence,
    train_content,
    trained,
)

FIRST = "0.weight"
COUNTER = "1.num_batches_tracked"

Change = Callable[[RecordDict], object]


def arrays(content: RecordDict) -> ArrayRecord:
    return content.array_records["arrays"]


def with_array(name: str, array: Array) -> Change:
    return lambda content: arrays(content).__setitem__(name, array)


def with_values(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    return with_array(name, Array(np.asarray(change(trained(HOSTILE)[name].copy()))))


def with_one_value(name: str, value: float) -> Change:
    def change(values: np.ndarray) -> np.ndarray:
        values.flat[-1] = value
        return values

    return with_values(name, change)


def with_data(name: str, change: Callable[[bytes], bytes]) -> Change:
    """Change the bytes of an array, but not what it says about itself."""

    def apply(content: RecordDict) -> None:
        honest = arrays(content)[name]
        arrays(content)[name] = Array(honest.dtype, honest.shape, honest.stype, change(honest.data))

    return apply


def with_claim(name: str, **claims: object) -> Change:
    """Change what an array says about itself, but not its bytes."""

    def apply(content: RecordDict) -> None:
        a = arrays(content)[name]
        honest = {"dtype": a.dtype, "shape": a.shape, "stype": a.stype, "data": a.data}
        arrays(content)[name] = Array(**{**honest, **claims})

    return apply


def with_metric(name: str, value: object) -> Change:
    return lambda content: content.metric_records["metrics"].__setitem__(name, value)


def without_metric(name: str) -> Change:
    return lambda content: content.metric_records["metrics"].__delitem__(name)


def renamed(old: str, new: str) -> Change:
    def apply(content: RecordDict) -> None:
        content[new] = content[old]
        del content[old]

    return apply


def npy(values: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


def header(shape: object, descr: str = "<f4", order: bool = False) -> bytes:
    buffer = io.BytesIO()
    fields = {"descr": descr, "fortran_order": order, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def archive(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, values)
    return buffer.getvalue()


WEIGHTS = trained(HOSTILE)[FIRST]

# Name, what it does to an honest reply, which part is to be named, and what is to be said about it.
CASES: dict[str, tuple[Change, str, str]] = {
    # keys
    "an extra array": (with_array("extra", Array(np.zeros(3))), "array 'extra'", "not part of"),
    "an extra array with a long name": (
        with_array("x" * 10_000, Array(np.zeros(3))),
        "array 'xxx",
        "not part of",
    ),
    "a missing array": (lambda c: arrays(c).__delitem__(FIRST), f"array '{FIRST}'", "is missing"),
    "no arrays": (lambda c: arrays(c).clear(), "array '0.bias'", "is missing"),
    "a renamed array": (
        lambda c: arrays(c).__setitem__("0.Weight", arrays(c).pop(FIRST)),
        f"array '{FIRST}'",
        "is missing",
    ),
    # shapes and types
    "a transposed array": (with_values(FIRST, np.transpose), FIRST, "has shape (3, 4), not (4, 3)"),
    "a flat array": (with_values(FIRST, np.ravel), FIRST, "has shape (12,)"),
    "a longer array": (with_values(FIRST, lambda v: np.vstack([v, v])), FIRST, "has shape (8, 3)"),
    "a counter with a dimension": (with_values(COUNTER, np.atleast_1d), COUNTER, "has shape (1,)"),
    "an empty array": (with_values(FIRST, lambda v: v[:0]), FIRST, "has shape (0, 3)"),
    "doubles": (with_values(FIRST, np.float64), FIRST, "has dtype 'float64', not float32"),
    "halves": (with_values(FIRST, np.float16), FIRST, "has dtype 'float16'"),
    "complex numbers": (with_values(FIRST, np.complex64), FIRST, "has dtype 'complex64'"),
    "a counter of floats": (with_values(COUNTER, np.float32), COUNTER, "has dtype 'float32'"),
    "texts": (with_array(FIRST, Array(WEIGHTS.astype("U4"))), FIRST, "has dtype '<U4'"),
    "another byte order": (
        with_array(FIRST, Array(WEIGHTS.astype(">f4"))),
        FIRST,
        "has dtype '>f4'",
    ),
    # values
    "NaN": (with_one_value(FIRST, np.nan), FIRST, "holds NaN or infinity"),
    "infinity": (with_one_value("3.bias", np.inf), "3.bias", "holds NaN or infinity"),
    "minus infinity": (
        with_one_value("1.running_var", -np.inf),
        "1.running_var",
        "holds NaN or inf",
    ),
    # bytes
    "truncated bytes": (with_data(FIRST, lambda d: d[:-1]), FIRST, "holds 47 bytes, not 48"),
    "a truncated header": (with_data(FIRST, lambda d: d[:40]), FIRST, "does not hold the array"),
    "no bytes": (with_data(FIRST, lambda d: b""), FIRST, "does not hold the array"),
    "bytes behind the array": (with_data(FIRST, lambda d: d + b"\0"), FIRST, "holds 49 bytes"),
    "noise": (with_data(FIRST, lambda d: b"\x93NOTNUMPY" * 20), FIRST, "does not hold the array"),
    "a pickle": (
        with_data(FIRST, lambda d: pickle.dumps(WEIGHTS)),
        FIRST,
        "does not hold the array",
    ),
    "a pickle in numpy's format": (
        with_data(FIRST, lambda d: npy(np.array([{}, WEIGHTS], dtype=object), allow_pickle=True)),
        FIRST,
        "does not hold the array",
    ),
    "a zip archive": (
        with_data(FIRST, lambda d: archive(WEIGHTS)),
        FIRST,
        "does not hold the array",
    ),
    "a header of another shape": (
        with_data(FIRST, lambda d: npy(WEIGHTS.T.copy())),
        FIRST,
        "does not hold the array",
    ),
    "a header of a gigantic shape": (
        with_data(FIRST, lambda d: header((1 << 40, 3)) + d[-48:]),
        FIRST,
        "does not hold the array",
    ),
    "a header of another type": (
        with_data(FIRST, lambda d: header((4, 3), "<i4") + d[-48:]),
        FIRST,
        "does not hold the array",
    ),
    "a header of the second version": (
        with_data(FIRST, lambda d: b"\x93NUMPY\x02" + d[7:]),
        FIRST,
        "does not hold the array",
    ),
    "a claim of another shape": (with_claim(FIRST, shape=(3, 4)), FIRST, "has shape (3, 4)"),
    "a claim of a gigantic shape": (
        with_claim(FIRST, shape=(1 << 62, 1 << 62)),
        FIRST,
        "has shape",
    ),
    "a claim of a negative shape": (with_claim(FIRST, shape=(-4, -3)), FIRST, "has shape (-4, -3)"),
    "a claim of another type": (with_claim(FIRST, dtype="int32"), FIRST, "has dtype 'int32'"),
    "an unknown type": (with_claim(FIRST, dtype="x" * 10_000), FIRST, "has dtype 'xxx"),
    "another serialisation": (
        with_claim(FIRST, stype="pickle"),
        FIRST,
        "is serialised as 'pickle'",
    ),
    # number of examples
    "a gigantic weight": (with_metric("num-examples", 10**9), "num-examples", "claims 1e+09, more"),
    "eleven times the usual weight": (
        with_metric("num-examples", 11 * 43),
        "num-examples",
        "more than 10 times the median",
    ),
    "a weight beyond 64 bits": (with_metric("num-examples", 2**64), "num-examples", "claims 1.8"),
    "a weight beyond floats": (with_metric("num-examples", 10**400), "num-examples", "too large"),
    "a negative weight": (with_metric("num-examples", -40), "num-examples", "is -40, not positive"),
    "a weight of zero": (with_metric("num-examples", 0), "num-examples", "is 0, not positive"),
    "a negative weight beyond floats": (
        with_metric("num-examples", -(10**400)),
        "num-examples",
        "large",
    ),
    "a weight of minus zero": (with_metric("num-examples", -0.0), "num-examples", "not positive"),
    "a weight of NaN": (with_metric("num-examples", float("nan")), "num-examples", "is NaN"),
    "a weight of infinity": (with_metric("num-examples", float("inf")), "num-examples", "infinite"),
    "a list of weights": (with_metric("num-examples", [40]), "num-examples", "not one number"),
    "no weight": (without_metric("num-examples"), "num-examples", "is missing"),
    # other metrics
    "an extra metric": (
        with_metric("asr", 1.0),
        "metric 'asr'",
        "is one number here, but missing in",
    ),
    "a missing metric": (without_metric("train-loss"), "metric 'train-loss'", "is missing here"),
    "a longer list": (with_metric("curve", [0.5] * 3), "metric 'curve'", "a list of 3 here"),
    "an empty list": (with_metric("curve", []), "metric 'curve'", "a list of 0 here"),
    "a list for a number": (with_metric("train-loss", [1.0]), "metric 'train-loss'", "a list of 1"),
    "an empty list for a number": (
        with_metric("train-loss", []),
        "metric 'train-loss'",
        "a list of 0",
    ),
    "a number for a list": (with_metric("curve", 0.5), "metric 'curve'", "is one number here"),
    "a NaN metric": (with_metric("train-loss", float("nan")), "metric 'train-loss'", "is NaN"),
    "NaN in a list": (with_metric("curve", [0.5, float("nan")]), "metric 'curve'", "is NaN"),
    "a metric beyond floats": (
        with_metric("train-loss", 10**400),
        "metric 'train-loss'",
        "too large",
    ),
    "no metrics": (lambda c: c.metric_records["metrics"].clear(), "num-examples", "is missing"),
    # records
    "two array records": (
        lambda c: c.__setitem__("more", ArrayRecord(dict(arrays(c)))),
        "reply",
        "2 array records",
    ),
    "no array record": (lambda c: c.__delitem__("arrays"), "reply", "holds 0 array records"),
    "two metric records": (
        lambda c: c.__setitem__("more", MetricRecord({"num-examples": 1})),
        "reply",
        "2 metric records",
    ),
    "no metric record": (lambda c: c.__delitem__("metrics"), "reply", "holds 0 metric records"),
    "no record": (lambda c: c.clear(), "reply", "holds 0 array records"),
    "a configuration for arrays": (
        lambda c: c.__setitem__("arrays", ConfigRecord({"a": b"x"})),
        "reply",
        "holds 0 array records",
    ),
    "a renamed array record": (renamed("arrays", "weights"), "array record", "is called 'weights'"),
    "a renamed metric record": (renamed("metrics", "m" * 9999), "metric record", "is called 'mmm"),
}


def hostile_reply(change: Change) -> Callable[[Message], list[Message]]:
    def answer(message: Message) -> list[Message]:
        content = train_content(HOSTILE)
        change(content)
        return [Message(content, reply_to=message)]

    return answering(train=answer)


def assert_left_out(outcome: Outcome, expected: Outcome) -> None:
    assert outcome.bits() == expected.bits()
    assert outcome.metrics is not None
    assert expected.metrics is not None
    counted = ("none-refused", "none-missing")
    assert {k: v for k, v in outcome.metrics.items() if k not in counted} == {
        k: v for k, v in expected.metrics.items() if k not in counted
    }


def test_the_honest_round_is_flowers_average_over_those_who_answer() -> None:
    everybody, without = (honest_round(trains=t, reports=True) for t in (True, False))
    assert not everybody.record.refused
    assert (everybody.record.reports, everybody.record.missing) == (5, 0)
    assert {n: b for n, (_, b) in everybody.bits().items()} == plain_average([*HONEST, HOSTILE])
    assert {n: b for n, (_, b) in without.bits().items()} == plain_average(HONEST)
    assert everybody.bits() != without.bits()
    assert everybody.bits()[COUNTER][0] == "int64"


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_reply_is_refused_by_name_and_changes_nothing(case: str) -> None:
    change, field, reason = CASES[case]
    outcome = play(hostile_reply(change))
    assert_left_out(outcome, honest_round(trains=False, reports=True))
    ((what, sender, named, text),) = outcome.refusals()
    assert (what, sender) == ("train reply", f"node {HOSTILE}")
    assert field in named
    assert reason in text
    assert len(text) < 300
    assert "\n" not in text
    assert outcome.metrics is not None
    assert outcome.metrics["none-refused"] == 1


@pytest.mark.parametrize(
    "strategy",
    [FedAvg, FedMedian, FedTrimmedAvg, MultiKrum, lambda **k: FedAvgM(server_momentum=0.5, **k)],
    ids=["FedAvg", "FedMedian", "FedTrimmedAvg", "MultiKrum", "FedAvgM"],
)
def test_every_hostile_reply_leaves_every_strategy_running(strategy: Callable[..., FedAvg]) -> None:
    def make() -> FedAvg:
        return strategy(min_train_nodes=5, min_available_nodes=5)

    expected = play(answering(silence), make()).bits()
    for case, (change, _, _) in CASES.items():
        assert play(hostile_reply(change), make()).bits() == expected, case


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(with_metric("num-examples", 43), id="the usual weight"),
        pytest.param(with_metric("num-examples", 10 * 43), id="ten times the usual weight"),
        pytest.param(with_metric("num-examples", 0.5), id="a fraction"),
        pytest.param(with_array(FIRST, Array(np.asfortranarray(WEIGHTS))), id="Fortran order"),
        pytest.param(lambda c: c.__setitem__("note", ConfigRecord({"a": "b"})), id="a note"),
    ],
)
def test_what_is_merely_unusual_is_let_in(change: Change) -> None:
    outcome = play(hostile_reply(change))
    assert not outcome.record.refused
    assert outcome.bits() != honest_round(trains=False, reports=True).bits()


def test_finite_but_gigantic_weights_end_no_run() -> None:
    largest = np.finfo(np.float32).max

    def explode(content: RecordDict) -> None:
        for name, value in trained(HOSTILE).items():
            if value.dtype == np.float32:
                arrays(content)[name] = Array(np.full_like(value, largest))
            else:
                arrays(content)[name] = Array(np.full_like(value, np.iinfo(np.int64).max))

    outcome = play(hostile_reply(explode))
    assert outcome.record.reports == 5
    assert outcome.bits()[COUNTER][0] == "int64"


# --- who sent it ----------------------------------------------------------------------------------


def forged(message: Message, node: int) -> Message:
    message.metadata.__dict__["_src_node_id"] = node
    assert message.metadata.src_node_id == node
    return message


def test_a_second_reply_of_the_same_node_is_refused() -> None:
    def twice(message: Message) -> list[Message]:
        second = train_content(HOSTILE)
        second["arrays"] = record_of(net().state_dict())
        return [honest_answer(message)[0], Message(second, reply_to=message)]

    outcome = play(answering(twice))
    assert outcome.bits() == honest_round(trains=True, reports=True).bits()
    ((_, sender, field, text),) = outcome.refusals()
    assert (sender, field) == (f"node {HOSTILE}", "reply")
    assert "second" in text


def test_a_reply_of_a_node_that_was_not_asked_is_refused() -> None:
    def as_somebody_else(message: Message) -> list[Message]:
        return [forged(Message(train_content(HOSTILE), reply_to=message), 12345)]

    outcome = play(answering(as_somebody_else))
    assert_left_out(outcome, honest_round(trains=False, reports=True))
    ((_, sender, _, text),) = outcome.refusals()
    assert sender == "node 12345"
    assert "was not asked for" in text


def test_error_replies_reach_the_inner_strategy_and_are_not_refused() -> None:
    seen: list[Message] = []

    class Watching(FedAvg):
        def aggregate_train(self, server_round, replies):
            seen.extend(replies)
            return super().aggregate_train(server_round, seen)

    def raising(message: Message) -> list[Message]:
        # Flower's own errors carry the id of the SuperLink, which was not asked.
        return [forged(Message(Error(2, "failed"), reply_to=message), 1)]

    outcome = play(answering(raising), Watching(min_train_nodes=5, min_available_nodes=5))
    assert_left_out(outcome, honest_round(trains=False, reports=True))
    assert not outcome.record.refused
    assert [m.metadata.src_node_id for m in seen if m.has_error()] == [1]


def test_nobody_valid_keeps_the_previous_model() -> None:
    lines: list[dict] = []
    poison = CASES["NaN"][0]
    one_reply = hostile_reply(poison)
    outcome = play(one_reply, Nobody(min_train_nodes=5, min_available_nodes=5), audit=lines.append)
    assert outcome.arrays is None
    assert "kept the previous model" in outcome.record.decision
    assert [line["decision"] for line in lines] == [outcome.record.decision]
    assert lines[0]["refused"] == [str(r) for r in outcome.record.refused]


class Nobody(FedAvg):
    """Aggregates nothing, as Bulyan does with too few replies."""

    def aggregate_train(self, server_round, replies):
        return None, None


# --- the order of arrays --------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_arrays_in_another_order_are_put_in_order(momentum: float) -> None:
    """FedAvgM, MultiKrum and the privacy wrappers compare arrays by position, not by name."""

    def reverse(content: RecordDict) -> None:
        content["arrays"] = ArrayRecord(dict(reversed(arrays(content).items())))

    def round_of(change: Change) -> Outcome:
        strategy = FedAvgM(min_train_nodes=5, min_available_nodes=5, server_momentum=momentum)
        return play(hostile_reply(change), strategy)

    ordered, reversed_ = round_of(lambda content: None), round_of(reverse)
    assert reversed_.bits() == ordered.bits()
    assert list(reversed_.bits()) == list(net().state_dict())


def test_admit_sorts_the_arrays_of_the_first_reply_too() -> None:
    sent = record_of(net().state_dict())
    instruction = Message(RecordDict({"arrays": sent}), 1, "train")
    content = train_content(HOSTILE)
    content["arrays"] = ArrayRecord(dict(reversed(arrays(content).items())))
    (reply,), refused = admit([Message(content, reply_to=instruction)], template_of(sent))
    assert not refused
    assert list(arrays(reply.content)) == list(sent)
    assert bits(arrays(reply.content)) == bits(arrays(train_content(HOSTILE)))


# --- what most replies look like ------------------------------------------------------------------


def replies_of(contents: list[RecordDict]) -> tuple[list[Message], dict]:
    sent = record_of(net().state_dict())
    pairs = [
        (Message(RecordDict({"arrays": sent}), node, "train"), content)
        for node, content in enumerate(contents, start=1)
    ]
    return [Message(c, reply_to=m) for m, c in pairs], template_of(sent)


def test_the_first_to_answer_does_not_decide_what_is_usual() -> None:
    contents = [train_content(HOSTILE), *(train_content(n) for n in HONEST)]
    with_metric("asr", 1.0)(contents[0])
    replies, template = replies_of(contents)
    admitted, refused = admit(replies, template)
    assert admitted == replies[1:]
    assert [r.sender for r in refused] == ["node 1"]


def test_the_weight_limit_follows_the_median_of_the_claims() -> None:
    for claims, ratio in (
        ([10, 10, 10, 101], 10.0),
        ([10, 10, 10, 100], 10.0),
        ([1, 3, 5, 9], 2.0),
    ):
        contents = [train_content(n) for n in HONEST]
        for content, claim in zip(contents, claims, strict=True):
            with_metric("num-examples", claim)(content)
        replies, template = replies_of(contents)
        admitted, _ = admit(replies, template, max_weight_ratio=ratio)
        middle = sorted(claims)
        limit = ratio * (middle[1] + middle[2]) / 2
        wanted = [reply for reply, claim in zip(replies, claims, strict=True) if claim <= limit]
        assert admitted == wanted


@pytest.mark.parametrize(
    ("claims", "counted"),
    [
        ([10, 10, 10, 30], [10, 10, 10, 30]),
        ([10, 10, 10, 31], [10, 10, 10, 30]),
        ([10, 10, 10, 100], [10, 10, 10, 30]),
        ([10, 10, 10, 31.5], [10, 10, 10, 30.0]),
        ([1, 1, 1, 1], [1, 1, 1, 1]),
    ],
)
def test_a_claim_counts_up_to_three_times_the_median(
    claims: list[float], counted: list[float]
) -> None:
    contents = [train_content(n) for n in HONEST]
    for content, claim in zip(contents, claims, strict=True):
        with_metric("num-examples", claim)(content)
    before = [next(iter(content.metric_records.values())) for content in contents]
    replies, template = replies_of(contents)

    admitted, refused = admit(replies, template)

    assert (admitted, refused) == (replies, [])
    weights = [next(iter(m.content.metric_records.values()))["num-examples"] for m in admitted]
    assert weights == counted
    assert [type(weight) for weight in weights] == [type(claim) for claim in claims]
    assert [record["num-examples"] for record in before] == claims, "the sender's own record stays"


def test_another_metric_may_weight_the_average() -> None:
    contents = [train_content(n) for n in HONEST]
    for content in contents[1:]:
        with_metric("tokens", 7)(content)
        without_metric("num-examples")(content)
    replies, template = replies_of(contents)
    admitted, refused = admit(replies, template, weighted_by="tokens")
    assert admitted == replies[1:]
    assert [(r.sender, r.field) for r in refused] == [("node 1", "metric 'tokens'")]
    assert isinstance(refused[0], TrainReplyError)


def test_no_reply_is_no_error() -> None:
    assert admit([], {}) == ([], [])


def test_what_clients_say_they_dropped_is_believed_within_reason() -> None:
    def saying(dropped: object) -> Outcome:
        record = ConfigRecord({"dropped": dropped})
        return play(hostile_reply(lambda c: c.__setitem__(messages.PURIFIED, record)))

    assert saying(7).record.purified == {HOSTILE: 7}
    for lie in (-1, 10**12, 10**400, 1.5, "many", b"", [1]):
        outcome = saying(lie)
        assert outcome.record.purified == {}
        assert outcome.metrics is not None
        assert outcome.metrics["none-samples-dropped"] == 0
