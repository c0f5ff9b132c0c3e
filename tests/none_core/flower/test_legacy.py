"""NONE around a legacy strategy: real instructions over the real wire format, and hostile ones."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, MetricRecord, RecordDict
from flwr.client import Client, NumPyClient
from flwr.common import (
    Code,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersIns,
    GetPropertiesIns,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
    serde,
)
from flwr.server import History, Server, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAdam, FedAvg, FedAvgM, Strategy
from flwr.serverapp.strategy import FedAvg as MessageFedAvg
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from torch import nn
from torch.utils.data import TensorDataset

from none_core.conformance import DefenceConformance
from none_core.flower import NoneStrategy as MessageNoneStrategy
from none_core.flower import messages
from none_core.flower.legacy import NoneClient, NoneStrategy
from none_core.flower.policy import ReportPolicy
from none_core.flower.toy_federation import (
    EXAMPLE_INPUT,
    ToyFederation,
    attack_success,
    attackers,
    local_data,
    toy_model,
)

CLIENTS, MALICIOUS, ROUNDS = 10, 4, 3
FEW = 4  # clients, where no attack is played
NAMES = list(toy_model().state_dict())
ALL: dict[str, Any] = {"min_fit_clients": FEW, "fraction_evaluate": 0.0}

pytestmark = pytest.mark.usefixtures("one_syntax_tree_at_a_time")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep sums from depending on the number of threads, in those of the clients too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arrays_of(model: nn.Module) -> list[np.ndarray]:
    return [value.numpy() for value in model.state_dict().values()]


def load_data(context: Context) -> TensorDataset:
    partition = int(context.node_config["partition-id"])
    bad = attackers(CLIENTS, MALICIOUS)
    return TensorDataset(*local_data(partition, bad.index(partition) if partition in bad else None))


class ToyClient(NumPyClient):
    """As users wrote them."""

    def __init__(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        self.net, self.inputs, self.labels = toy_model(), inputs, labels

    def get_parameters(self, config: dict[str, Any]) -> list[np.ndarray]:
        return arrays_of(self.net)

    def set_parameters(self, parameters: list[np.ndarray]) -> None:
        state = zip(NAMES, map(torch.from_numpy, parameters), strict=True)
        self.net.load_state_dict(dict(state))

    def fit(self, parameters: list[np.ndarray], config: dict[str, Any]) -> Any:
        assert not [key for key in config if key.startswith("none.")]
        self.set_parameters(parameters)
        optimiser = torch.optim.SGD(self.net.parameters(), lr=0.3, momentum=0.9)
        for _ in range(20):
            optimiser.zero_grad()
            nn.functional.cross_entropy(self.net(self.inputs), self.labels).backward()
            optimiser.step()
        return arrays_of(self.net), len(self.labels), {"samples": len(self.labels)}

    def evaluate(self, parameters: list[np.ndarray], config: dict[str, Any]) -> Any:
        return 0.5, len(self.labels), {"seen": 1}


def app(none: NoneClient) -> Callable[[Context], Client]:
    def client_fn(context: Context) -> Client:
        return ToyClient(*load_data(context)[none.kept(context)]).to_client()

    return client_fn


class LocalProxy(ClientProxy):
    """A client behind the wire format of ``start_server``, in this process."""

    def __init__(self, cid: str, partition: int, client_fn: Callable[[Context], Any]) -> None:
        super().__init__(cid)
        self.client_fn = client_fn
        self.context = Context(1, partition, {"partition-id": partition}, RecordDict(), {})

    def _client(self) -> Client:
        return self.client_fn(self.context).to_client()

    def get_properties(self, ins: GetPropertiesIns, timeout: Any, group_id: Any) -> Any:
        return self._client().get_properties(ins)

    def get_parameters(self, ins: GetParametersIns, timeout: Any, group_id: Any) -> Any:
        return self._client().get_parameters(ins)

    def fit(self, ins: FitIns, timeout: Any, group_id: Any) -> FitRes:
        received = serde.fit_ins_from_proto(serde.fit_ins_to_proto(ins))
        return serde.fit_res_from_proto(serde.fit_res_to_proto(self._client().fit(received)))

    def evaluate(self, ins: EvaluateIns, timeout: Any, group_id: Any) -> EvaluateRes:
        received = serde.evaluate_ins_from_proto(serde.evaluate_ins_to_proto(ins))
        result = self._client().evaluate(received)
        return serde.evaluate_res_from_proto(serde.evaluate_res_to_proto(result))

    def reconnect(self, ins: Any, timeout: Any, group_id: Any) -> Any:
        raise AssertionError("nobody disconnects here")


@dataclass
class Deployment:
    """A legacy server and its clients."""

    clients: dict[int, Callable[[Context], Any]] = field(default_factory=dict)
    cid: Callable[[int], str] = lambda partition: f"{100 + partition}"
    released: list[dict[str, np.ndarray]] = field(default_factory=list)
    size: int = CLIENTS

    def run(self, strategy: Strategy, rounds: int = ROUNDS) -> History:
        none = NoneClient(toy_model, load_data)
        manager = SimpleClientManager()
        for partition in range(self.size):
            client_fn = self.clients.get(partition, none.wrap(app(none)))
            manager.register(LocalProxy(self.cid(partition), partition, client_fn))
        inner = getattr(strategy, "strategy", strategy)

        def keep(_: int, arrays: list[np.ndarray], __: Any) -> None:
            self.released.append(dict(zip(NAMES, arrays, strict=True)))

        inner.evaluate_fn = keep
        history, _ = Server(client_manager=manager, strategy=strategy).fit(rounds, None)
        return history


def fedavg(cls: Any = FedAvg, **settings: Any) -> Any:
    return cls(initial_parameters=ndarrays_to_parameters(arrays_of(toy_model())), **ALL, **settings)


def defended(inner: Any = None, **settings: Any) -> NoneStrategy:
    return NoneStrategy(inner or fedavg(), toy_model, EXAMPLE_INPUT, **settings)


class Ordered(FedAvg):
    """Adds floats in a fixed order, since Flower's server returns the results in any."""

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        results = sorted(results, key=lambda pair: pair[0].cid)
        return super().aggregate_fit(server_round, results, failures)


