"""NONE for deployments from before Flower's Message API: their channel, clients and strategy stay.

Flower 1.41 still runs them: by ``start_server`` and ``start_client`` (gRPC, deprecated), and by
``ServerApp(server_fn=...)`` with ``ClientApp(client_fn=...)``. They know four instructions and no
messages of one's own, so a query travels as an *evaluate* instruction and the report as the metrics
of its answer; the sample filter rides in the configuration of a *fit* instruction. A client without
NONE's line evaluates the queried model as any other, and its answer is refused as no report.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from logging import WARNING
from typing import Any, cast

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.client import Client, NumPyClient
from flwr.common import (
    Code,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersIns,
    GetParametersRes,
    GetPropertiesIns,
    GetPropertiesRes,
    Parameters,
    Scalar,
    Status,
    parameters_to_ndarrays,
)
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.logger import log
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvgM, FedOpt, Strategy
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray
from torch import Tensor, nn

from none_core.flower import client, messages
from none_core.flower.messages import (
    DECLINED,
    FILTER,
    MODEL,
    MOST_RECORDS,
    PRIVACY,
    PURIFIED,
    QUERY,
    REPORT,
)
from none_core.flower.strategy import make_defence
from none_core.flower.validation import Template, template_of
from none_core.flower.wrapped import Rewind, inner_of, second_aggregation, without_reset

ClientFn = Callable[[Context], Client | NumPyClient]

# Keys in configurations and metrics, which hold single numbers, texts and bytes only. Records of
# single values and lists travel under their own names, as JSON.
_DROPPED = "none.dropped"  # samples that the filter has just taken out
_FIELD = f"{REPORT}/"  # and the name of a field of a report: its bytes
_ARRAY = f"{FILTER}/"  # and the name of an array of a filter: npy
_WEIGHT = "num-examples"
_MOST_JSON = 10_000  # characters that a client may say in one record


class NoneStrategy(Strategy):
    """Defend a strategy of ``flwr.server.strategy`` with NONE.

    It works wherever such a strategy does: in ``start_server``, in ``ServerApp(server_fn=...)`` and
    in a ``Server`` of one's own. The wrapped strategy samples, configures and aggregates as it
    always does; :class:`none_core.flower.NoneStrategy` says what happens in between. The parameters
    must be the model's whole ``state_dict``, in its order, as in Flower's examples::

        [value.cpu().numpy() for value in net.state_dict().values()]

    Strategies of Flower's that keep a momentum or their own copy of the model (FedAvgM, FedAdam,
    FedAdagrad, FedYogi) are told of resets; one's own that does so would undo them.

    On ``start_server``'s channel nobody proves who they are: a client is a connection, and whoever
    connects anew is a new client with a clean reputation.

    Parameters
    ----------
    strategy : flwr.server.strategy.Strategy
    model_fn : callable
        Builds the global model's architecture.
    example_input : Tensor
        One batch as the model takes it.
    num_rounds : int, optional
        As in the ``ServerConfig``, which strategies do not see: so the last round is queried also
        with ``every`` > 1.
    **settings
        As for :class:`none_core.flower.NoneStrategy`.
    """

    def __init__(
        self,
        strategy: Strategy,
        model_fn: Callable[[], nn.Module],
        example_input: Tensor,
        *,
        num_rounds: int | None = None,
        **settings: Any,
    ) -> None:
        self.strategy = strategy
        self.defence = make_defence(model_fn, example_input, **settings)
        self.defence.last_round = num_rounds
        self._template = template_of(messages.record_of(model_fn().state_dict()))
        self._nodes: dict[str, int] = {}
        self._sent: dict[int, Message] = {}

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Initialise as the wrapped strategy does."""
        return self.strategy.initialize_parameters(client_manager)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Configure as the wrapped strategy does, and add the sample filter."""
        chosen = self.strategy.configure_fit(server_round, parameters, client_manager)
        _identify()
        proxies = {self._node(proxy): proxy for proxy, _ in chosen}
        arrays = _named(parameters, self._template)
        outgoing = [Message(RecordDict(), node, "train") for node in proxies]
        sent = self.defence.configured(
            server_round, arrays, outgoing, cast(Grid, _Proxies(proxies))
        )
        self._sent = {message.metadata.dst_node_id: message for message in sent}
        return [
            (proxy, _with_filter(ins, self._sent[self._node(proxy)].content))
            for proxy, ins in chosen
        ]

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Validate, aggregate as the wrapped strategy does, then query, decide and reset."""
        by_node = {self._node(proxy): (proxy, result) for proxy, result in results}
        replies = [
            Message(_reply_content(result, self._template), reply_to=self._sent[node])
            for node, (_, result) in by_node.items()
        ]
        admitted = self.defence.admitted(replies, _WEIGHT)
        valid = [by_node[message.metadata.src_node_id] for message in admitted]
        for _, result in valid:
            result.metrics.pop(_DROPPED, None)
        rewind = Rewind(self.strategy)
        parameters, metrics = self.strategy.aggregate_fit(server_round, valid, failures)
        if parameters is None:
            self.defence.skipped()
            return None, metrics
        before = _named(parameters, self._template)

        def again(without: Collection[int]) -> ArrayRecord | None:
            nonlocal before, metrics
            kept = [(proxy, result) for proxy, result in valid if self._node(proxy) not in without]
            second = second_aggregation(
                rewind, lambda: self.strategy.aggregate_fit(server_round, kept, failures)
            )
            if second is None:
                return None
            before, metrics = _named(second[0], self._template), second[1]
            return ArrayRecord(dict(before))

        alone = inner_of(self.strategy, Strategy) is None
        after = self.defence.defended(ArrayRecord(dict(before)), again if alone else None)
        _carry_over_reset(self.strategy, before, after)
        figures: dict[str, Any] = dict(self.defence.metrics())
        return _parameters(after), {**metrics, **figures}

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Configure as the wrapped strategy does."""
        return self.strategy.configure_evaluate(server_round, parameters, client_manager)

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Aggregate as the wrapped strategy does."""
        return self.strategy.aggregate_evaluate(server_round, results, failures)

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        """Evaluate as the wrapped strategy does."""
        return self.strategy.evaluate(server_round, parameters)

    def _node(self, proxy: ClientProxy) -> int:
        """Return the number by which the defence knows a client: its node id, where it has one."""
        if proxy.cid not in self._nodes:
            number = int(proxy.cid) if proxy.cid.isdecimal() else len(self._nodes) + 1
            self._nodes[proxy.cid] = number
        return self._nodes[proxy.cid]


