"""NONE's client half for Flower: answer activation queries, and leave poisoned samples out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from none_core.activations import TRIGGER_SHIFT, build_report, spatial_maximum
from none_core.batches import Batch, in_order, unchanged
from none_core.flower import messages
from none_core.flower.policy import ReportPolicy
from none_core.neurons import NeuronMap, Reader
from none_core.privacy import PRIVATE, Gaussian, private_report, read_samples
from none_core.trigger_inversion import Finding, Probe, Triggers, probe_model

_STATE = "none.kept"  # where the client's own state remembers which samples it trains on
_TRIGGERS = "none.triggers"  # ... and what its last probe found
_BEFORE = ".before"  # ... and what both were before the last round that changed them
_ROUND = ".round"
_PROBED = 512  # samples that a probe looks at, evenly spread over those that are trained on

CallNext = Callable[[Message, Context], Message]


class NoneClient:
    """Answers the queries of a :class:`~none_core.flower.NoneStrategy` on the client's own data.

    It is a mod and a query handler::

        none = NoneClient(Net, load_data)
        app = ClientApp(mods=[none.mod])
        app.query("activations")(none.query)

    The samples to train on are ``none.kept(context)``: all of them, until the server sends a
    filter. Apps with a ``client_fn`` have :class:`none_core.flower.legacy.NoneClient`.

    Parameters
    ----------
    model_fn : callable
        Builds the global model's architecture, on the device and in the memory format in which it
        is to answer: on a CPU ``torch.channels_last`` can halve a convolutional network's time.
    load_data : callable
        ``context -> Dataset`` of (input, label) with a length and a fixed order. A
        ``TensorDataset`` is read in slices, anything else sample by sample.
    prepare : callable, optional
        Applied to each batch of inputs, e.g. to turn bytes into floats.
    neuron_map : NeuronMap, optional
        For models that cannot be traced; the server must use the same.
    batch_size : int
    policy : callable, optional
        ``context -> ReportPolicy``: what this client is willing to say, whatever the server asks;
        by default what its node's and its run's configuration say under ``privacy.``.
    noise : callable, optional
        ``context -> numpy.random.Generator``: where the noise of differential privacy comes from,
        for simulations that are to repeat. Whoever can guess its state can take the noise off
        again; by default the operating system seeds it anew for every answer.
    """

    def __init__(
        self,
        model_fn: Callable[[], nn.Module],
        load_data: Callable[[Context], Dataset[Any]],
        *,
        prepare: Callable[[Tensor], Tensor] | None = None,
        neuron_map: NeuronMap | None = None,
        batch_size: int = 256,
        policy: Callable[[Context], ReportPolicy] = ReportPolicy.of,
        noise: Callable[[Context], np.random.Generator] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self.model_fn, self.load_data = model_fn, load_data
        self.prepare = prepare or unchanged
        self.neuron_map, self.batch_size = neuron_map, batch_size
        self.policy, self.noise = policy, noise or _unpredictable
        self._cache = threading.local()  # one model per thread, since clients may share a process

    def __getstate__(self) -> dict[str, Any]:
        """Leave the models behind: simulations send an app to their workers, over and over."""
        return {name: value for name, value in self.__dict__.items() if name != "_cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build the models anew when they are needed."""
        self.__dict__.update(state)
        self._cache = threading.local()

    def query(self, message: Message, context: Context) -> Message:
        """Report the activations of the model in ``message`` on the samples that are trained on.

        Or say why not, where the client's policy forbids it or leaves nothing to say.
        """
        return Message(self.answer(message.content, context), reply_to=message)

    def answer(self, content: RecordDict, context: Context) -> RecordDict:
        """Answer the content of a query; see :meth:`query`."""
        policy = self.policy(context)
        if (reason := policy.declines(context)) is not None:
            return messages.declined_content(reason)
        arrays, spec, min_count = messages.read_query(content)
        min_count = max(min_count, policy.min_count)
        dataset = self.load_data(context)
        batches = ((x, y) for _, x, y in self._batches(dataset, self.kept(context)))
        first = next(batches, None)
        if first is None:
            raise ValueError("there is no sample to report on")
        model, neuron_map, reader = self._model(first[0])
        if neuron_map.size != spec.neurons:
            raise ValueError(
                f"the server asks about {spec.neurons} neurons, but this client's model has "
                f"{neuron_map.size}: they do not run the same model"
            )
        model.load_state_dict(messages.state_of(arrays))
        samples = _chain(first, batches)
        cost: dict[str, Any] = {}
        patterns: ArrayRecord | None = None
        if policy.noise:
            cost = {**policy.spend(context), "withheld": sorted(spec.statistics - PRIVATE)}
            mechanism = Gaussian(policy.noise, self.noise(context))
            layer_of = neuron_map.layer_of(np.arange(neuron_map.size))
            seen = read_samples(reader, samples)
            report = private_report(seen, layer_of, spec, mechanism, min_count)
        else:
            report = build_report(model, neuron_map, samples, spec, min_count, reader)
        probe = messages.read_probe(content)
        if probe is not None and TRIGGER_SHIFT in spec.statistics and not policy.noise:
            server_round = messages.round_of(content)
            finding = self._probe(probe, spec.labels, model, reader, context, server_round)
            report = report.with_trigger_shift(
                finding.probed, finding.size, finding.success, finding.shift
            )
            if policy.patterns:
                kept = [k for k in probe.watched if finding.triggers.kept[k]]
                patterns = messages.patterns_record(finding.triggers, kept)
        if report.counts.any():
            answer = messages.report_content(report, content.config_records[messages.QUERY])
            if patterns:
                answer[messages.PATTERNS] = patterns
        else:
            answer = messages.declined_content(f"no label has {min_count} samples")
        if cost:
            answer[messages.PRIVACY] = ConfigRecord(cost)
        return answer

    def mod(self, message: Message, context: Context, call_next: CallNext) -> Message:
        """Flower mod: answers queries, and applies the server's filter before training."""
        if message.metadata.message_type == messages.MESSAGE_TYPE:
            return self.query(message, context)
        if not message.has_content() or messages.FILTER not in message.content:
            return call_next(message, context)
        dropped = self.purify(message.content, context)
        message.content = messages.without_filter(message.content)
        reply = call_next(message, context)
        if reply.has_content() and not self.policy(context).noise:  # an exact count is not private
            reply.content[messages.PURIFIED] = ConfigRecord({"dropped": dropped})
        return reply

    def kept(self, context: Context) -> NDArray[np.int64]:
        """Return the indices of the samples to train on, ascending."""
        size = len(self.load_data(context))  # type: ignore[arg-type]
        record = context.state.array_records.get(_STATE)
        if record is None:
            return np.arange(size)
        mask = record["mask"].numpy()
        if len(mask) != size:
            raise ValueError(
                f"the data set has {size} samples, but had {len(mask)} when it was filtered; "
                f"load_data must return the same samples in the same order every time"
            )
        return np.flatnonzero(mask)

    def purify(self, content: RecordDict, context: Context) -> int:
        """Drop the samples that exceed a train message's filter, for good; returns how many."""
        sample_filter, undo = messages.read_filter(content.array_records[messages.FILTER])
        dataset = self.load_data(context)
        _begin(context, _STATE, messages.round_of(content))
        kept = self.kept(context)
        state = undo.apply(messages.state_of(_model_record(content)))
        mask = np.zeros(len(dataset), dtype=np.uint8)  # type: ignore[arg-type]
        mask[kept] = 1
        reader = None
        with torch.inference_mode():
            for indices, inputs, labels in self._batches(dataset, kept):
                concerned = np.isin(labels.numpy(), sample_filter.labels)
                if not concerned.any():
                    continue
                if reader is None:
                    model, _, reader = self._model(inputs)
                    model.load_state_dict(state)
                _, reads = reader(inputs[torch.from_numpy(concerned)])
                values = spatial_maximum(reads).cpu().numpy()
                drop = sample_filter.flagged(values, labels.numpy()[concerned])
                mask[indices[concerned][drop]] = 0
        context.state[_STATE] = ArrayRecord({"mask": Array(mask)})
        return len(kept) - int(mask.sum())

    def _probe(
        self,
        probe: Probe,
        labels: int,
        model: nn.Module,
        reader: Reader,
        context: Context,
        server_round: int,
    ) -> Finding:
        """Look for triggers, starting from what was found the last time."""
        kept = self.kept(context)
        if len(kept) > _PROBED:
            kept = kept[np.linspace(0, len(kept) - 1, _PROBED).astype(np.int64)]
        batches = list(self._batches(self.load_data(context), kept))
        inputs = torch.cat([x for _, x, _ in batches])
        targets = torch.cat([y for _, _, y in batches])
        _begin(context, _TRIGGERS, server_round)
        record = context.state.array_records.get(_TRIGGERS)
        known = Triggers.unknown(labels, inputs[0].cpu())
        if record is not None:
            known = messages.read_triggers(record)
            if known.pattern.shape != (labels, *inputs.shape[1:]):
                raise ValueError("the samples have another shape than when they were last probed")
        generator = torch.Generator().manual_seed(server_round)
        finding = probe_model(model, reader, inputs, targets, probe, known, generator)
        context.state[_TRIGGERS] = messages.triggers_record(finding.triggers)
        return finding

    def _model(self, inputs: Tensor) -> tuple[nn.Module, NeuronMap, Reader]:
        if not hasattr(self._cache, "model"):
            # Made under inference mode, the model could not be given other weights outside of it.
            with torch.inference_mode(False):
                model = self.model_fn().eval().requires_grad_(False)
                neurons = self.neuron_map or NeuronMap.trace(model, inputs[:1].clone())
                self._cache.model = model, neurons, neurons.reader(model)
        cached: tuple[nn.Module, NeuronMap, Reader] = self._cache.model
        return cached

    def _batches(self, dataset: Dataset[Any], indices: NDArray[np.int64]) -> Iterator[Batch]:
        """Yield (indices, inputs, labels) in order."""
        return in_order(dataset, indices, self.batch_size, self.prepare)


def _begin(context: Context, name: str, server_round: int) -> None:
    """Note what the state was before a round changes it, or put that back if it already has.

    A server that was stopped repeats the round it was in, and is to get the same answers.
    """
    state = context.state
    begun = state.config_records.get(name + _ROUND)
    if begun is not None and begun["round"] == server_round:
        source, target = name + _BEFORE, name
    else:
        source, target = name, name + _BEFORE
        state[name + _ROUND] = ConfigRecord({"round": server_round})
    if source in state:
        state[target] = state[source]
    else:
        state.pop(target, None)


def _unpredictable(_: Context) -> np.random.Generator:
    return np.random.default_rng()


def _chain(
    first: tuple[Tensor, Tensor], rest: Iterator[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    yield first
    yield from rest


def _model_record(content: RecordDict) -> ArrayRecord:
    """Find the one array record of a train message that is not ours."""
    others = [r for name, r in content.array_records.items() if name != messages.FILTER]
    if len(others) != 1:
        raise ValueError(f"a train message must carry one model, this one carries {len(others)}")
    return others[0]