class AddsUpAsMessagesDo(Ordered):
    """Rounds as the Message API's FedAvg does, which weighs first and then adds."""

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        _, metrics = super().aggregate_fit(server_round, results, failures)
        replies = [result for _, result in sorted(results, key=lambda pair: pair[0].cid)]
        contents = [
            RecordDict(
                {
                    "arrays": ArrayRecord(parameters_to_ndarrays(reply.parameters)),
                    "metrics": MetricRecord({"num-examples": reply.num_examples}),
                }
            )
            for reply in replies
        ]
        arrays = aggregate_arrayrecords(contents, "num-examples")
        return ndarrays_to_parameters(arrays.to_numpy_ndarrays()), metrics


# --- a whole deployment ---------------------------------------------------------------------------


def test_the_backdoor_works_and_with_the_adapter_it_does_not() -> None:
    undefended, kept_out = Deployment(), Deployment()
    undefended.run(fedavg())
    history = kept_out.run(defended())
    assert attack_success(undefended.released[-1]) > 0.9
    assert attack_success(kept_out.released[-1]) < 0.3
    reports = dict(history.metrics_distributed_fit["none-reports"])
    assert reports == {1: CLIENTS, 2: CLIENTS, 3: CLIENTS}
    assert sum(n for _, n in history.metrics_distributed_fit["none-samples-dropped"]) > 0


def test_it_decides_as_the_message_api_does() -> None:
    deployment, audits = Deployment(), ([], [])
    deployment.run(defended(fedavg(AddsUpAsMessagesDo), audit=audits[0].append))
    inner = MessageFedAvg(**DefenceConformance.everybody(CLIENTS))
    models = ToyFederation(CLIENTS, MALICIOUS).run(
        MessageNoneStrategy(inner, toy_model, EXAMPLE_INPUT, audit=audits[1].append), ROUNDS
    )
    for legacy, new in zip(deployment.released, models, strict=True):
        for name in NAMES:
            np.testing.assert_array_equal(legacy[name], new[name])
    for one, other in zip(*audits, strict=True):
        assert one["decision"] == other["decision"]
        assert len(one["suspicions"]) == len(other["suspicions"])
    assert audits[0][-1]["reports"]


def test_connections_without_a_node_id_are_numbered() -> None:
    strategy = defended()
    Deployment(cid=lambda partition: f"{partition:032x}f").run(strategy, rounds=2)
    record = strategy.defence.record
    assert record.reports == CLIENTS
    assert record.purified
    assert set(record.purified) <= set(range(1, CLIENTS + 1))