class NoneClient(client.NoneClient):
    """Answers the queries of a :class:`NoneStrategy`, around the clients that an app has.

    In a ClientApp, or for ``start_client``::

        none = NoneClient(Net, load_data)
        app = ClientApp(client_fn=none.wrap(client_fn))
        start_client(server_address=address, client_fn=none.wrap(client_fn))

    and ``client_fn(context)`` gives its client the samples ``none.kept(context)`` to train on: it
    is called for every instruction, after the server's filter was applied. ``start_client`` has no
    node configuration, so that there ``load_data`` cannot depend on the context. An app that passes
    ``client=`` passes ``client_fn=none.wrap(lambda context: client)``; if the data of that client
    are fixed it cannot follow the filter, and is left to quarantine should they be poisoned.

    Parameters
    ----------
    model_fn, load_data, prepare, neuron_map, batch_size
        As for :class:`none_core.flower.NoneClient`.
    """

    def wrap(self, client_fn: ClientFn) -> ClientFn:
        """Return a ``client_fn`` whose clients answer queries, and obey the filter, too."""
        return lambda context: _WrappedClient(self, client_fn, context)

    def names(self) -> list[str]:
        """Name the parameters, in the order in which they travel."""
        if not hasattr(self._cache, "names"):
            self._cache.names = list(self.model_fn().state_dict())
        names: list[str] = self._cache.names
        return names


