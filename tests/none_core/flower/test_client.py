"""The client half: it answers in every kind of app, and leaves out what the server names."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from none_core.activations import (
    LABEL_HISTOGRAMS,
    STATISTICS,
    TRIGGER_SHIFT,
    Report,
    ReportSpec,
    build_report,
)
from none_core.flower import NoneClient, messages
from none_core.flower.messages import record_of
from none_core.flower.policy import ReportPolicy
from none_core.purification import SampleFilter
from none_core.trigger_inversion import Finding, Probe, Triggers, probe_model
from none_core.undo import Undo
from tests.none_core.flower.toys import HIDDEN, INPUTS, LABELS, data_of, net, neurons

SPEC = ReportSpec(HIDDEN, LABELS, frozenset(STATISTICS))
NODE = 11


def context() -> Context:
    return Context(1, NODE, {"partition-id": 0}, RecordDict(), {})


def tensors(_: Context) -> TensorDataset:
    return TensorDataset(*data_of(NODE))


class Listed(Dataset[Any]):
    """The same samples one by one, with labels that are plain ints."""

    def __len__(self) -> int:
        return len(data_of(NODE)[1])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        inputs, labels = data_of(NODE)
        return inputs[index], int(labels[index])


def query(spec: ReportSpec = SPEC, model: nn.Module | None = None) -> Message:
    arrays = record_of((model or net()).state_dict())
    content = messages.query_content(arrays, spec, 1, 4)
    return Message(content, NODE, messages.MESSAGE_TYPE)


def read(reply: Message, spec: ReportSpec = SPEC) -> Report:
    return messages.read_report(reply.content, spec, sender="x", server_round=4, max_samples=10**6)


def assert_same(one: Report, other: Report) -> None:
    for name in one.arrays:
        np.testing.assert_array_equal(one[name], other[name])


def wire(report: Report) -> Report:
    return read(
        Message(messages.report_content(report, ConfigRecord({"round": 4})), reply_to=query())
    )


def new_style(none: NoneClient) -> ClientApp:
    app = ClientApp(mods=[none.mod])
    app.query("activations")(none.query)
    return app


def without_mod(none: NoneClient) -> ClientApp:
    app = ClientApp()
    app.query("activations")(none.query)
    return app


def legacy(none: NoneClient) -> ClientApp:
    def client_fn(context: Context) -> Any:
        raise AssertionError("a query is not for the legacy client")

    return ClientApp(client_fn=client_fn, mods=[none.mod])


# --- answering ------------------------------------------------------------------------------------


@pytest.mark.parametrize("app", [new_style, without_mod, legacy])
def test_every_kind_of_app_answers_a_query(app: Callable[[NoneClient], ClientApp]) -> None:
    reply = app(NoneClient(net, tensors))(query(), context())
    assert_same(read(reply), wire(build_report(net(), neurons(), [data_of(NODE)], SPEC)))
    assert reply.metadata.src_node_id == NODE


def test_a_client_can_be_sent_to_a_worker_after_it_has_answered() -> None:
    """Simulations started from a script or a notebook send the app along with every message."""
    none = NoneClient(net, tensors)
    first = read(none.query(query(), context()))
    assert_same(read(copy.deepcopy(none).query(query(), context())), first)


def test_a_new_style_app_needs_the_handler() -> None:
    """Flower looks for a handler before it calls any mod; the docstring says to register one."""
    with pytest.raises(ValueError, match="activations"):
        ClientApp(mods=[NoneClient(net, tensors).mod])(query(), context())


@pytest.mark.parametrize("batch_size", [1, 7, 40, 1000])
def test_batches_and_kinds_of_data_sets_make_no_difference(batch_size: int) -> None:
    whole = read(NoneClient(net, tensors).query(query(), context()))
    for load_data in (tensors, lambda _: Listed()):
        none = NoneClient(net, load_data, batch_size=batch_size)
        got = read(none.query(query(), context()))
        for name in got.arrays:
            np.testing.assert_allclose(got[name], whole[name], rtol=1e-12)


def test_it_reports_on_the_model_that_was_sent() -> None:
    other = net()
    with torch.no_grad():
        other[0].bias += 3
    none = NoneClient(net, tensors)
    first = read(none.query(query(), context()))
    second = read(none.query(query(model=other), context()))
    assert_same(second, wire(build_report(other, neurons(), [data_of(NODE)], SPEC)))
    assert not np.array_equal(first["histograms"], second["histograms"])
    assert_same(read(none.query(query(), context())), first)


def test_prepare_is_applied_to_inputs_in_every_batch() -> None:
    def as_bytes(_: Context) -> TensorDataset:
        inputs, labels = data_of(NODE)
        return TensorDataset((10 * inputs).round().to(torch.int8), labels)

    none = NoneClient(net, as_bytes, prepare=lambda x: x.float() / 10, batch_size=16)
    rounded = (10 * data_of(NODE)[0]).round() / 10
    expected = build_report(net(), neurons(), [(rounded, data_of(NODE)[1])], SPEC)
    got = read(none.query(query(), context()))
    np.testing.assert_array_equal(got["histograms"], expected["histograms"])


def test_another_model_than_the_servers_is_a_clear_error() -> None:
    spec = ReportSpec(HIDDEN + 1, LABELS, frozenset(STATISTICS))
    with pytest.raises(ValueError, match="asks about 5 neurons, but this client's model has 4"):
        NoneClient(net, tensors).query(query(spec), context())


def test_no_sample_is_a_clear_error() -> None:
    def nothing(_: Context) -> TensorDataset:
        inputs, labels = data_of(NODE)
        return TensorDataset(inputs[:0], labels[:0])

    with pytest.raises(ValueError, match="no sample to report on"):
        NoneClient(net, nothing).query(query(), context())


def test_a_batch_size_below_one_is_named() -> None:
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        NoneClient(net, tensors, batch_size=0)


# --- the filter -----------------------------------------------------------------------------------


def drop_above(label: int, neuron: int, value: float) -> SampleFilter:
    """Drop samples of a label whose neuron exceeds a value."""
    one = np.float32([[1]])
    return SampleFilter(
        np.array([label]), np.array([[neuron]]), one, 0 * one, one, np.float32([value])
    )


def train_message(
    sample_filter: SampleFilter | None,
    model: nn.Module | None = None,
    undo: Undo | None = None,
    server_round: int = 4,
) -> Message:
    content = {
        "arrays": record_of((model or net()).state_dict()),
        "config": ConfigRecord({"lr": 0.1}),
    }
    if sample_filter is not None:
        content |= messages.filter_content(sample_filter, undo or Undo({}, {}), server_round)
    return Message(RecordDict(content), NODE, "train")


def values_of(model: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return neurons().reader(model)(data_of(NODE)[0])[1][0].numpy()


class App:
    """A ClientApp that notes what its train function got."""

    def __init__(self, **options: Any) -> None:
        self.none = NoneClient(net, options.pop("load_data", tensors), **options)
        self.seen: list[RecordDict] = []
        self.kept: list[list[int]] = []
        self.context = context()
        self.app = new_style(self.none)

        @self.app.train()
        def train(message: Message, context: Context) -> Message:
            self.seen.append(message.content)
            self.kept.append(self.none.kept(context).tolist())
            content = RecordDict({"arrays": ArrayRecord(), "metrics": MetricRecord({"n": 1})})
            return Message(content, reply_to=message)

    def train(self, *args: Any, **kwargs: Any) -> Message:
        return self.app(train_message(*args, **kwargs), self.context)


def expected_kept(value: float, model: nn.Module, label: int = 1, neuron: int = 2) -> list[int]:
    labels, values = data_of(NODE)[1].numpy(), values_of(model)
    return [i for i in range(len(labels)) if not (labels[i] == label and values[i, neuron] > value)]


def test_all_samples_are_kept_until_a_filter_comes() -> None:
    app = App()
    reply = app.train(None)
    assert app.kept == [list(range(40))]
    assert messages.PURIFIED not in reply.content


@pytest.mark.parametrize("load_data", [tensors, lambda _: Listed()])
def test_a_filter_drops_samples_for_good(load_data: Callable[[Context], Dataset[Any]]) -> None:
    app = App(load_data=load_data, batch_size=7)
    threshold = float(np.median(values_of(net())[data_of(NODE)[1].numpy() == 1, 2]))
    kept = expected_kept(threshold, net())
    assert 5 <= 40 - len(kept) <= 15

    reply = app.train(drop_above(1, 2, threshold))
    assert app.kept[-1] == kept
    assert reply.content.config_records[messages.PURIFIED] == {"dropped": 40 - len(kept)}
    assert dict(app.seen[-1]) == dict(train_message(None).content)  # the user's code sees no trace

    app.train(None)
    assert app.kept[-1] == kept
    reply = app.train(drop_above(1, 2, threshold), server_round=5)  # nothing is left to drop
    assert app.kept[-1] == kept
    assert reply.content.config_records[messages.PURIFIED] == {"dropped": 0}


def test_a_round_that_is_repeated_is_filtered_as_it_was_the_first_time() -> None:
    values = values_of(net())[data_of(NODE)[1].numpy() == 1, 2]
    high, low = (float(np.quantile(values, share)) for share in (0.8, 0.5))
    app = App()
    app.train(drop_above(1, 2, high), server_round=3)
    replies = [app.train(drop_above(1, 2, low), server_round=4) for _ in range(3)]
    dropped = [reply.content.config_records[messages.PURIFIED]["dropped"] for reply in replies]
    assert dropped[0] == dropped[1] == dropped[2] > 0
    assert app.kept[1:] == [expected_kept(low, net())] * 3
    app.train(drop_above(1, 2, 100.0), server_round=5)  # what was dropped before stays so
    assert app.kept[-1] == expected_kept(low, net())


def test_reports_are_about_what_is_kept() -> None:
    app = App()
    app.train(drop_above(1, 2, -100.0))  # every sample of label 1
    inputs, labels = data_of(NODE)
    expected = build_report(net(), neurons(), [(inputs[labels == 0], labels[labels == 0])], SPEC)
    got = read(app.app(query(), app.context))
    assert_same(got, wire(expected))
    assert got.counts.tolist() == [20, 0]


def test_the_filter_reads_the_model_before_the_reset() -> None:
    before, after = net(), net()
    neurons().reset(after, np.array([2]))
    undo = Undo.between(before.state_dict(), after.state_dict())
    threshold = float(np.median(values_of(before)[data_of(NODE)[1].numpy() == 1, 2]))
    with_undo, without = App(), App()
    with_undo.train(drop_above(1, 2, threshold), after, undo)
    without.train(drop_above(1, 2, threshold), after)
    assert with_undo.kept[-1] == expected_kept(threshold, before)
    assert without.kept[-1] == expected_kept(threshold, after)
    assert with_undo.kept != without.kept


def test_a_filter_for_a_label_that_is_not_there_drops_nothing() -> None:
    app = App()
    reply = app.train(drop_above(7, 2, -100.0))
    assert app.kept == [list(range(40))]
    assert reply.content.config_records[messages.PURIFIED] == {"dropped": 0}


def test_a_model_first_made_for_a_filter_also_answers_queries() -> None:
    """Any thread may be the first to see a filter, and the next to be asked for a report."""
    app = App()
    app.train(drop_above(1, 2, 100.0))
    assert_same(
        read(app.app(query(), app.context)),
        wire(build_report(net(), neurons(), [data_of(NODE)], SPEC)),
    )
    app.train(drop_above(1, 2, 100.0))


@pytest.mark.usefixtures("one_syntax_tree_at_a_time")
def test_threads_do_not_share_a_model() -> None:
    models: list[nn.Module] = []

    def counted() -> nn.Module:
        models.append(net())
        return models[-1]

    none = NoneClient(counted, tensors)
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            for _ in range(3):
                none.query(query(), context())
        except BaseException as error:  # shown below
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(models) == 3


def test_a_data_set_that_changes_its_size_is_a_clear_error() -> None:
    size = [40]

    def shrinking(_: Context) -> TensorDataset:
        inputs, labels = data_of(NODE)
        return TensorDataset(inputs[: size[0]], labels[: size[0]])

    none, state = NoneClient(net, shrinking), context()
    none.purify(train_message(drop_above(1, 2, 0.0)).content, state)
    size[0] = 39
    for call in (
        lambda: none.kept(state),
        lambda: none.query(query(), state),
        lambda: none.purify(train_message(drop_above(1, 2, 0.0), server_round=5).content, state),
    ):
        with pytest.raises(ValueError, match="has 39 samples, but had 40 when it was filtered"):
            call()


def test_a_train_message_with_two_models_is_a_clear_error() -> None:
    message = train_message(drop_above(1, 2, 0.0))
    message.content["teacher"] = record_of(net().state_dict())
    with pytest.raises(ValueError, match="must carry one model, this one carries 2"):
        NoneClient(net, tensors).purify(message.content, context())


def test_other_messages_pass_through() -> None:
    none, calls = NoneClient(net, tensors), []

    def call_next(message: Message, context: Context) -> Message:
        calls.append(message)
        return message

    message = Message(RecordDict({"arrays": ArrayRecord()}), NODE, "evaluate")
    assert none.mod(message, context(), call_next) is message
    assert calls == [message]


# --- looking for triggers -------------------------------------------------------------------------

PROBE = Probe(tuple(range(LABELS)), steps=4, images=6, success=0.5)
SOUGHT = ReportSpec(HIDDEN, LABELS, frozenset({TRIGGER_SHIFT}))


def probing(
    spec: ReportSpec = SOUGHT, server_round: int = 4, probe: Probe | None = PROBE
) -> Message:
    arrays = record_of(net().state_dict())
    content = messages.query_content(arrays, spec, 1, server_round, probe)
    return Message(content, NODE, messages.MESSAGE_TYPE)


def expected(
    samples: slice | np.ndarray = slice(None),
    start: Triggers | None = None,
    server_round: int = 4,
) -> Finding:
    """What the inversion itself finds in the client's samples."""
    inputs, labels = (tensor[samples] for tensor in data_of(NODE))
    model = net().requires_grad_(False)
    start = start or Triggers.unknown(LABELS, inputs[0])
    generator = torch.Generator().manual_seed(server_round)
    return probe_model(model, neurons().reader(model), inputs, labels, PROBE, start, generator)