def test_before_the_start_round_it_changes_nothing() -> None:
    plain, waiting = Deployment(), Deployment()
    plain.run(fedavg(Ordered), rounds=2)
    waiting.run(defended(fedavg(Ordered), start_round=99), rounds=2)
    for one, other in zip(plain.released, waiting.released, strict=True):
        for name in NAMES:
            np.testing.assert_array_equal(one[name], other[name])


def test_the_last_round_is_queried_if_it_is_known() -> None:
    rounds = []
    strategy = defended(num_rounds=2, every=5, start_round=1, audit=lambda e: rounds.append(e))
    Deployment().run(strategy, rounds=2)
    assert [entry["round"] for entry in rounds] == [1, 2]


def test_other_parameters_than_the_state_dict_are_a_clear_error() -> None:
    inner = FedAvg(initial_parameters=ndarrays_to_parameters(arrays_of(toy_model())[:2]), **ALL)
    manager = SimpleClientManager()
    for cid in range(CLIENTS):
        manager.register(LocalProxy(f"{cid}", cid, load_data))
    parameters = inner.initialize_parameters(manager)
    assert parameters is not None
    with pytest.raises(ValueError, match=r"2 parameters, but .* has 4 entries"):
        NoneStrategy(inner, toy_model, EXAMPLE_INPUT).configure_fit(1, parameters, manager)


# --- the clients' half ----------------------------------------------------------------------------


def test_the_wrapped_client_is_made_with_the_samples_that_the_filter_left() -> None:
    none, kept = NoneClient(toy_model, load_data), []

    def client_fn(context: Context) -> Client:
        kept.append((context.node_config["partition-id"], len(none.kept(context))))
        return app(none)(context)

    bad = attackers(CLIENTS, MALICIOUS)[0]
    deployment = Deployment({bad: none.wrap(client_fn)})
    strategy = defended()
    deployment.run(strategy)
    whole = len(load_data(Context(1, 1, {"partition-id": bad}, RecordDict(), {})))
    fits = [n for _, n in kept]
    assert fits[0] == whole
    assert fits[-1] < whole
    assert len(fits) == ROUNDS  # no client is made to answer a query


def test_everything_else_reaches_the_wrapped_client() -> None:
    none = NoneClient(toy_model, load_data)
    client = none.wrap(app(none))(Context(1, 1, {"partition-id": 0}, RecordDict(), {})).to_client()
    parameters = client.get_parameters(GetParametersIns({})).parameters
    for got, wanted in zip(parameters_to_ndarrays(parameters), arrays_of(toy_model()), strict=True):
        np.testing.assert_array_equal(got, wanted)
    result = client.evaluate(EvaluateIns(parameters, {"none": 1}))
    assert (result.loss, result.metrics) == (0.5, {"seen": 1})
    assert client.get_properties(GetPropertiesIns({})).status.code != Code.OK  # has none
    assert client.fit(FitIns(parameters, {})).metrics == {"samples": 60}


def test_a_client_that_cannot_report_says_so_and_goes_on() -> None:
    def nothing(_: Context) -> TensorDataset:
        return TensorDataset(torch.zeros(0, 12), torch.zeros(0, dtype=torch.int64))

    empty, none = NoneClient(toy_model, nothing), NoneClient(toy_model, load_data)
    strategy = defended()
    Deployment({3: empty.wrap(app(none))}, size=FEW).run(strategy, rounds=1)
    assert (strategy.defence.record.missing, strategy.defence.record.reports) == (1, FEW - 1)


def test_a_client_that_declines_says_why() -> None:
    closed = NoneClient(toy_model, load_data, policy=lambda context: ReportPolicy(reports=False))
    strategy = defended()
    Deployment({3: closed.wrap(app(closed))}, size=FEW).run(strategy, rounds=1)
    record = strategy.defence.record
    assert list(record.declined) == [103]
    assert (record.missing, record.reports, record.refused) == (1, FEW - 1, [])


def test_a_client_that_adds_noise_says_what_it_cost_and_not_what_it_dropped() -> None:
    private = NoneClient(toy_model, load_data, policy=lambda context: ReportPolicy(noise=1.0))
    wrapped, said = private.wrap(app(private)), []

    def heard(result: EvaluateRes) -> EvaluateRes:
        said.append(json.loads(str(result.metrics["none.privacy"])))
        return result

    bad = attackers(CLIENTS, MALICIOUS)[0]
    strategy = defended()
    deployment = Deployment({bad: lambda c: Hostile(wrapped(c).to_client(), evaluate=heard)})
    deployment.run(strategy, rounds=2)
    assert [cost["answers"] for cost in said][:2] == [1, 2]
    assert strategy.defence.record.purified
    assert 100 + bad not in strategy.defence.record.purified