class _WrappedClient(Client):
    """One instruction's client; the wrapped one is made when the samples to train on are known."""

    def __init__(self, none: NoneClient, client_fn: ClientFn, context: Context) -> None:
        self._none, self._client_fn, self._context = none, client_fn, context

    @property
    def _client(self) -> Client:
        return self._client_fn(self._context).to_client()

    def get_properties(self, ins: GetPropertiesIns) -> GetPropertiesRes:
        return self._client.get_properties(ins)

    def get_parameters(self, ins: GetParametersIns) -> GetParametersRes:
        return self._client.get_parameters(ins)

    def fit(self, ins: FitIns) -> FitRes:
        filtered, config = _split(ins.config, _ARRAY)
        if not filtered:
            return self._client.fit(ins)
        arrays = {n: Array(np.load(io.BytesIO(b), allow_pickle=False)) for n, b in filtered.items()}
        query = ConfigRecord(json.loads(str(config.pop(QUERY))))
        filter_record = ArrayRecord(arrays)
        content = RecordDict({MODEL: self._model(ins), FILTER: filter_record, QUERY: query})
        dropped = self._none.purify(content, self._context)
        result = self._client.fit(FitIns(ins.parameters, config))
        if not self._none.policy(self._context).noise:  # an exact count is not private
            result.metrics = {**result.metrics, _DROPPED: dropped}
        return result

    def evaluate(self, ins: EvaluateIns) -> EvaluateRes:
        if QUERY not in ins.config:
            return self._client.evaluate(ins)
        query = ConfigRecord(json.loads(str(ins.config[QUERY])))
        content = RecordDict({MODEL: self._model(ins), QUERY: query})
        try:
            answer = self._none.answer(content, self._context)
        except Exception as error:  # start_client would end the process
            log(WARNING, "NONE: no report: %s", error)
            return EvaluateRes(Status(Code.EVALUATE_NOT_IMPLEMENTED, str(error)), 0.0, 0, {})
        said: dict[str, Scalar] = {n: _json(r) for n, r in answer.config_records.items()}
        report: Mapping[str, Array] = answer.array_records.get(REPORT, {})
        fields = {f"{_FIELD}{name}": array.numpy().tobytes() for name, array in report.items()}
        return EvaluateRes(Status(Code.OK, ""), 0.0, 0, {**said, **fields})

    def _model(self, ins: FitIns | EvaluateIns) -> ArrayRecord:
        arrays = parameters_to_ndarrays(ins.parameters)
        return ArrayRecord({n: Array(a) for n, a in zip(self._none.names(), arrays, strict=True)})


class _Proxies:
    """Stands in for a grid where there is none: of a grid, the defence uses one method.

    Parameters
    ----------
    proxies : mapping of int to ClientProxy
        By node id.
    """

    def __init__(self, proxies: Mapping[int, ClientProxy]) -> None:
        self._proxies = proxies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Put queries to all clients at once; answers that are late are lost."""
        pool = ThreadPoolExecutor(max_workers=max(1, len(self._proxies)))
        futures = [pool.submit(self._ask, message, timeout) for message in messages]
        done = wait(futures, timeout).done
        pool.shutdown(wait=False)
        return [future.result() for future in futures if future in done]

    def _ask(self, message: Message, timeout: float | None) -> Message:
        query = _json(message.content.config_records[QUERY])
        ins = EvaluateIns(_parameters(message.content.array_records[MODEL]), {QUERY: query})
        node, group = message.metadata.dst_node_id, int(message.metadata.group_id)
        try:
            result = self._proxies[node].evaluate(ins, timeout, group)
        except Exception as error:  # whatever a channel raises
            return Message(_failure(f"{type(error).__name__}: {error}"), reply_to=message)
        if result.status.code != Code.OK:
            return Message(_failure(result.status.message), reply_to=message)
        return Message(_report_content(result), reply_to=message)


def _failure(reason: str) -> Error:
    return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)


# --- records and what legacy instructions can carry -----------------------------------------------


def _named(parameters: Parameters, template: Template) -> ArrayRecord:
    """Give this server's own parameters names, and the dtypes that averaging takes from them."""
    arrays = parameters_to_ndarrays(parameters)
    if len(arrays) != len(template):
        raise ValueError(
            f"there are {len(arrays)} parameters, but the state_dict of model_fn's model has "
            f"{len(template)} entries: NONE needs the whole state_dict, in its order"
        )
    record = {}
    for (name, (dtype, _)), values in zip(template.items(), arrays, strict=True):
        whole = np.rint(values) if dtype.kind in "iu" else values
        record[name] = Array(np.asarray(whole, dtype))
    return ArrayRecord(record)