def assert_reports(report: Report, finding: Finding) -> None:
    probed, size, success, shift = report.trigger_shift()
    np.testing.assert_array_equal(probed, finding.probed)
    np.testing.assert_allclose(size, finding.size, rtol=1e-6)
    np.testing.assert_allclose(success, finding.success, rtol=1e-6)
    np.testing.assert_array_equal(shift, np.float16(finding.shift))


def test_it_reports_the_triggers_that_it_finds() -> None:
    where = context()
    report = read(NoneClient(net, tensors, batch_size=16).query(probing(), where), SOUGHT)
    assert_reports(report, expected())
    assert report["probes"].tolist() == [1] * LABELS
    assert report["shift"].any()


@pytest.mark.parametrize("allowed", [False, True])
def test_what_a_watched_class_s_trigger_looks_like_is_shown_only_if_allowed(allowed: bool) -> None:
    limits = ReportPolicy(patterns=allowed)
    none, where = NoneClient(net, tensors, policy=lambda _: limits), context()
    first = none.query(probing(), where)
    assert messages.PATTERNS not in first.content  # nothing is watched
    watching = replace(PROBE, watched=(1,))
    second = none.query(probing(server_round=5, probe=watching), where)
    sample = tuple(data_of(NODE)[0].shape[1:])
    shown = messages.read_patterns(second.content, {1}, sample, sender="x")
    assert list(shown) == ([1] if allowed else [])