# --- clients that are old, late or hostile --------------------------------------------------------


def test_a_client_without_the_line_is_refused_as_a_reporter_and_still_trains() -> None:
    none = NoneClient(toy_model, load_data)
    strategy = defended()
    Deployment({3: app(none)}, size=FEW).run(strategy, rounds=1)
    assert [str(r) for r in strategy.defence.record.refused] == [
        "activation report of node 103 refused: record 'none.report' is missing"
    ]
    assert strategy.defence.record.reports == FEW - 1


def test_a_late_report_is_missing() -> None:
    free = threading.Event()

    class Late(ToyClient):
        def evaluate(self, parameters: Any, config: Any) -> Any:
            free.wait(30)
            return super().evaluate(parameters, config)

    strategy = defended(timeout=1.0)
    late = lambda context: Late(*load_data(context).tensors).to_client()  # noqa: E731
    try:
        Deployment({3: late}, size=FEW).run(strategy, rounds=1)
    finally:
        free.set()
    assert (strategy.defence.record.missing, strategy.defence.record.reports) == (1, FEW - 1)


class Hostile(Client):
    """Trains honestly, and then sends something else."""

    def __init__(self, honest: Client, fit: Any = None, evaluate: Any = None) -> None:
        self.honest, self.bad_fit, self.bad_evaluate = honest, fit, evaluate

    def fit(self, ins: FitIns) -> FitRes:
        result = self.honest.fit(ins)
        return self.bad_fit(result) if self.bad_fit else result

    def evaluate(self, ins: EvaluateIns) -> EvaluateRes:
        result = self.honest.evaluate(ins)
        return self.bad_evaluate(result) if self.bad_evaluate else result


def tensors(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[FitRes], FitRes]:
    def changed(result: FitRes) -> FitRes:
        data = change(list(result.parameters.tensors))
        return replace(result, parameters=Parameters(data, "numpy.ndarray"))

    return changed


def first(array: np.ndarray) -> Callable[[list[bytes]], list[bytes]]:
    return lambda data: [Array(array).data, *data[1:]]


SHAPE = tuple(toy_model().state_dict()[NAMES[0]].shape)
BAD_FITS = {
    "nothing": tensors(lambda data: []),
    "one too few": tensors(lambda data: data[:-1]),
    "one too many": tensors(lambda data: [*data, data[0]]),
    "another shape": tensors(first(np.zeros((2, 2), np.float32))),
    "another dtype": tensors(first(np.zeros(SHAPE, np.float64))),
    "NaN": tensors(first(np.full(SHAPE, np.nan, np.float32))),
    "no npy": tensors(lambda data: [b"\x80\x04pickle", *data[1:]]),
    "cut off": tensors(lambda data: [data[0][:-4], *data[1:]]),
    "a thousand million samples": lambda r: replace(r, num_examples=10**9),
    "minus one sample": lambda r: replace(r, num_examples=-1),
    "NaN as a metric": lambda r: replace(r, metrics={"samples": float("nan")}),
    "a text as a metric": lambda r: replace(r, metrics={"samples": "many"}),
    "other metrics": lambda r: replace(r, metrics={"other": 1}),
    "another serialisation": lambda r: replace(
        r, parameters=Parameters(r.parameters.tensors, "pickle")
    ),
}


@pytest.mark.parametrize("bad", BAD_FITS.values(), ids=BAD_FITS)
def test_a_hostile_update_is_refused_and_changes_nothing(bad: Callable[[FitRes], FitRes]) -> None:
    none = NoneClient(toy_model, load_data)
    honest = none.wrap(app(none))
    released = []
    for change in (bad, failed):  # as if that client had not answered
        deployment = Deployment(
            {3: lambda c, change=change: Hostile(honest(c).to_client(), fit=change)}, size=FEW
        )
        strategy = defended(fedavg(Ordered), start_round=99)
        deployment.run(strategy, rounds=1)
        released.append(deployment.released[-1])
        refused = [r.sender for r in strategy.defence.record.refused]
        assert refused == (["node 103"] if change is bad else [])
    for name in NAMES:
        np.testing.assert_array_equal(released[0][name], released[1][name])