def _parameters(record: ArrayRecord) -> Parameters:
    return Parameters([array.data for array in record.values()], "numpy.ndarray")


def _with_filter(ins: FitIns, content: RecordDict) -> FitIns:
    """Put the filter of a train message, if it has one, into a configuration."""
    record = content.array_records.get(FILTER)
    if record is None:
        return ins
    arrays = {f"{_ARRAY}{name}": array.data for name, array in record.items()}
    query = {QUERY: _json(content.config_records[QUERY])}
    return FitIns(ins.parameters, {**ins.config, **query, **arrays})


def _json(record: ConfigRecord) -> str:
    return json.dumps(dict(record))


def _split(config: Mapping[str, Scalar], prefix: str) -> tuple[dict[str, Any], dict[str, Scalar]]:
    """Separate the entries that start with a prefix, without it, from the others."""
    ours = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
    return ours, {k: v for k, v in config.items() if not k.startswith(prefix)}


def _reply_content(result: FitRes, template: Template) -> RecordDict:
    """Write a client's answer as a train reply; only validation looks into the bytes."""
    tensors, stype = result.parameters.tensors, result.parameters.tensor_type
    names = [*template, "a surplus one"]
    arrays = {}
    for name, data in zip(names, tensors, strict=False):
        dtype, shape = template.get(name, ("", ()))
        arrays[name] = Array(str(dtype), shape, stype, data)
    metrics = {k: v for k, v in result.metrics.items() if k != _DROPPED}
    numbers: dict[str, Any] = {
        f"metrics.{k}": v for k, v in metrics.items() if type(v) in (int, float)
    }
    content = RecordDict(
        {
            MODEL: ArrayRecord(arrays),
            "metrics": MetricRecord({**numbers, _WEIGHT: result.num_examples}),
        }
    )
    dropped = result.metrics.get(_DROPPED)
    if isinstance(dropped, int):
        content[PURIFIED] = ConfigRecord({"dropped": dropped})
    return content


def _report_content(result: EvaluateRes) -> RecordDict:
    """Write a client's answer as the reply to a query; nothing in it is believed here."""
    packed, others = _split(result.metrics, _FIELD)
    content = RecordDict()
    if 0 < len(packed) <= MOST_RECORDS:
        content[REPORT] = ArrayRecord(
            {n: Array(np.frombuffer(b, np.uint8)) for n, b in packed.items() if type(b) is bytes}
        )
    for name in (QUERY, DECLINED, PRIVACY):
        if (record := _read_json(others.get(name))) is not None:
            content[name] = record
    return content


def _read_json(text: Any) -> ConfigRecord | None:
    """Read a record that a client wrote; None if it is not one."""
    if not isinstance(text, str) or len(text) > _MOST_JSON:
        return None
    try:
        return ConfigRecord(json.loads(text))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def _identify() -> None:
    """Give this process a task, as Flower does for legacy servers: it builds no message without."""
    try:
        _ = TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id
    except RuntimeError:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID


def _carry_over_reset(strategy: Strategy, before: ArrayRecord, after: ArrayRecord) -> None:
    """Let strategies that keep a momentum and their own copy of the model know of a reset."""
    inner = inner_of(strategy, Strategy)
    if inner is not None:  # we are around the wrapper
        _carry_over_reset(inner, before, after)

    def moved(momentum: list[NDArray[Any]]) -> list[NDArray[Any]]:
        pairs = zip(before, momentum, strict=True)
        return [without_reset(m, before[name], after[name]) for name, m in pairs]

    if isinstance(strategy, FedAvgM) and strategy.server_opt:
        strategy.initial_parameters = _parameters(after)
        if strategy.momentum_vector:
            strategy.momentum_vector = moved(strategy.momentum_vector)
    if isinstance(strategy, FedOpt):
        strategy.current_weights = [array.numpy() for array in after.values()]
        if strategy.m_t:
            strategy.m_t = moved(strategy.m_t)