def test_triggers_stay_with_the_client_and_are_where_it_starts_the_next_time() -> None:
    none, where = NoneClient(net, tensors), context()
    first = none.query(probing(), where)
    assert set(first.content) == {messages.REPORT, messages.QUERY}
    fields = first.content.array_records[messages.REPORT]
    assert set(fields) == set(SOUGHT.fields())
    kept = messages.read_triggers(where.state.array_records["none.triggers"])
    cold = expected()
    for name in ("mask", "pattern", "penalty", "known"):
        assert torch.equal(getattr(kept, name), getattr(cold.triggers, name))

    second = none.query(probing(server_round=5), where)
    warm = expected(start=cold.triggers, server_round=5)
    report = messages.read_report(
        second.content, SOUGHT, sender="x", server_round=5, max_samples=1000
    )
    assert_reports(report, warm)
    assert not np.array_equal(warm.shift, expected(server_round=5).shift)


def test_a_round_that_is_repeated_is_probed_as_it_was_the_first_time() -> None:
    none, where = NoneClient(net, tensors), context()
    for server_round in (4, 5):
        content = [none.query(probing(server_round=server_round), where).content for _ in range(3)]
        reports = [dict(each.array_records[messages.REPORT]) for each in content]
        assert reports[0] == reports[1] == reports[2]
    third = none.query(probing(server_round=6), where).content.array_records[messages.REPORT]
    assert dict(third) != reports[0]