def failed(result: FitRes) -> FitRes:
    return replace(result, status=Status(Code.FIT_NOT_IMPLEMENTED, "no"))


def changed_report(**changes: Any) -> Callable[[EvaluateRes], EvaluateRes]:
    def changed(result: EvaluateRes) -> EvaluateRes:
        return replace(result, metrics={**result.metrics, **changes})

    return changed


BAD_REPORTS = {
    "no report": lambda r: replace(r, metrics={}),
    "a text": changed_report(**{"none.report/predictions": "text"}),
    "noise": changed_report(**{"none.report/predictions": b"\x00" * 7}),
    "a field too many": changed_report(**{"none.report/extra": b"1"}),
    "too long": changed_report(**{"none.report/predictions": b"1" * 10**6}),
    "a thousand fields": changed_report(**{f"none.report/{i}": b"1" for i in range(1000)}),
    "another round": changed_report(**{"none.query": '{"round": 9}'}),
    "a round that is none": changed_report(**{"none.query": '{"round": {"a": 1}}'}),
    "no JSON": changed_report(**{"none.query": "{"}),
    "no object": changed_report(**{"none.query": "[1]"}),
    "depth": changed_report(**{"none.query": "[" * 9000}),
    "length": changed_report(**{"none.query": '{"round": 1' + " " * 10_000 + "}"}),
    "bytes": changed_report(**{"none.query": b"1"}),
}


@pytest.mark.parametrize("bad", BAD_REPORTS.values(), ids=BAD_REPORTS)
def test_a_hostile_report_is_refused(bad: Callable[[EvaluateRes], EvaluateRes]) -> None:
    none = NoneClient(toy_model, load_data)
    honest = none.wrap(app(none))
    strategy = defended()
    deployment = Deployment({3: lambda c: Hostile(honest(c).to_client(), evaluate=bad)}, size=FEW)
    deployment.run(strategy, rounds=1)
    record = strategy.defence.record
    assert [r.sender for r in record.refused] == ["node 103"]
    assert record.reports == FEW - 1


def test_a_lie_about_dropped_samples_is_not_written_down() -> None:
    none = NoneClient(toy_model, load_data)
    honest = none.wrap(app(none))
    lie = lambda r: replace(r, metrics={**r.metrics, "none.dropped": -5})  # noqa: E731
    strategy = defended()
    Deployment({3: lambda c: Hostile(honest(c).to_client(), fit=lie)}, size=FEW).run(
        strategy, rounds=1
    )
    assert strategy.defence.record.purified == {}


# --- strategies that remember ---------------------------------------------------------------------


@pytest.mark.parametrize("cls", [FedAdam, FedAvgM])
def test_strategies_with_a_memory_do_not_undo_a_reset(cls: Any) -> None:
    settings = {"server_momentum": 0.9} if cls is FedAvgM else {}
    inner = fedavg(cls, **settings)
    strategy, deployment = defended(inner, start_round=99), Deployment()
    reset = strategy.defence.defended

    def without_a_neuron(arrays: Any, again: Any) -> Any:
        arrays = reset(arrays, again)
        for name in NAMES[:2]:
            values = np.array(arrays[name].numpy())
            values[5] = 0
            arrays[name] = Array(values)
        return arrays

    strategy.defence.defended = without_a_neuron
    deployment.run(strategy, rounds=1)
    released = deployment.released[-1]
    assert not released[NAMES[0]][5].any()
    assert released[NAMES[0]][4].any()
    if cls is FedAvgM:
        memory, momentum = parameters_to_ndarrays(inner.initial_parameters), inner.momentum_vector
    else:
        memory, momentum = inner.current_weights, inner.m_t
    for name, value in zip(NAMES, memory, strict=True):
        np.testing.assert_array_equal(value, released[name])
    assert not momentum[0][5].any()
    assert momentum[0][4].any()


def test_messages_of_ours_stay_out_of_the_users_way() -> None:
    """The toy client asserts that none of our keys reaches it; so must the strategy's metrics."""
    seen = []

    def aggregated(metrics: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
        seen.extend(key for _, each in metrics for key in each)
        return {"all": sum(n for n, _ in metrics)}

    history = Deployment().run(defended(fedavg(fit_metrics_aggregation_fn=aggregated)))
    assert set(seen) == {"samples"}
    assert "all" in history.metrics_distributed_fit
    assert messages.FILTER not in history.metrics_distributed_fit