@pytest.mark.parametrize(
    ("statistics", "probe"),
    [({LABEL_HISTOGRAMS}, PROBE), ({LABEL_HISTOGRAMS, TRIGGER_SHIFT}, None)],
)
def test_it_looks_for_triggers_only_if_it_is_told_to(
    statistics: set[str], probe: Probe | None
) -> None:
    spec, where = ReportSpec(HIDDEN, LABELS, frozenset(statistics)), context()
    report = read(NoneClient(net, tensors).query(probing(spec, probe=probe), where), spec)
    assert "none.triggers" not in where.state
    if TRIGGER_SHIFT in statistics:
        assert not report.trigger_shift()[0].any()


def test_it_looks_in_the_samples_that_it_trains_on() -> None:
    where = context()
    mask = np.ones(40, dtype=np.uint8)
    mask[::3] = 0
    where.state["none.kept"] = ArrayRecord({"mask": Array(mask)})
    report = read(NoneClient(net, tensors).query(probing(), where), SOUGHT)
    assert_reports(report, expected(np.flatnonzero(mask)))


def test_it_looks_in_a_limited_number_of_samples() -> None:
    def many(_: Context) -> TensorDataset:
        inputs, labels = data_of(NODE)
        return TensorDataset(inputs.repeat(30, 1), labels.repeat(30))

    report = read(NoneClient(net, many).query(probing(), context()), SOUGHT)
    chosen = np.linspace(0, 1199, 512).astype(np.int64) % 40
    assert_reports(report, expected(chosen))


def test_samples_of_another_shape_than_before_are_a_clear_error() -> None:
    where = context()
    other = Triggers.unknown(LABELS, torch.zeros(INPUTS + 1))
    where.state["none.triggers"] = messages.triggers_record(other)
    with pytest.raises(ValueError, match="another shape than when they were last probed"):
        NoneClient(net, tensors).query(probing(), where)
